"""Known checkpoints: what each is, what it needs, and the policy that it pairs with."""

from dataclasses import dataclass
from pathlib import Path

from guided_decode.checkpoints.shape import (
    LLAMA_2_7B,
    LLAMA_2_13B,
    LLAMA_2_70B,
    LLAMA_3_8B,
    LLAMA_3_70B,
    MISTRAL_7B,
    TINY,
    TULU_3_8B,
    Shape,
)
from guided_decode.tiny_tulu import model_path

# The policy's tokenizer has a chat template of its own, which no format of `prompts` is.
POLICY_TEMPLATE = "chat template"


@dataclass(frozen=True, slots=True)
class Record:
    """One known checkpoint.

    name: its id on the Hub, or the name of a model that is part of this package.
    architecture: the class that its config names.
    kind: the family of `families.FAMILIES`; None for a policy that is only decoded.
    prompt_format: the name of a format of `prompts.FORMATS`.
    policy: whose decoding it guides best; reference: of an implicit reward.
    policy_format: how that policy is prompted, where it is not by `prompt_format`: the name of a
        format, or `POLICY_TEMPLATE`.
    assets: which model of this package it is; None for one of the Hub's.
    """

    name: str
    architecture: str
    shape: Shape
    kind: str | None
    prompt_format: str
    summary: str
    policy: str | None = None
    reference: str | None = None
    policy_format: str | None = None
    defects: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    assets: str | None = None

    @property
    def location(self) -> str:
        """What `from_pretrained` takes: the Hub id, or a path inside this package."""
        return self.name if self.assets is None else str(model_path(self.assets))

    @property
    def one_format(self) -> bool:
        """Whether its policy is prompted in the format that it was trained on itself."""
        return self.policy_format in (None, self.prompt_format)

    @property
    def is_causal_lm(self) -> bool:
        """Whether it has a language-model head, not one with a single label."""
        return self.architecture.endswith("ForCausalLM")

    @property
    def labels(self) -> int:
        """Of its value head; 0 without one."""
        return 0 if self.is_causal_lm else 1

    @property
    def head_bias(self) -> bool:
        """Whether its class has a bias in that head."""
        return self.architecture.endswith("ForTokenClassification")

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in bfloat16."""
        return 2 * self.shape.parameters(
            lm_head=self.is_causal_lm, labels=self.labels, head_bias=self.head_bias
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that `find` knows it by."""
        ids = (self.name, *self.aliases)
        return (*ids, *(one.rpartition("/")[2] for one in ids))


_EASYLM_DEFECTS = ("rope_theta 100000 in one converter's output; 10000 is right for Llama 2",)


def _tulu_critic(name: str, policy: str, shape: Shape, aliases: tuple[str, ...] = ()) -> Record:
    return Record(
        name=name,
        architecture="LlamaForTokenClassification",
        shape=shape,
        kind="ppo-critic",
        prompt_format="tulu-2",
        summary="value model of a Tulu 2.5 PPO run (EasyLM)",
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
        policy=policy,
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
        policy="tiny-tulu-ppo" if critic else None,
        reference=reference,
        assets=part,
    )


REGISTRY: tuple[Record, ...] = (
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
    Record(
        name="allenai/tulu-2-dpo-70b",
        architecture="LlamaForCausalLM",
        shape=LLAMA_2_70B,
        kind="implicit",
        prompt_format="tulu-2",
        summary="DPO policy; implicit reward against its SFT model",
        policy="allenai/tulu-2-13b",
        reference="allenai/tulu-2-70b",
    ),
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
        policy="mistralai/Mistral-7B-Instruct-v0.2",
        reference="mistralai/Mistral-7B-Instruct-v0.2",
        # Trained on Tulu's turns, from a policy that knows [INST] ... [/INST].
        policy_format=POLICY_TEMPLATE,
    ),
    _tiny("sft", None, "SFT policy and reference, part of this package"),
    _tiny("ppo", "implicit", "PPO policy, part of this package", reference="tiny-tulu-sft"),
    _tiny("value", "ppo-critic", "value model of the tiny-tulu PPO run, part of this package"),
)

# Causal LMs that the records above speak of and that are no scorers: their policies and references.
POLICIES: dict[str, Shape] = {
    "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm": LLAMA_2_13B,
    "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-uf-rm": LLAMA_2_13B,
    "allenai/tulu-v2.5-ppo-13b-uf-mean-13b-mix-rm": LLAMA_2_13B,
    "allenai/tulu-v2.5-ppo-13b-uf-mean": LLAMA_2_13B,
    "hamishivi/tulu-v2.5-7b-uf-mean-7b-uf-rm": LLAMA_2_7B,
    "allenai/tulu-2-13b": LLAMA_2_13B,
    "allenai/tulu-2-70b": LLAMA_2_70B,
    "allenai/llama-3.1-tulu-2-70b": LLAMA_3_70B,
    "allenai/llama-3.1-tulu-2-8b": LLAMA_3_8B,
    "allenai/Llama-3.1-Tulu-3-8B": TULU_3_8B,
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL_7B,
}


def find(name_or_path: str | Path) -> Record | None:
    """The record of a Hub id, a bare name, or a local folder whose last component is the name.

    Another owner's repository of the same name is not the checkpoint.
    """
    given, path = str(name_or_path), Path(name_or_path)
    known_as = {given, path.name} if path.is_dir() else {given}
    return next((record for record in REGISTRY if known_as & set(record.names)), None)
