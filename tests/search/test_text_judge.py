"""Judging through text: the judge reads its own format and tokens, as if it had been given text."""

import copy

import pytest
import torch

from guided_decode import load_scorer, tiny_tulu
from guided_decode.checkpoints.prompts import tokenise
from guided_decode.search import (
    METHODS,
    Judged,
    ScorerJudge,
    TextJudge,
    connect_judge,
    find_method,
    load_generator,
    run_all,
)
from guided_decode.search.answers import final_answer
from guided_decode.search.driver import SINGLE_TOKENS
from guided_decode.search.judge_format import JudgeFormat
from tests import models
from tests.cli.search_runs import SMALL
from tests.look_alikes import tokenizer_like
from tests.search.other_tokenizers import byte_fallback, byte_level
from tests.search.pooling_server import PoolingServer
from tests.search.scripted_server import scripted

CHAT = ({"role": "system", "content": "Sums."}, {"role": "user", "content": "2 + 2?"})
EARLIER = (*CHAT, {"role": "assistant", "content": "4 €"}, {"role": "user", "content": "why 😀?"})
RESPONSE = "an answer: 4 €"


def joined(parts):
    prompt, response = parts
    return prompt + response


def with_response(chat, text=RESPONSE):
    return [*chat, {"role": "assistant", "content": text}]


@pytest.mark.parametrize("name", ["tulu-2", "tulu-3"])
@pytest.mark.parametrize("chat", [CHAT, EARLIER])
@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback])
def test_a_response_is_tokenised_as_training_had_it(name, chat, tokenizer):
    tokenizer = tokenizer()
    form = JudgeFormat(tokenizer, name)
    for ended, end in ((True, "eos"), (False, "open")):
        prompt, response = form.ids(chat, RESPONSE, ended=ended)
        assert prompt + response == tokenise(tokenizer, with_response(chat), name, end=end)
        assert (response[-1] == tokenizer.eos_token_id) == ended
        asked = tokenise(tokenizer, chat, name, add_generation_prompt=True)
        assert prompt == asked[: len(prompt)]
        assert len(prompt) >= len(asked) - 1
    assert (prompt[0] == tokenizer.bos_token_id) == (name == "tulu-2")


def test_halos_puts_a_space_before_its_eos():
    tokenizer = byte_level()
    ids = joined(JudgeFormat(tokenizer, "halos").ids(CHAT[1:], "an", ended=True))
    assert ids == tokenise(tokenizer, with_response(CHAT[1:], "an"), "halos", end="eos")
    assert tokenizer.decode(ids[-2:]) == " </s>"


@pytest.mark.parametrize("chat", [CHAT, EARLIER])
def test_a_template_says_where_a_turn_ends(chat):
    tokenizer = byte_level()
    form = JudgeFormat(tokenizer, None)
    whole = tokenizer.apply_chat_template(with_response(chat), tokenize=False)
    ended = joined(form.ids(chat, RESPONSE, ended=True))
    # What the template puts after EOS is not read.
    assert whole.endswith("</s>\n")
    assert ended == tokenizer.encode(whole[:-1], add_special_tokens=False)
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    going = joined(form.ids(chat, RESPONSE, ended=False))
    assert going == tokenizer.encode(asked + RESPONSE, add_special_tokens=False)
    # It trims what it is given; a piece is as it was written.
    trimmed = joined(form.ids(chat, " " + RESPONSE + "\n", ended=True))
    assert trimmed == ended
    spaced = joined(form.ids(chat, RESPONSE + "\n", ended=False))
    assert spaced == tokenizer.encode(asked + RESPONSE + "\n", add_special_tokens=False)


