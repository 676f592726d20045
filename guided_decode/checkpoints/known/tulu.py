"""The Tulu and Contextual AI checkpoints, and the small ones of this package in their format."""

from guided_decode.checkpoints.record import CHAT_TEMPLATE, Record
from guided_decode.checkpoints.shape import (
    LLAMA_2_7B,
    LLAMA_2_13B,
    LLAMA_2_70B,
    LLAMA_3_8B,
    LLAMA_3_70B,
    MISTRAL_7B,
    TINY,
    TINY_LISTS,
    TULU_3_8B,
    Shape,
)

_GROUP = "Tulu"
_EASYLM_DEFECTS = ("rope_theta 100000 in one converter's output; 10000 is right for Llama 2",)


def _tulu_critic(name: str, policy: str, shape: Shape, aliases: tuple[str, ...] = ()) -> Record:
    return Record(
        name=name,
        architecture="LlamaForTokenClassification",
        shape=shape,
        kind="ppo-critic",
        prompt_format="tulu-2",
        summary="value model of a Tulu 2.5 PPO run (EasyLM)",
        group=_GROUP,
        policy=policy,
        defects=_EASYLM_DEFECTS,
        aliases=aliases,
    )


def _reward_model(name: str, policy: str, shape: Shape, prompt_format: str, of: str) -> Record:
    return Record(
        name=name,
        architecture="LlamaForSequenceClassification",
        shape=shape,
        kind="reward-model",
        prompt_format=prompt_format,
        summary=f"{of} reward model, read at EOS",
        group=_GROUP,
        policy=policy,
    )


def _dpo(size: str, shape: Shape, policy: str) -> Record:
    return Record(
        name=f"allenai/tulu-2-dpo-{size}",
        architecture="LlamaForCausalLM",
        shape=shape,
        kind="implicit",
        prompt_format="tulu-2",
        summary="DPO policy; implicit reward against its SFT model",
        group=_GROUP,
        policy=policy,
        reference=f"allenai/tulu-2-{size}",
    )


def _tiny(part: str, kind: str | None, summary: str, reference: str | None = None) -> Record:
    critic = part == "value"
    return Record(
        name=f"tiny-tulu-{part}",
        architecture=f"LlamaFor{'TokenClassification' if critic else 'CausalLM'}",
        shape=TINY,
        kind=kind,
        # The last turn ends at EOS with no newline after it, as Tulu 3's does.
        prompt_format="tulu-3",
        summary=summary,
        group="tiny-tulu",
        policy="tiny-tulu-ppo" if critic else None,
        reference=reference,
        assets=part,
    )


def _tiny_list(
    name: str, part: str, kind: str | None, summary: str, reference: str | None = None
) -> Record:
    policy = "tiny-tulu-lists-sft"
    return Record(
        name=name,
        architecture=f"LlamaFor{'SequenceClassification' if part == 'reward' else 'CausalLM'}",
        shape=TINY_LISTS,
        kind=kind,
        prompt_format="tulu-3",
        summary=f"{summary}, part of this package",
        group="tiny-tulu",
        policy=None if name == policy else policy,
        reference=reference,
        assets=f"lists/{part}",
    )


