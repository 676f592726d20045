"""The ways to place a policy and its scorer on GPUs, and which of them fit a card."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from guided_decode.checkpoints.plan.cards import GIB, Card
from guided_decode.checkpoints.plan.footprint import Load, Workload, policy_load, scorer_load
from guided_decode.checkpoints.plan.model import PlannedModel
from guided_decode.checkpoints.plan.weight_forms import BF16, WeightForm

# Of a card; the rest is left to CUDA, to the framework and to fragments: vLLM's own default.
USABLE = 0.92
# What CUDA, NCCL and the framework take in a process that shares a card: assumed.
SECOND_PROCESS = GIB
# GPUs that a scorer is cut over.
SHARDS = (2, 4, 8)
# Of one machine.
MOST_GPUS = 8


class Place(StrEnum):
    """Where the scorer is."""

    ONE_GPU = "one-gpu"
    OWN_GPU = "own-gpu"
    TENSOR_PARALLEL = "tensor-parallel"
    SERVED = "served"


@dataclass(frozen=True, slots=True)
class Way:
    """One arrangement.

    form: of the scorer's matrices. shards: GPUs that the scorer is cut over; policy_shards: that
    the policy is, by vLLM. beside: whether the policy is on the scorer's GPUs, from the first.
    """

    place: Place
    form: WeightForm = BF16
    shards: int = 1
    policy_shards: int = 1
    beside: bool = False

    @property
    def here(self) -> int:
        """GPUs of the policy's machine."""
        return self.policy_shards if self.place is Place.SERVED else self.total

    @property
    def elsewhere(self) -> int:
        """GPUs of the scorer's machine, where that is another one."""
        return self.total - self.here

    @property
    def total(self) -> int:
        return (
            max(self.shards, self.policy_shards)
            if self.beside
            else (self.shards + self.policy_shards)
        )


@dataclass(frozen=True, slots=True)
class Gpu:
    """What lies on one GPU, or on each of several that are alike."""

    count: int
    policy: Load
    scorer: Load

    @property
    def bytes(self) -> int:
        return self.policy.total + self.scorer.total


@dataclass(frozen=True, slots=True)
class Pair:
    """The policy, and the models of its scorer: one, an implicit reward's two, or none."""

    policy: PlannedModel
    scorer: tuple[PlannedModel, ...]

    def gpus(self, way: Way, work: Workload) -> tuple[Gpu, ...]:
        """What each GPU holds; the policy's first."""
        policy = policy_load(self.policy, work, way.policy_shards)
        scorer = scorer_load(self.scorer, work, way.form, way.shards)
        if not way.beside:
            return Gpu(way.policy_shards, policy, Load()), Gpu(way.shards, Load(), scorer)
        assert way.shards >= way.policy_shards
        process = Load(activations=SECOND_PROCESS if way.shards > 1 else 0)
        shared = Gpu(way.policy_shards, policy, scorer + process)
        others = way.shards - way.policy_shards
        return (shared, Gpu(others, Load(), scorer)) if others else (shared,)

    def needs(self, way: Way, work: Workload) -> int:
        """Bytes of the fullest GPU."""
        return max(gpu.bytes for gpu in self.gpus(way, work))

    def fits(self, way: Way, work: Workload, card: Card) -> bool:
        return self.needs(way, work) <= usable(card)

    def most_rows(self, way: Way, work: Workload, card: Card) -> int:
        """The largest batch that fits; 0 where not even one row does."""
        fitting, beyond = 0, 1
        while self.fits(way, replace(work, batch=beyond), card):
            fitting, beyond = beyond, 2 * beyond
        while beyond - fitting > 1:
            middle = (fitting + beyond) // 2
            if self.fits(way, replace(work, batch=middle), card):
                fitting = middle
            else:
                beyond = middle
        return fitting

    def scorer_shards(self) -> tuple[int, ...]:
        """The numbers of GPUs that the scorer can be cut over; none where it is quantised."""
        if any(model.stored is not None for model in self.scorer):
            return ()
        # Of transformers' output layers, unlike vLLM's, no rank has a part that is padded.
        vocabularies = [model.shape.vocab for model in self.scorer if model.lm_head]
        return tuple(
            n
            for n in SHARDS
            if all(model.divides(n) for model in self.scorer)
            and all(vocab % n == 0 for vocab in vocabularies)
        )

    def policy_shards(self, work: Workload, card: Card) -> int:
        """The GPUs that the policy takes by itself; the most that it divides by where none do."""
        counts = [n for n in (1, *SHARDS) if n == 1 or self.policy.divides(n)]
        fitting = (n for n in counts if policy_load(self.policy, work, n).total <= usable(card))
        return next(fitting, counts[-1])


def usable(card: Card) -> int:
    """Bytes of a card that weights, caches and activations may take."""
    return int(USABLE * card.bytes)


def card_for(needed: int) -> int:
    """Bytes of the smallest card on which so many are usable."""
    return -int(-needed // USABLE)


def ways_of(
    pair: Pair, work: Workload, card: Card, forms: tuple[WeightForm, ...]
) -> tuple[Way, ...]:
    """The ways worth showing.

    All forms on one GPU. Of a second GPU, of tensor parallelism and of another machine the most
    precise that fits, else the smallest.

    forms: of the scorer's matrices beside bfloat16, the more precise one first.
    """
    every = (BF16, *forms)
    own = pair.policy_shards(work, card)

    def first(ways: Iterable[Way]) -> list[Way]:
        listed = list(ways)
        fitting = (way for way in listed if pair.fits(way, work, card))
        return [next(fitting, listed[-1])] if listed else []

    one = [Way(Place.ONE_GPU, form, beside=True) for form in every]
    two = first(Way(Place.OWN_GPU, form, policy_shards=own) for form in every if own < MOST_GPUS)
    sharded: list[Way] = []
    for count in pair.scorer_shards():
        # Eight only where it takes them.
        if count == SHARDS[-1] and any(pair.fits(way, work, card) for way in sharded):
            continue
        cut = Way(Place.TENSOR_PARALLEL, shards=count, policy_shards=own)
        # A policy that is cut itself is cut over all of the scorer's GPUs, or has its own.
        beside = replace(cut, policy_shards=own if own == 1 else count, beside=True)
        both = ([beside] if own <= count else []) + ([cut] if cut.total <= MOST_GPUS else [])
        sharded += first(both)
    served = [Way(Place.SERVED, form, policy_shards=own) for form in every]
    served += [Way(Place.SERVED, shards=count, policy_shards=own) for count in pair.scorer_shards()]
    return (*one, *two, *sharded, *first(served))