def test_a_piece_is_a_beginning_of_the_turn_that_training_had():
    """Qwen3's template puts an empty thought before the last answer, and none where it asks."""
    tokenizer = tokenizer_like("qwen-3")
    form = JudgeFormat(tokenizer, None)
    whole = tokenizer.apply_chat_template(with_response(CHAT), tokenize=False)
    thought = "<think>\n\n</think>\n\n"
    assert thought + RESPONSE in whole
    asked = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert thought not in asked
    for length in range(len(RESPONSE) + 1):
        prompt, response = form.ids(CHAT, RESPONSE[:length], ended=False)
        assert tokenizer.decode(prompt) == asked + thought
        assert tokenizer.decode(response) == RESPONSE[:length]
    ended = joined(form.ids(CHAT, RESPONSE, ended=True))
    assert tokenizer.decode(ended) == whole.removesuffix("\n")


def test_a_template_without_eos_gets_one():
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}{% endfor %}"
    ids = joined(JudgeFormat(tokenizer, None).ids(CHAT[1:], "an", ended=True))
    assert tokenizer.decode(ids) == "<2 + 2?<an</s>"


def test_text_is_continued_as_it_is():
    tokenizer = byte_level()
    for name, lead in (("tulu-2", [1]), ("tulu-3", []), (None, [])):
        form = JudgeFormat(tokenizer, name)
        prompt, response = form.ids("Once", " upon", ended=False)
        assert prompt + response == lead + tokenizer.encode("Once upon", add_special_tokens=False)
        assert form.ids("Once", " upon", ended=True)[1] == [*response, 2]


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback])
@pytest.mark.parametrize("chat", [CHAT, EARLIER])
def test_special_tokens_that_a_response_spells_are_text(chat, tokenizer):
    tokenizer = tokenizer()
    form = JudgeFormat(tokenizer, "tulu-2")
    for ended in (True, False):
        prompt, response = form.ids(chat, "an </s> an <s>", ended=ended)
        assert response.count(2) == ended
        assert 1 not in response
        assert tokenizer.decode(response).removesuffix("</s>").strip() == "an </s> an <s>"
        # An earlier turn's EOS is one.
        assert prompt.count(2) == (len(chat) > 2)


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        ({"chat_template": None}, "has no chat template: pass the format that it was trained on"),
        ({"eos_token": None}, "the judge's tokenizer has no EOS, which ends finished responses"),
    ],
)
def test_a_tokenizer_that_cannot_render_is_refused(break_, message):
    tokenizer = copy.deepcopy(byte_level())
    for name, value in break_.items():
        setattr(tokenizer, name, value)
    with pytest.raises(ValueError, match=message):
        JudgeFormat(tokenizer, None).ids(CHAT, "", ended=False)


def test_a_template_that_refuses_is_told():
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match="the judge's chat template refuses the chat: no system"):
        JudgeFormat(tokenizer, None).ids(CHAT, "", ended=False)


@pytest.fixture(scope="module")
def policy():
    return load_generator("tiny-tulu-sft")


def tokenizer_of(policy):
    return policy._text()


def reward_model(tokenizer):
    return models.tiny("llama", "sequence", vocab_size=len(tokenizer), bos_token_id=1,
                       eos_token_id=2, pad_token_id=0, max_position_embeddings=1024)  # fmt: skip


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def judged_by(request, policy):
    """A reward model with another tokenizer: (its tokenizer, the judge of text)."""
    tokenizer = {"byte-level": byte_level, "byte-fallback": byte_fallback}[request.param]()
    scorer = load_scorer(reward_model(tokenizer), "reward-model")
    judge = TextJudge(
        ScorerJudge(scorer), tokenizer, policy_tokenizer=tokenizer_of(policy),
        prompt_format="tulu-2", terminals=policy.eos_token_ids,
    )  # fmt: skip
    return tokenizer, judge


def stock(tokenizer, chat, text, ended):
    """What the stock forward says at the last token of the text in the judge's format."""
    end = "eos" if ended else "open"
    ids = tokenise(tokenizer, with_response(chat, text), "tulu-2", end=end)
    model = reward_model(tokenizer)
    with torch.inference_mode():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return float(model.score(hidden))


