"""What is known of one checkpoint, as data."""

from __future__ import annotations

from dataclasses import dataclass

from guided_decode.checkpoints.shape import Shape

# The tokenizer's own chat template, which no format of `prompts` is.
CHAT_TEMPLATE = "chat template"


@dataclass(frozen=True, slots=True)
class Record:
    """One known checkpoint.

    name: its id on the Hub, or the name of a model that is part of this package.
    architecture: the class that its config names.
    kind: the family of `families.FAMILIES`; None for a policy that is only decoded.
    prompt_format: the name of a format of `prompts.FORMATS`, or `CHAT_TEMPLATE`.
    group: under which it is listed.
    policy: whose decoding it guides best; reference: of an implicit reward.
    policy_format: how that policy is prompted, where it is not by `prompt_format`: the name of a
        format, or `CHAT_TEMPLATE`.
    head_labels: of its value head, where it has one. inner_head: whether that has a layer before
        the last one, as wide as the trunk. biased: whether it has biases that its class alone
        does not say.
    turn_end: text between EOS and the token at which a finished response is read; "" is EOS itself.
    steps: of a process reward model, the name of its `steps.STEP_FORMATS`.
    stop: strings that end a response of its policy, beside EOS.
    defects: what is known to be wrong with its files. inferred: what no published code or card
        says, and was concluded.
    assets: which model of this package, or of one that an extra brings, it is, of `embedded`; None
        for one of the Hub's.
    """

    name: str
    architecture: str
    shape: Shape
    kind: str | None
    prompt_format: str
    summary: str
    group: str
    policy: str | None = None
    reference: str | None = None
    policy_format: str | None = None
    head_labels: int = 1
    inner_head: bool = False
    biased: bool = False
    turn_end: str = ""
    steps: str | None = None
    stop: tuple[str, ...] = ()
    defects: tuple[str, ...] = ()
    inferred: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    assets: str | None = None

    @property
    def location(self) -> str:
        """What `from_pretrained` takes: the Hub id, or a folder on this machine.

        Raises ImportError: the package that brings it is not installed.
        """
        if self.assets is None:
            return self.name
        # What makes a folder imports a model's classes.
        from guided_decode.checkpoints.embedded import embedded_folder

        return str(embedded_folder(self.assets))

    @property
    def one_format(self) -> bool:
        """Whether its policy is prompted in the format that it was trained on itself."""
        return self.policy_format in (None, self.prompt_format)

    @property
    def is_causal_lm(self) -> bool:
        """Whether it has a language-model head, not one with labels."""
        return self.architecture.endswith("ForCausalLM")

    @property
    def labels(self) -> int:
        """Of its value head; 0 without one."""
        return 0 if self.is_causal_lm else self.head_labels

    @property
    def head_bias(self) -> bool:
        """Whether its class has a bias in that head."""
        return self.architecture.endswith("ForTokenClassification") or self.biased

    @property
    def inner_weights(self) -> int:
        """Weights of the head's inner layer."""
        hidden = self.shape.hidden
        return self.inner_head * hidden * (hidden + self.biased)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in bfloat16."""
        known = self.shape.parameters(
            lm_head=self.is_causal_lm, labels=self.labels, head_bias=self.head_bias
        )
        return 2 * (known + self.inner_weights)

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that `find` knows it by."""
        ids = (self.name, *self.aliases)
        return (*ids, *(one.rpartition("/")[2] for one in ids))