RECORDS: tuple[Record, ...] = (
    # A value model starts from its reward model and has that one's size, not the policy's.
    _tulu_critic(
        "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm-value",
        "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm",
        LLAMA_2_70B,
    ),
    _tulu_critic(
        "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-uf-rm-value",
        "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-uf-rm",
        LLAMA_2_70B,
    ),
    _tulu_critic(
        "allenai/tulu-v2.5-ppo-13b-uf-mean-13b-mix-rm-value",
        "allenai/tulu-v2.5-ppo-13b-uf-mean-13b-mix-rm",
        LLAMA_2_13B,
    ),
    _tulu_critic(
        "allenai/tulu-v2.5-ppo-13b-uf-mean-13b-uf-rm-value",
        "allenai/tulu-v2.5-ppo-13b-uf-mean",
        LLAMA_2_13B,
    ),
    _tulu_critic(
        "hamishivi/tulu-v2.5-7b-uf-mean-7b-uf-rm-value",
        "hamishivi/tulu-v2.5-7b-uf-mean-7b-uf-rm",
        LLAMA_2_7B,
        aliases=("hamishivi/tulu-v2.5-7b-uf-rm-value",),
    ),
    _dpo("70b", LLAMA_2_70B, "allenai/tulu-2-13b"),
    _dpo("7b", LLAMA_2_7B, "allenai/tulu-2-dpo-70b"),
    _dpo("13b", LLAMA_2_13B, "allenai/tulu-2-dpo-70b"),
    _reward_model(
        "allenai/llama-3.1-tulu-2-70b-uf-mean-rm",
        "allenai/llama-3.1-tulu-2-70b",
        LLAMA_3_70B,
        "tulu-2",
        "UltraFeedback",
    ),
    _reward_model(
        "allenai/llama-3.1-tulu-2-8b-uf-mean-rm",
        "allenai/llama-3.1-tulu-2-8b",
        LLAMA_3_8B,
        "tulu-2",
        "UltraFeedback",
    ),
    _reward_model(
        "allenai/Llama-3.1-Tulu-3-8B-RM",
        "allenai/Llama-3.1-Tulu-3-8B",
        TULU_3_8B,
        "tulu-3",
        "Tulu 3",
    ),
    Record(
        name="ContextualAI/Contextual_KTO_Mistral_PairRM",
        architecture="MistralForCausalLM",
        shape=MISTRAL_7B,
        kind="implicit",
        prompt_format="tulu-2",
        summary="KTO policy, third iteration; implicit reward against its base",
        group="Contextual AI",
        policy="mistralai/Mistral-7B-Instruct-v0.2",
        reference="mistralai/Mistral-7B-Instruct-v0.2",
        # Trained on Tulu's turns, from a policy that knows [INST] ... [/INST].
        policy_format=CHAT_TEMPLATE,
    ),
)

TINY_RECORDS: tuple[Record, ...] = (
    _tiny("sft", None, "SFT policy and reference, part of this package"),
    _tiny("ppo", "implicit", "PPO policy, part of this package", reference="tiny-tulu-sft"),
    _tiny("value", "ppo-critic", "value model of the tiny-tulu PPO run, part of this package"),
    _tiny_list("tiny-tulu-lists-sft", "sft", None, "SFT policy and reference of the lists task"),
    _tiny_list("tiny-tulu-reward", "reward", "reward-model", "reward model of the lists task"),
    _tiny_list(
        "tiny-tulu-dpo", "dpo", "implicit", "DPO policy of the lists task", "tiny-tulu-lists-sft"
    ),
    _tiny_list(
        "tiny-tulu-kto", "kto", "implicit", "KTO policy, third iteration", "tiny-tulu-lists-sft"
    ),
)

# Causal LMs that the records above speak of and that are no scorers: their policies and references.
POLICIES: dict[str, Shape] = {
    "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm": LLAMA_2_13B,
    "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-uf-rm": LLAMA_2_13B,
    "allenai/tulu-v2.5-ppo-13b-uf-mean-13b-mix-rm": LLAMA_2_13B,
    "allenai/tulu-v2.5-ppo-13b-uf-mean": LLAMA_2_13B,
    "hamishivi/tulu-v2.5-7b-uf-mean-7b-uf-rm": LLAMA_2_7B,
    "allenai/tulu-2-7b": LLAMA_2_7B,
    "allenai/tulu-2-13b": LLAMA_2_13B,
    "allenai/tulu-2-70b": LLAMA_2_70B,
    "allenai/llama-3.1-tulu-2-70b": LLAMA_3_70B,
    "allenai/llama-3.1-tulu-2-8b": LLAMA_3_8B,
    "allenai/Llama-3.1-Tulu-3-8B": TULU_3_8B,
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL_7B,
}
