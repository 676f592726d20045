"""Reward models with one label, read at the end of a finished response."""

from dataclasses import replace

from guided_decode.checkpoints.record import CHAT_TEMPLATE, Record
from guided_decode.checkpoints.shape import (
    LLAMA_3_2_1B,
    LLAMA_3_2_3B,
    LLAMA_3_8B,
    MISTRAL_7B,
    QWEN_3_1_7B,
    QWEN_3_4B,
    QWEN_3_8B,
    QWEN_3_HALF_B,
    Shape,
)

_LLAMA, _QWEN, _MISTRAL = "LlamaFor", "Qwen3For", "MistralFor"
_SKYWORK_V2 = "Skywork/Skywork-Reward-V2"


def _reward_model(name: str, stem: str, shape: Shape, policy: str, turn_end: str = "") -> Record:
    inferred = () if not turn_end else (
        "training read it where its chat template ends a turn, as its published code does",
    )  # fmt: skip
    return Record(
        name=name,
        architecture=f"{stem}SequenceClassification",
        shape=shape,
        kind="reward-model",
        # One of its own tokenizer, which its cards apply.
        prompt_format=CHAT_TEMPLATE,
        summary="reward model, read at " + ("the newline after EOS" if turn_end else "EOS"),
        group="Reward models",
        policy=policy,
        turn_end=turn_end,
        inferred=inferred,
    )


def _skywork_qwen(size: str, shape: Shape) -> Record:
    # <|im_end|> is its EOS, and the turn goes on for one token more.
    return _reward_model(f"{_SKYWORK_V2}-Qwen3-{size}", _QWEN, shape, f"Qwen/Qwen3-{size}", "\n")


RECORDS: tuple[Record, ...] = (
    _reward_model(f"{_SKYWORK_V2}-Llama-3.1-8B", _LLAMA, LLAMA_3_8B,
                  "meta-llama/Llama-3.1-8B-Instruct"),
    _reward_model(f"{_SKYWORK_V2}-Llama-3.1-8B-40M", _LLAMA, LLAMA_3_8B,
                  "meta-llama/Llama-3.1-8B-Instruct"),
    _reward_model(f"{_SKYWORK_V2}-Llama-3.2-3B", _LLAMA, LLAMA_3_2_3B,
                  "meta-llama/Llama-3.2-3B-Instruct"),
    _reward_model(f"{_SKYWORK_V2}-Llama-3.2-1B", _LLAMA, LLAMA_3_2_1B,
                  "meta-llama/Llama-3.2-1B-Instruct"),
    _skywork_qwen("8B", QWEN_3_8B),
    _skywork_qwen("4B", QWEN_3_4B),
    _skywork_qwen("1.7B", QWEN_3_1_7B),
    _skywork_qwen("0.6B", QWEN_3_HALF_B),
    # One row more, its padding.
    _reward_model("Skywork/Skywork-Reward-Llama-3.1-8B-v0.2", _LLAMA,
                  replace(LLAMA_3_8B, vocab=128257), "meta-llama/Llama-3.1-8B-Instruct"),
    _reward_model("weqweasdas/RM-Mistral-7B", _MISTRAL, MISTRAL_7B,
                  "mistralai/Mistral-7B-Instruct-v0.2"),
)  # fmt: skip

POLICIES: dict[str, Shape] = {
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_3_8B,
    "meta-llama/Llama-3.2-3B-Instruct": LLAMA_3_2_3B,
    "meta-llama/Llama-3.2-1B-Instruct": LLAMA_3_2_1B,
    "Qwen/Qwen3-8B": QWEN_3_8B,
    "Qwen/Qwen3-4B": QWEN_3_4B,
    "Qwen/Qwen3-1.7B": QWEN_3_1_7B,
    "Qwen/Qwen3-0.6B": QWEN_3_HALF_B,
}
