"""Checkpoint families: the conventions of each kind of trainer, as data."""

from dataclasses import dataclass, replace
from typing import Literal

from guided_decode.scorer import TerminalRule
from guided_decode.scoring.transforms import Identity, Sigmoid, SoftmaxClass, Transform

# "keep" and "drop" speak of one leading BOS of the prefix; "policy" is whatever the policy sees.
BosRule = Literal["keep", "drop", "policy"]
# "token": each token's output is a value. "eos": the output at the EOS of a finished response is
# the score; a partial response is read at its last token. "step": the outputs at the marks that end
# a response's steps are scores.
ReadPosition = Literal["token", "eos", "step"]

BOS_RULES: tuple[BosRule, ...] = ("keep", "drop", "policy")
TERMINAL_RULES: tuple[TerminalRule, ...] = ("baseline", "reward", "critic", "included")


@dataclass(frozen=True, slots=True)
class Rope:
    """A rope_theta that a converter wrote where another one is right."""

    wrong: float
    right: float


@dataclass(frozen=True, slots=True)
class Family:
    """What a kind of checkpoint needs to be read as its trainer read it.

    kind: the name that `load_scorer(kind=...)` takes.
    trainers: whose checkpoints these are.
    architectures: endings of the class name that its config may have; empty where any may.
    heads: modules that may hold the head's weight and bias, in the order they are looked for;
        empty where the language-model head is read.
    head_field: a config field that names the head's module, looked for before `heads`.
    transforms: the value transform for each number of labels that is allowed.
    normalise_field: a config field under which the trainer gives (output − mean) / std, with the
        config's own mean and std.
    evidence: endings of class names that only this kind's trainers write, for kind "auto".
    inner_activation: what stands between two layers of a head whose module has a list of them; ""
        where no trainer has such a head.
    eos_classes: endings of class names that say that the checkpoint is read at EOS, as a reward
        model is: such a one has terminal rule "critic" under this kind, too.
    biasless: heads that have no bias in the trainer, though the Hugging Face class may.
    head_apart: the model is the policy, and its head comes apart from it (`load_scorer(head=)`).
    rope_defect: a known wrong conversion of rope_theta.
    prompt_format: the format of `prompts.FORMATS`; None is the tokenizer's own chat template.
    """

    kind: str
    trainers: str
    architectures: tuple[str, ...]
    heads: tuple[str, ...]
    bos: BosRule
    terminal: TerminalRule
    transforms: tuple[tuple[int, Transform], ...] = ((1, Identity()),)
    read: ReadPosition = "token"
    head_field: str | None = None
    normalise_field: str | None = None
    evidence: tuple[str, ...] = ()
    eos_classes: tuple[str, ...] = ()
    biasless: tuple[str, ...] = ()
    inner_activation: str = ""
    head_apart: bool = False
    rope_defect: Rope | None = None
    prompt_format: str | None = None
    defects: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[int, ...]:
        """The numbers of labels that a head of this kind may have."""
        return tuple(labels for labels, _ in self.transforms)

    @property
    def by_steps(self) -> bool:
        """Whether it reads steps of responses (`checkpoints.steps`), not tokens."""
        return self.read == "step"

    @property
    def bias_must_be_zero(self) -> bool:
        """Whether the trainer's own head has no bias."""
        return bool(self.biasless)

    def of_class(self, architecture: str) -> "Family":
        """The conventions of a checkpoint of that class: read at EOS where its name says so."""
        if self.eos_classes and architecture.endswith(self.eos_classes):
            return replace(self, read="eos", terminal="critic")
        return self

    def transform_of(self, labels: int) -> Transform:
        """The transform for a head with that many labels. Raises ValueError where none is."""
        for allowed, transform in self.transforms:
            if allowed == labels:
                return transform
        raise ValueError(
            f"a head with {labels} labels: {self.kind} expects {_either(self.labels)}; "
            "pass the kind that it was trained as, or a checkpoint with such a head"
        )

    def takes(self, architecture: str) -> bool:
        """Whether a checkpoint of that class may be of this kind."""
        return not self.architectures or architecture.endswith(self.architectures)


