"""Critics of reasoning policies: Open-Reasoner-Zero's and the one of value-guided search."""

from guided_decode.checkpoints.record import Record
from guided_decode.checkpoints.shape import (
    QWEN_2_5_1_5B,
    QWEN_2_5_7B,
    QWEN_2_5_32B,
    QWEN_2_5_HALF_B,
    R1_QWEN_1_5B,
    Shape,
)

_ORZ, _ORZ_FORMAT = "Open-Reasoner-Zero", "open-reasoner-zero"
# The sampling settings of its training code, which keeps the string in the response.
_ORZ_STOP = ("User:", "Human:", "Assistant:", "</answer>")
_ORZ_INFERRED = (
    "the head is called value_head, as in the OpenRLHF of its time, from which its code comes",
    "the prompt says \\boxed{}, as the paper does; a copy of the training code has \\b in a Python "
    "string there, a backspace",
)
_VGS_POLICY = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


def _orz(size: str, shape: Shape) -> tuple[Record, Record]:
    """The policy and the critic of one run; gamma = lambda = 1, reward at the last token."""
    policy = f"Open-Reasoner-Zero/Open-Reasoner-Zero-{size}"
    critic = Record(
        name=f"Open-Reasoner-Zero/Open-Reasoner-Zero-Critic-{size}",
        architecture="CriticModel",
        shape=shape,
        kind="value-head",
        prompt_format=_ORZ_FORMAT,
        summary="critic of a PPO run on a base model: P(the answer is right)",
        group=_ORZ,
        policy=policy,
        stop=_ORZ_STOP,
        inferred=_ORZ_INFERRED,
    )
    decoded = Record(
        name=policy,
        architecture="Qwen2ForCausalLM",
        shape=shape,
        kind=None,
        prompt_format=_ORZ_FORMAT,
        summary="policy of a PPO run on a base model",
        group=_ORZ,
        stop=_ORZ_STOP,
    )
    return decoded, critic


RECORDS: tuple[Record, ...] = (
    *_orz("0.5B", QWEN_2_5_HALF_B),
    *_orz("1.5B", QWEN_2_5_1_5B),
    *_orz("7B", QWEN_2_5_7B),
    *_orz("32B", QWEN_2_5_32B),
    Record(
        name="VGS-AI/DeepSeek-VM-1.5B",
        architecture="Qwen2ForClassifier",
        shape=R1_QWEN_1_5B,
        kind="classifier",
        prompt_format="deepseek-r1-math",
        summary="value model of value-guided search: P(the answer is right), class 1 of three",
        group="Value-guided search",
        policy=_VGS_POLICY,
        head_labels=3,
        inner_head=True,
        inferred=(
            "the prompt's request for \\boxed{} and <think>, from code that was written for it",
        ),
    ),
)

POLICIES: dict[str, Shape] = {_VGS_POLICY: R1_QWEN_1_5B}
