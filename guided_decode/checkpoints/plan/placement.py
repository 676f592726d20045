"""A plan: which ways of running a policy with its scorer fit a card, and how fast a step can be."""

from __future__ import annotations

from dataclasses import dataclass, replace

from guided_decode.checkpoints.plan.cards import Card
from guided_decode.checkpoints.plan.floor import policy_bytes, scorer_bytes, unpacked_bytes
from guided_decode.checkpoints.plan.footprint import Workload
from guided_decode.checkpoints.plan.model import PlannedModel
from guided_decode.checkpoints.plan.named import planned_policy, planned_scorer
from guided_decode.checkpoints.plan.ways import (
    Gpu,
    Pair,
    Way,
    usable,
    ways_of,
)
from guided_decode.checkpoints.plan.weight_forms import (
    USUAL,
    WeightForm,
    find_form,
)


@dataclass(frozen=True, slots=True)
class Placement:
    """A way with what it takes.

    gpus: what each GPU holds. rows: the largest batch that fits, 0 where not even one row does.
    seconds: the floor of a guided step; unpacked_seconds: where the library unpacks each matrix in
    memory first; None: it does not, or the card's bandwidth is not known.
    """

    way: Way
    gpus: tuple[Gpu, ...]
    fits: bool
    rows: int
    seconds: float | None
    unpacked_seconds: float | None

    @property
    def fullest(self) -> Gpu:
        """The GPU that holds most."""
        return max(self.gpus, key=lambda gpu: gpu.bytes)


@dataclass(frozen=True, slots=True)
class Plan:
    """What fits where.

    kind: of the scorer. plain_seconds: the floor of a step of the policy alone.
    take: the way to take, None where nothing fits; enough: whether the GPUs that there are suffice
    for it. smallest: the way on one machine that does with the smallest cards.
    given_kind, given_reference: what the caller said of the scorer, for commands.
    """

    kind: str
    pair: Pair
    work: Workload
    card: Card
    gpus: int
    placements: tuple[Placement, ...]
    plain_seconds: float | None
    take: Placement | None
    enough: bool
    smallest: Placement
    given_kind: str | None = None
    given_reference: str | None = None

    @property
    def policy_name(self) -> str:
        return self.pair.policy.name

    @property
    def scorer_name(self) -> str:
        return self.pair.scorer[0].name

    @property
    def usable(self) -> int:
        return usable(self.card)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd about the models."""
        policy, scorer = self.pair.policy, self.pair.scorer
        found = [model.note for model in (policy, *scorer) if model.note is not None]
        found += [
            f"{model.name} reads {model.positions:,} tokens at most, and the rows have "
            f"{self.work.length:,}"
            for model in (policy, *scorer)
            if model.positions is not None and model.positions < self.work.length
        ]
        vocabularies = sorted({model.shape.vocab for model in (policy, *scorer)})
        if len(vocabularies) > 1:
            sizes = " and ".join(f"{size:,}" for size in vocabularies)
            found.append(
                f"the vocabularies have {sizes} tokens: load_scorer compares them and refuses a "
                "scorer whose token ids are not the policy's"
            )
        return tuple(found)


def make_plan(
    policy: str,
    scorer: str,
    card: Card,
    work: Workload,
    *,
    gpus: int = 1,
    quantization: str | None = None,
    kind: str | None = None,
    reference: str | None = None,
) -> Plan:
    """The plan of a policy and a scorer by their names; nothing is loaded or fetched.

    Args:
        policy, scorer: registered names, folders or config.json files.
        card: what each GPU is.
        work: what is decoded at once.
        gpus: how many of it one machine has.
        quantization: the form of the scorer to consider; None considers the usual ones.
        kind, reference: as `load_scorer` takes them.

    Raises ValueError: as `planned_scorer`, no GPU, an unknown quantization, or one for a scorer
    that is quantised already.
    """
    if gpus < 1:
        raise ValueError(f"gpus={gpus}: expected at least 1")
    found, models = planned_scorer(scorer, kind, reference)
    pair = Pair(planned_policy(policy), models)
    plan = plan_of(found, pair, card, work, gpus=gpus, forms=_forms(models, quantization))
    return replace(plan, given_kind=kind, given_reference=reference)


def plan_of(
    kind: str,
    pair: Pair,
    card: Card,
    work: Workload,
    *,
    gpus: int = 1,
    forms: tuple[WeightForm, ...] = USUAL,
) -> Plan:
    """The same of models whose sizes are known. forms: as `ways_of` takes them."""
    placements = [_placed(way, pair, work, card) for way in ways_of(pair, work, card, forms)]
    take, enough = _best(placements, gpus)
    here = [one for one in placements if not one.way.elsewhere]
    own = pair.policy_shards(work, card)
    plain = card.bandwidth and policy_bytes(pair.policy, work, own) / card.bandwidth
    return Plan(
        kind=kind,
        pair=pair,
        work=work,
        card=card,
        gpus=gpus,
        placements=tuple(placements),
        plain_seconds=plain,
        take=take,
        enough=enough,
        smallest=min(here, key=lambda one: (one.fullest.bytes, one.way.total)),
    )


def _best(placements: list[Placement], gpus: int) -> tuple[Placement | None, bool]:
    """The way to take, and whether `gpus` on one machine are enough for it.

    Among ways for which they are, the most precise, on the fewest GPUs, the fastest; else the one
    with the fewest GPUs in all.
    """
    fitting = [one for one in placements if one.fits]
    enough = [one for one in fitting if not one.way.elsewhere and one.way.here <= gpus]
    if enough:
        return min(enough, key=lambda one: (*_loss_and_gpus(one), one.seconds or 0)), True
    return min(fitting, key=lambda one: (*_loss_and_gpus(one)[::-1], one.way.elsewhere,
                                         one.seconds or 0), default=None), False  # fmt: skip


def _loss_and_gpus(placement: Placement) -> tuple[float, int]:
    return -placement.way.form.bits, placement.way.total


def _placed(way: Way, pair: Pair, work: Workload, card: Card) -> Placement:
    seconds = unpacked = None
    if card.bandwidth is not None:
        # The scorer scores what the policy has proposed: one after the other.
        read = policy_bytes(pair.policy, work, way.policy_shards)
        read += scorer_bytes(pair.scorer, work, way.form, way.shards)
        seconds = read / card.bandwidth
        beside = unpacked_bytes(pair.scorer, way.form, way.shards)
        unpacked = (read + beside) / card.bandwidth if beside else None
    rows = pair.most_rows(way, work, card)
    gpus = pair.gpus(way, work)
    return Placement(way, gpus, pair.fits(way, work, card), rows, seconds, unpacked)


def _forms(models: tuple[PlannedModel, ...], given: str | None) -> tuple[WeightForm, ...]:
    stored = next((model for model in models if model.stored is not None), None)
    if stored is not None and given is not None:
        raise ValueError(
            f"{stored.name} is quantised already ({stored.stored}) and came with "
            f"quantization={given!r}: expected no other; leave quantization= out"
        )
    if stored is not None:
        return ()
    return USUAL if given is None else (find_form(given),)