def test_a_piece_is_valued_as_its_whole_characters(judged_by, policy):
    tokenizer, judge = judged_by
    own = tokenizer_of(policy)
    prompt = tuple(own.encode("anything", add_special_tokens=False))
    judge.tell(prompt, CHAT)
    written = own.encode("an €", add_special_tokens=False)
    pieces = [tuple(written[:i]) for i in range(len(written) + 1)]
    values = judge.judge([Judged(prompt, each, False) for each in pieces])
    shown = ["", "an", "an ", "an ", "an ", "an €"]
    assert values == pytest.approx(
        [stock(tokenizer, CHAT, text, False) for text in shown], abs=1e-4
    )
    ended, cut = judge.judge([
        Judged(prompt, (*written, own.eos_token_id), True),
        # At its most tokens: finished, and no EOS.
        Judged(prompt, tuple(written), True),
    ])  # fmt: skip
    assert ended == pytest.approx(stock(tokenizer, CHAT, "an €", True), abs=1e-4)
    assert cut == pytest.approx(stock(tokenizer, CHAT, "an €", False), abs=1e-4)


def test_a_prompt_whose_chat_is_not_known_is_refused(judged_by):
    _, judge = judged_by
    with pytest.raises(
        ValueError, match="the chat of a prompt of 3 tokens is not known, whose ids"
    ):
        judge.judge([Judged((9, 9, 9), (5,), False)])
    judge.tell((9, 9, 9), CHAT)
    judge.forget()
    with pytest.raises(ValueError, match=r"call tell\(prompt, messages\) before the search"):
        judge.judge([Judged((9, 9, 9), (5,), False)])


def begun(name, policy, message):
    method = find_method(name)

    def answer(tokens):
        return final_answer(policy.decode(tokens))

    return method.begin(
        policy.encode(tiny_tulu.render(message)), seed=3, max_tokens=40,
        answer=answer if method.votes else None, **SMALL[name],
    )  # fmt: skip


def single(name):
    return METHODS[name].per_token(SMALL[name])


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].judged])
def test_a_method_chooses_by_the_values_of_the_texts(name, judged_by, policy):
    tokenizer, judge = judged_by
    message = tiny_tulu.held_out_prompts(1)[0]
    chat = [{"role": "user", "content": message}]
    judge.tell(policy.encode(tiny_tulu.render(message)), chat)
    if single(name):
        with pytest.raises(ValueError, match=SINGLE_TOKENS[:60]):
            run_all([begun(name, policy, message)], policy, judge)
        return
    (found,) = run_all([begun(name, policy, message)], policy, judge)
    assert found.chosen is not None
    for each in found.candidates:
        ended = each.tokens[-1] in policy.eos_token_ids
        expected = stock(tokenizer, chat, policy.decode(each.tokens), ended)
        assert each.score == pytest.approx(expected, abs=1e-4)


def test_methods_of_single_tokens_are_known():
    names = {name for name in METHODS if METHODS[name].judged and single(name)}
    assert names == {"value-beam", "ppo-mcts", "ppo-mcts-published"}
    assert METHODS["smc"].per_token({"block": 1})
    assert not METHODS["value-beam"].per_token({"block": 8})


def test_the_judge_may_be_on_a_server(policy, tmp_path):
    tokenizer = byte_fallback()
    model = reward_model(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    message = tiny_tulu.held_out_prompts(1)[0]
    prompt = policy.encode(tiny_tulu.render(message))

    def through(judge):
        judge = TextJudge(
            judge, tokenizer, policy_tokenizer=tokenizer_of(policy), prompt_format="tulu-2",
            terminals=policy.eos_token_ids,
        )  # fmt: skip
        judge.tell(prompt, [{"role": "user", "content": message}])
        return run_all([begun("vgs", policy, message)], policy, judge)[0]

    local = through(ScorerJudge(load_scorer(str(tmp_path))))
    with (
        scripted(PoolingServer(model, "classify", root=str(tmp_path))) as (server,),
        connect_judge(server.url) as judge,
    ):
        remote = through(judge)
    assert (remote.chosen, [each.tokens for each in remote.candidates]) == (
        local.chosen, [each.tokens for each in local.candidates]
    )  # fmt: skip
