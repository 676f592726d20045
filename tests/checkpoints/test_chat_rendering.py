"""Chats in every registered format, spelled out to the byte."""

import pytest

from guided_decode.checkpoints.prompts import FORMATS, render, tokenise
from tests.look_alikes import look_alike, tokenizer_like

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello."}
AGAIN = {"role": "user", "content": " Why?\n"}

SINGLE, ANSWERED = [USER], [USER, ASSISTANT]
MULTI, WITH_SYSTEM = [USER, ASSISTANT, AGAIN], [SYSTEM, USER]
WITH_BOTH = [SYSTEM, USER, ASSISTANT, AGAIN, ASSISTANT]

MATH_SYSTEM = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within "
    "\\boxed{}.<|im_end|>\n"
)
SMOL_SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n"
)
ORZ = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves "
    "it. The Assistant first thinks about the reasoning process in the mind and then provides the "
    "User with the answer. The reasoning process is enclosed within <think> </think> and answer is "
    "enclosed within <answer> </answer> tags, respectively, i.e., <think> reasoning process here "
    "</think> <answer> answer here </answer>. User: You must put your answer inside <answer> "
    "</answer> tags, i.e., <answer> answer here </answer>. And your final answer will be extracted "
    "automatically by the \\boxed{} tag.\nThis is the problem:\nHi\nAssistant: <think>"
)
DEEPSEEK = (
    "<｜User｜>Hi Please think step-by-step and put your final answer within \\boxed{}."
    "<｜Assistant｜><think>\n"
)

# format: (prompt of one turn, one answered turn, prompt of a second turn, prompt under a system
# message, two answered turns under a system message); None: refused.
EXPECTED = {
    "tulu-2": (
        "<|user|>\nHi\n<|assistant|>\n",
        "<|user|>\nHi\n<|assistant|>\nHello.</s>\n",
        "<|user|>\nHi\n<|assistant|>\nHello.</s>\n<|user|>\n Why?\n\n<|assistant|>\n",
        "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\n",
        "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello.</s>\n"
        "<|user|>\n Why?\n\n<|assistant|>\nHello.</s>\n",
    ),
    "tulu-3": (
        "<|user|>\nHi\n<|assistant|>\n",
        "<|user|>\nHi\n<|assistant|>\nHello.<|end_of_text|>",
        "<|user|>\nHi\n<|assistant|>\nHello.<|end_of_text|>\n<|user|>\n Why?\n\n<|assistant|>\n",
        "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\n",
        "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello.<|end_of_text|>\n"
        "<|user|>\n Why?\n\n<|assistant|>\nHello.<|end_of_text|>",
    ),
    "halos": (
        "\n<|user|>\nHi\n<|assistant|>\n",
        "\n<|user|>\nHi\n<|assistant|>\nHello. </s>",
        "\n<|user|>\nHi\n<|assistant|>\nHello.\n<|user|>\n Why?\n\n<|assistant|>\n",
        None,
        None,
    ),
    "qwen-2.5-math": (
        MATH_SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        MATH_SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n",
        MATH_SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\n Why?\n<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n Why?\n<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n",
    ),
    "smollm2": (
        SMOL_SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        SMOL_SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n",
        SMOL_SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\n Why?\n<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n Why?\n<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n",
    ),
    "open-reasoner-zero": (ORZ, ORZ + "Hello.", None, None, None),
    "deepseek-r1-math": (
        DEEPSEEK, DEEPSEEK + "Hello.<｜end▁of▁sentence｜>", None, None, None,
    ),
    "skywork-prm": ("Hi\n", "Hi\nHello.", None, None, None),
    "math-shepherd": ("Hi ", "Hi Hello.", None, None, None),
}  # fmt: skip
CHATS = (SINGLE, ANSWERED, MULTI, WITH_SYSTEM, WITH_BOTH)
# A tokenizer of the family, and the id of a BOS before its texts; None: there is none.
TOKENIZERS = {
    "tulu-2": ("llama-2", "<s>"),
    "tulu-3": ("tulu-3", None),
    "halos": ("llama-2", "<s>"),
    "qwen-2.5-math": ("qwen", None),
    "smollm2": ("qwen", None),
    "open-reasoner-zero": ("qwen-base", None),
    "deepseek-r1-math": ("deepseek-r1", "<｜begin▁of▁sentence｜>"),
    "skywork-prm": ("skywork-prm", "<|endoftext|>"),
    "math-shepherd": ("llama-2", "<s>"),
}


def test_every_registered_format_is_spelled_out():
    assert set(EXPECTED) == set(TOKENIZERS) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", range(len(CHATS)))
def test_chats_are_rendered_to_the_byte_or_refused(name, case):
    chat, expected = CHATS[case], EXPECTED[name][case]
    asks = chat[-1]["role"] == "user"
    if expected is None:
        with pytest.raises(ValueError, match=f"(role 'system'|has one turn).*|{name} expects"):
            render(chat, name, add_generation_prompt=asks)
    else:
        assert render(chat, name, add_generation_prompt=asks) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_token_ids_say_the_same_bytes_behind_the_bos_of_training(name):
    base, bos = TOKENIZERS[name]
    tokenizer = tokenizer_like(base)
    ids = tokenise(tokenizer, ANSWERED, name, end="eos")
    if bos is not None:
        assert ids.pop(0) == tokenizer.convert_tokens_to_ids(bos)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == EXPECTED[name][1].removesuffix("\n")
    assert (ids[-1] == tokenizer.eos_token_id) == ("{eos}" in FORMATS[name].final)
    assert tokenise(tokenizer, ANSWERED, name, end="eos", bos="drop") == ids


@pytest.mark.parametrize(
    ("name", "prompt_format"),
    [
        ("allenai/tulu-2-dpo-70b", "tulu-2"),
        ("allenai/Llama-3.1-Tulu-3-8B", "tulu-3"),
        ("Qwen/Qwen2.5-Math-7B-Instruct", "qwen-2.5-math"),
    ],
)
@pytest.mark.parametrize("case", range(len(CHATS)))
def test_formats_of_chat_templates_equal_the_template(name, prompt_format, case):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(look_alike(name))
    chat = CHATS[case]
    asks = chat[-1]["role"] == "user"
    assert tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=asks
    ) == render(chat, prompt_format, add_generation_prompt=asks)


def test_the_kto_policy_is_prompted_as_tulu_and_not_as_its_base():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        look_alike("ContextualAI/Contextual_KTO_Mistral_PairRM")
    )
    ids = tokenise(tokenizer, SINGLE, "tulu-2", add_generation_prompt=True)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 0
    assert tokenizer.decode(ids[1:]) == "<|user|>\nHi\n<|assistant|>\n"
