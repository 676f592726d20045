"""How a checkpoint that is served elsewhere is read: by its config and tokenizer alone."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from transformers import PreTrainedModel

from guided_decode.checkpoints.config_checks import settle_rope
from guided_decode.checkpoints.families import BosRule, Family
from guided_decode.checkpoints.head import choose_transform
from guided_decode.checkpoints.kinds import choose_family
from guided_decode.checkpoints.registry import Record, find, location_of
from guided_decode.checkpoints.source import Source, read_config
from guided_decode.checkpoints.special_ids import conventions, turn_end_of
from guided_decode.checkpoints.tokenizer_files import tokenizer_beside
from guided_decode.scorer import TerminalRule
from guided_decode.scoring.transforms import Transform, parse_transform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A server of whole models reads a head that is called "score", of these classes.
_SERVED = ("ForTokenClassification", "ForSequenceClassification")


@dataclass(frozen=True, slots=True)
class Described:
    """What is known of a critic or reward model without its weights.

    skip_token: BOS, where a leading one is dropped. eos_token_id: where finished responses are
    read, or at the last of turn_end, which follows it. vocab_size: ids from here on have no
    embedding. labels: of its head. tokenizer: None where the checkpoint has none. record: its entry
    in the registry, if it has one.
    """

    name: str
    family: Family
    transform: Transform
    labels: int
    vocab_size: int
    skip_token: int | None
    bos_token_id: int | None
    eos_token_id: int | None
    turn_end: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase | None
    record: Record | None

    @property
    def prompt_format(self) -> str | None:
        """The name of its prompt format; None is the tokenizer's own chat template."""
        return self.family.prompt_format if self.record is None else self.record.prompt_format


def describe(
    name: str,
    kind: str = "auto",
    *,
    bos: BosRule | None = None,
    terminal: TerminalRule | None = None,
    transform: str | Transform | None = None,
    rope_theta: float | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Described:
    """The conventions of a checkpoint that a server serves as it is.

    Args:
        name: a registered name, a Hub id or a local path: of it the config and the tokenizer are
            read. The others as of `load_scorer`; rope_theta is what the server was started with.

    Raises ValueError: there is no such checkpoint, no evidence of its kind, or a server that reads
        a head called "score" cannot read it as its trainer did.
    """
    location = location_of(name)
    try:
        config = read_config(name, location, revision, trust_remote_code)
    except ValueError as error:
        raise ValueError(f"{error}; it has to be the checkpoint that is served") from error
    architecture = (config.architectures or [""])[0]
    if not architecture.endswith(_SERVED):
        raise ValueError(
            f"{name} is a {architecture or 'model of no class'}: a pooling server reads classes "
            f"that end in {' or '.join(_SERVED)}, whose head is called score; score it on this "
            "machine, or serve it with guided-decode scorer"
        )
    record = find(name)
    source = Source(name, architecture, config, record, None, None, trust_remote_code)
    family = _family(source, kind, bos, terminal)
    settle_rope(name, config, family, rope_theta)
    wanted = None if transform is None else parse_transform(transform)
    labels = int(config.num_labels or 0)
    read = choose_transform(source, family, wanted, labels)
    tokenizer = tokenizer_beside(location, revision, trust_remote_code)
    # Of the model, special tokens are in its config.
    model = cast(PreTrainedModel, SimpleNamespace(config=config))
    known = conventions(family, tokenizer, model)
    return Described(
        name=name,
        family=family,
        transform=read,
        labels=labels,
        vocab_size=config.get_text_config().vocab_size,
        skip_token=known["skip_token"],
        bos_token_id=known["bos_token_id"],
        eos_token_id=known["eos_token_id"],
        turn_end=turn_end_of(record, family, tokenizer),
        tokenizer=tokenizer,
        record=record,
    )


def _family(
    source: Source, kind: str, bos: BosRule | None, terminal: TerminalRule | None
) -> Family:
    evident = source.record is not None or getattr(source.config, "guided_decode", None)
    one_score = source.architecture.endswith(_SERVED[1]) and source.config.num_labels == 1
    if kind == "auto" and not (evident or one_score):
        raise ValueError(
            f'{source.name} ({source.architecture}): kind="auto" has no evidence of what trained '
            "it; pass kind=, ppo-critic, verl-critic, classifier or reward-model, say"
        )
    family = choose_family(source, kind, bos=bos, terminal=terminal)
    if not family.heads or family.head_apart:
        raise ValueError(
            f"{source.name} was given as {family.kind}, which no pooling server serves: expected a "
            "critic or reward model; score it on this machine"
        )
    if not family.takes(source.architecture):
        raise ValueError(
            f"{source.name} is a {source.architecture}: {family.kind} expects a class that ends in "
            f"{' or '.join(family.architectures)}; pass the kind that it was trained as"
        )
    return family
