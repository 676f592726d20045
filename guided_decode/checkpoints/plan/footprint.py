"""What a policy and a scorer take of a GPU: weights, caches, activations."""

from __future__ import annotations

from dataclasses import dataclass

from guided_decode.checkpoints.plan.model import PlannedModel
from guided_decode.checkpoints.plan.weight_forms import BF16, WeightForm
from guided_decode.forward.activations import activation_bytes, graph_memory, graph_tokens

# The default of `load_scorer(max_forward_tokens=)`, and of vLLM's chunks of prompts on large cards.
MOST_FORWARD_TOKENS = 8192
# Rows of logits that are alive at once, in float32: the engine's, their log-softmax, the guided.
_POLICY_LOGITS = 4
_IMPLICIT_LOGITS = 3


@dataclass(frozen=True, slots=True)
class Workload:
    """What is decoded at once.

    batch: rows. length: tokens of the longest prompt with its response. top_k: candidates a row.

    Raises ValueError: a number below 1.
    """

    batch: int = 1
    length: int = 2048
    top_k: int = 16

    def __post_init__(self) -> None:
        for name in ("batch", "length", "top_k"):
            given = getattr(self, name)
            if not isinstance(given, int) or isinstance(given, bool) or given < 1:
                raise ValueError(f"{name}={given!r}: expected an integer of at least 1")

    @property
    def cache_tokens(self) -> int:
        """Slots of the scorer's cache that no row has to wait for."""
        return self.batch * (self.length + self.top_k)

    @property
    def forward_tokens(self) -> int:
        """Tokens of the longest forward: the prompts, in pieces of a bounded size."""
        return min(self.batch * self.length, MOST_FORWARD_TOKENS)


@dataclass(frozen=True, slots=True)
class Load:
    """Bytes on one GPU."""

    weights: int = 0
    cache: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations

    def __add__(self, other: Load) -> Load:
        return Load(
            self.weights + other.weights,
            self.cache + other.cache,
            self.activations + other.activations,
        )


def policy_load(policy: PlannedModel, work: Workload, shards: int = 1) -> Load:
    """Of the policy in bfloat16, or as its files are quantised, on each of `shards` GPUs.

    vLLM, which cuts policies, cuts their embeddings too.
    """
    shape = policy.shape
    inner = shape.intermediate // shards
    activations = activation_bytes(work.forward_tokens, shape.hidden, inner, 2)
    logits = _POLICY_LOGITS * 4 * work.batch * shape.vocab
    cache = work.batch * work.length * policy.kv_bytes(shards)
    return Load(policy.weight_bytes() // shards, cache, activations + logits)


def scorer_load(
    models: tuple[PlannedModel, ...],
    work: Workload,
    form: WeightForm = BF16,
    shards: int = 1,
) -> Load:
    """Of a scorer's models, one or an implicit reward's two, on each of `shards` GPUs."""
    loads = (_model_load(model, work, form, shards) for model in models)
    return sum(loads, start=Load())


def _model_load(model: PlannedModel, work: Workload, form: WeightForm, shards: int) -> Load:
    shape = model.shape
    inner = shape.intermediate // shards
    activations = activation_bytes(work.forward_tokens, shape.hidden, inner, 2)
    graphs = graph_tokens(shape.layer_weights + shape.layer_vectors)
    activations += graph_memory(graphs, shape.hidden, inner, 2)
    if form.unpacks:
        activations += 2 * max(outputs * inputs for outputs, inputs in shape.matrices) // shards
    if model.lm_head:
        activations += _IMPLICIT_LOGITS * 4 * work.batch * shape.vocab
    # As `cache.pool.SlotPool`: a slot that is never handed out, and float32 values with one more.
    cache = (work.cache_tokens + 1) * model.kv_bytes(shards) + 4 * (work.cache_tokens + 2)
    return Load(model.weight_bytes(form, shards), cache, activations)
