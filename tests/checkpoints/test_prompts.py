"""Prompt formats, byte for byte against the chat templates of the checkpoints' tokenizers."""

import jinja2
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from guided_decode.checkpoints.prompts import FORMATS, find_format, render, tokenise
from guided_decode.checkpoints.registry import find
from recipes.tiny_tulu.tokenizer import build_tokenizer

ASK = [{"role": "user", "content": "Hi"}]
ANSWERED = [*ASK, {"role": "assistant", "content": "Hello."}]
SECOND = [
    {"role": "system", "content": "Be\nbrief. "},
    *ANSWERED,
    {"role": "user", "content": " Why?\n"},
]

# The templates as the tokenizers carry them; transformers renders with these two options.
TULU_2 = """{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] }}
{% elif message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
TULU_3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
    "{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
    "{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
TEMPLATES = {"tulu-2": TULU_2, "tulu-3": TULU_3}


def by_template(name, messages, add_generation_prompt, eos):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATES[name]).render(
        messages=messages, add_generation_prompt=add_generation_prompt, eos_token=eos
    )


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize(
    ("messages", "generate"), [(ASK, True), (ASK, False), (ANSWERED, False), (SECOND, True)]
)
def test_equals_the_tokenizers_chat_template(name, messages, generate):
    ours = render(messages, name, add_generation_prompt=generate)
    assert ours == by_template(name, messages, generate, FORMATS[name].eos_token)


@pytest.mark.parametrize(
    ("messages", "generate"), [(ASK, True), (ASK, False), (ANSWERED, False), (SECOND, True)]
)
def test_tiny_tulus_format_equals_its_own_tokenizer(messages, generate):
    own = build_tokenizer()
    ids = tokenise(
        own, messages, find("tiny-tulu-value").prompt_format, add_generation_prompt=generate
    )
    encoded = own.apply_chat_template(messages, add_generation_prompt=generate)
    assert ids == encoded["input_ids"]


def test_tulu_2_has_the_newline_after_the_assistant_tag():
    assert render(ASK, "tulu-2", add_generation_prompt=True) == "<|user|>\nHi\n<|assistant|>\n"


def test_an_earlier_tulu_assistant_turn_ends_with_eos_and_a_newline():
    text = render(SECOND, "tulu-2", add_generation_prompt=True)
    assert text == (
        "<|system|>\nBe\nbrief. \n<|user|>\nHi\n<|assistant|>\nHello.</s>\n"
        "<|user|>\n Why?\n\n<|assistant|>\n"
    )


@pytest.mark.parametrize(
    ("name", "end", "tail"),
    [
        ("tulu-2", "turn", "Hello.</s>\n"),
        ("tulu-2", "eos", "Hello.</s>"),
        ("tulu-2", "open", "Hello."),
        ("tulu-3", "turn", "Hello.<|end_of_text|>"),
        ("tulu-3", "eos", "Hello.<|end_of_text|>"),
        ("halos", "turn", "Hello. </s>"),
        ("halos", "eos", "Hello. </s>"),
        ("halos", "open", "Hello."),
    ],
)
def test_a_final_turn_ends_as_asked(name, end, tail):
    text = render(ANSWERED, name, end=end)
    assert text.rpartition("<|assistant|>\n")[2] == tail


def test_halos_begins_with_a_newline_and_ends_only_the_last_response():
    text = render([*ANSWERED, *ASK], "halos", add_generation_prompt=True)
    assert text == "\n<|user|>\nHi\n<|assistant|>\nHello.\n<|user|>\nHi\n<|assistant|>\n"


def test_eos_is_the_tokenizers_where_it_is_given():
    # The Llama 3.1 Tulu 2 reward models: Tulu 2's format with Llama 3's EOS.
    assert render(ANSWERED, "tulu-2", eos_token="<|end_of_text|>").endswith("<|end_of_text|>\n")


@pytest.mark.parametrize(
    ("messages", "kwargs", "message"),
    [
        ([], {}, "no messages: tulu-2 expects at least one"),
        ([{"role": "tool", "content": ""}], {}, "message 0 has the role 'tool': tulu-2 expects"),
        ([{"content": "x"}], {}, "message 0 has the role None"),
        ([{"role": "user", "content": None}], {}, "content of type NoneType: expected text"),
        ([*ASK, SECOND[0]], {}, "message 1 has the role 'system': it may only be the first"),
        (ANSWERED, {"add_generation_prompt": True}, "the last message is the assistant's"),
        (ASK, {"end": "eos"}, "end='eos' ends an assistant's response, but the last message is"),
        (ANSWERED, {"end": "stop"}, "end='stop': expected 'turn', 'eos' or 'open'"),
    ],
)
def test_bad_conversations_are_refused(messages, kwargs, message):
    with pytest.raises(ValueError, match=message):
        render(messages, "tulu-2", **kwargs)


def test_halos_has_no_system_turn():
    with pytest.raises(ValueError, match="'system': halos expects one of assistant, user"):
        render(SECOND, "halos")


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match="prompt format 'chatml': expected one of tulu-2, tulu-3"):
        find_format("chatml")


def tokenizer(**special):
    """Bytes-like: one token a character, and the special tokens whole."""
    letters = sorted({c for text in ("<|user|>\nHi</s>.eloasitn", "\n ") for c in text})
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "?", *letters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **{"bos_token": "<s>", "eos_token": "</s>", **special}
    )


def test_tokenise_begins_with_bos_as_the_format_was_trained():
    t = tokenizer()
    ids = tokenise(t, ASK, "tulu-2", add_generation_prompt=True)
    assert ids[0] == t.bos_token_id
    assert ids[1:] == tokenise(t, ASK, "tulu-2", add_generation_prompt=True, bos="drop")
    assert t.bos_token_id not in tokenise(t, ASK, "tulu-3", add_generation_prompt=True)


def test_tokenise_leaves_bos_out_where_the_tokenizer_has_none():
    t = tokenizer(bos_token=None)
    assert tokenise(t, ASK, "tulu-2")[0] == t.convert_tokens_to_ids("<")


@pytest.mark.parametrize("name", sorted(n for n, own in FORMATS.items() if "{eos}" in own.final))
def test_a_reward_model_is_read_at_eos_and_nothing_after_it(name):
    t = tokenizer()
    ids = tokenise(t, ANSWERED, name, end="eos")
    assert ids[-1] == t.eos_token_id
    assert ids.count(t.eos_token_id) == 1


def test_an_unfinished_response_has_no_eos():
    t = tokenizer()
    assert t.eos_token_id not in tokenise(t, ANSWERED, "tulu-2", end="open")


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(ValueError, match="the tokenizer has no EOS: tulu-2 ends responses with it"):
        tokenise(tokenizer(eos_token=None), ASK, "tulu-2")