def _either(numbers: tuple[int, ...]) -> str:
    return " or ".join(str(number) for number in numbers)


_TOKEN = ("ForTokenClassification",)
_SEQUENCE = ("ForSequenceClassification",)
# GPT-2 and others of its time have a class of their own name.
_CAUSAL_LM = ("ForCausalLM", "LMHeadModel")
# OpenRLHF's classes; older versions have the first name.
_REWARDS = ("ForSequenceRegression", "RewardModel")

_RECORDS = (
    Family(
        kind="ppo-critic",
        trainers="EasyLM PPO (Tulu 2.5)",
        architectures=_TOKEN,
        heads=("score",),
        bos="drop",
        terminal="baseline",
        biasless=("score",),
        rope_defect=Rope(wrong=100_000.0, right=10_000.0),
        prompt_format="tulu-2",
        defects=(
            "score.bias exists in the Hugging Face class but not in the trainer: it must be zero",
            "one version of the converter wrote rope_theta 100000 for Llama-2 sizes",
            "the tokenizer's pad_token is null",
        ),
    ),
    Family(
        kind="verl-critic",
        trainers="verl, RL2",
        architectures=_TOKEN,
        heads=("score",),
        bos="keep",
        terminal="baseline",
    ),
    Family(
        kind="value-head",
        trainers="TRL and LLaMA-Factory (v_head.summary), OpenRLHF (score, value_head), "
        "DeepSpeed-Chat (v_head)",
        architectures=(),
        heads=("v_head.summary", "value_head", "score", "v_head"),
        evidence=("CriticModel",),
        eos_classes=_REWARDS,
        head_field="value_head_prefix",
        normalise_field="normalize_reward",
        bos="keep",
        terminal="baseline",
    ),
    Family(
        kind="classifier",
        trainers="VGS (three labels, class 1), or one label as a logit",
        architectures=(*_TOKEN, *_SEQUENCE, "ForClassifier"),
        heads=("score", "classifier"),
        bos="keep",
        terminal="critic",
        transforms=((3, SoftmaxClass(1)), (1, Sigmoid())),
        evidence=("ForClassifier",),
        inner_activation="relu",
    ),
    Family(
        kind="process-reward",
        trainers="Qwen2.5-Math-PRM, Skywork-o1-Open-PRM, Math-Shepherd, TRL: two labels, a logit, "
        "or two tokens, at the end of each step",
        architectures=("ForProcessRewardModel", "ForPrmModel", *_TOKEN, *_CAUSAL_LM),
        heads=("score", "v_head.summary"),
        bos="keep",
        terminal="critic",
        transforms=((2, SoftmaxClass(1)), (1, Sigmoid())),
        evidence=("ForProcessRewardModel", "ForPrmModel"),
        inner_activation="relu",
        read="step",
    ),
    Family(
        kind="reward-model",
        trainers="open-instruct, TRL, OpenRLHF, LLaMA-Factory and others: one label, read at EOS",
        architectures=(*_SEQUENCE, *_REWARDS, *_CAUSAL_LM),
        heads=("score", "v_head.summary", "value_head", "v_head"),
        head_field="value_head_prefix",
        normalise_field="normalize_reward",
        evidence=_REWARDS,
        bos="keep",
        terminal="critic",
        read="eos",
        biasless=("score",),
    ),
    Family(
        kind="implicit",
        trainers="DPO, KTO: log π* − log π_ref of a pair of causal LMs",
        architectures=_CAUSAL_LM,
        heads=(),
        bos="policy",
        terminal="included",
    ),
    Family(
        kind="trunk-head",
        trainers="recipes.trunk_head, or a value head trained on the policy's own hidden states",
        architectures=_CAUSAL_LM,
        heads=("head",),
        head_apart=True,
        bos="policy",
        terminal="baseline",
    ),
)

FAMILIES: dict[str, Family] = {family.kind: family for family in _RECORDS}


def find_family(kind: str) -> Family:
    """The family of a kind. Raises ValueError for an unknown one."""
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(FAMILIES)}, or auto")
    return FAMILIES[kind]
