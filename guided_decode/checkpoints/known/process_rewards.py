"""Process reward models: read at the marks that end the steps of a response."""

from guided_decode.checkpoints.record import Record
from guided_decode.checkpoints.shape import (
    MISTRAL_7B,
    QWEN_2_5_1_5B,
    QWEN_2_5_7B,
    QWEN_2_5_72B,
    Shape,
)

_GROUP, _KIND = "Process reward models", "process-reward"
_QWEN_FORMAT = "qwen-2.5-math"


def _qwen(name: str, policy: str, shape: Shape) -> Record:
    return Record(
        name=f"Qwen/{name}",
        architecture="Qwen2ForProcessRewardModel",
        shape=shape,
        kind=_KIND,
        prompt_format=_QWEN_FORMAT,
        summary="P(the step is right) of two labels at <extra_0>",
        group=_GROUP,
        policy=f"Qwen/{policy}",
        head_labels=2,
        inner_head=True,
        biased=True,
        steps="extra-0",
        inferred=(
            "<extra_0> has the id of Qwen2.5's <|quad_end|>, 151651, by vLLM's default for it",
            "steps are multiplied, as its paper's best-of-n does",
        ),
    )


def _skywork(size: str, shape: Shape) -> Record:
    return Record(
        name=f"Skywork/Skywork-o1-Open-PRM-Qwen-2.5-{size}",
        architecture="Qwen2ForPrmModel",
        shape=shape,
        kind=_KIND,
        prompt_format="skywork-prm",
        summary="P(the step is right), a value head's sigmoid at the newline that ends the step",
        group=_GROUP,
        policy=f"Qwen/Qwen2.5-Math-{size}-Instruct",
        biased=True,
        steps="newline",
        defects=("its weights are pickles: allow_pickle=True",),
        inferred=("its tokenizer has a BOS, which its code puts before the question",
                  "steps are averaged"),
    )  # fmt: skip


RECORDS: tuple[Record, ...] = (
    _qwen("Qwen2.5-Math-PRM-7B", "Qwen2.5-Math-7B-Instruct", QWEN_2_5_7B),
    _qwen("Qwen2.5-Math-PRM-72B", "Qwen2.5-Math-72B-Instruct", QWEN_2_5_72B),
    _qwen("Qwen2.5-Math-7B-PRM800K", "Qwen2.5-Math-7B-Instruct", QWEN_2_5_7B),
    _skywork("1.5B", QWEN_2_5_1_5B),
    _skywork("7B", QWEN_2_5_7B),
    Record(
        name="peiyi9979/math-shepherd-mistral-7b-prm",
        architecture="MistralForCausalLM",
        shape=MISTRAL_7B,
        kind=_KIND,
        prompt_format="math-shepherd",
        summary="P(the step is right), the tokens + and - after the mark ки",
        group=_GROUP,
        policy="peiyi9979/mistral-7b-sft",
        head_labels=2,
        steps="math-shepherd",
    ),
)

POLICIES: dict[str, Shape] = {
    "Qwen/Qwen2.5-Math-1.5B-Instruct": QWEN_2_5_1_5B,
    "Qwen/Qwen2.5-Math-7B-Instruct": QWEN_2_5_7B,
    "Qwen/Qwen2.5-Math-72B-Instruct": QWEN_2_5_72B,
    "peiyi9979/mistral-7b-sft": MISTRAL_7B,
}
