"""A transformers model that runs packed forwards on a slot pool."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from guided_decode.cache.blocks import NO_INTS
from guided_decode.cache.pool import SlotPool
from guided_decode.cache.prefix_cache import Placement, PrefixCache
from guided_decode.cache.riding import RideWork
from guided_decode.forward.attention import ATTENTION_NAME, SlotCache
from guided_decode.forward.cache_argument import cache_argument
from guided_decode.forward.cpu_linear import use_onednn
from guided_decode.forward.followed_model import FollowedModel
from guided_decode.forward.fused_norms import fuse_norms
from guided_decode.forward.layer_trial import join_again, merge_layers
from guided_decode.forward.merged_layers import merged_layers, switch_back
from guided_decode.forward.modes import without_autograd
from guided_decode.forward.packed import PackedBatch, pack
from guided_decode.forward.pool_size import default_capacity, layer_layout, most_graph_tokens
from guided_decode.forward.stream_order import StreamOrder
from guided_decode.forward.tensor_parallel import least_of_ranks, shard_mesh
from guided_decode.forward.weights import are_same, parts_of_model
from guided_decode.growable import Ints
from guided_decode.kernels.lookahead_tiles import has_tile
from guided_decode.prefix import HandleState, PrefixHandle, as_ints
from guided_decode.scorer import Prefix

if TYPE_CHECKING:
    from guided_decode.forward.shards import Shards

logger = logging.getLogger("guided_decode")

# Rows and width of a device's slot tables from the start: 8 MiB.
_TABLE = (256, 8192)


class Row(NamedTuple):
    """A row that was checked: its prefix, and how many leading tokens the model does not see.

    state: what was checked of a handle, which others may go on appending to.
    """

    prefix: PrefixHandle | Ints
    skip: int
    state: HandleState | None


class PackedModel(FollowedModel):
    """An unmodified transformers module, its prefix cache, and the packed forward.

    The model must sit on a config of its own: its attention implementation is switched. Whoever
    uses it holds `cache.lock` meanwhile.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        *,
        cache_tokens: int | None = None,
        live_tokens: int | None = None,
        max_forward_tokens: int = 8192,
        fused: bool | None = None,
        merged: bool | None = None,
        bytes_beside: int = 0,
    ) -> None:
        """
        Args:
            model: trunk (AutoModel) or causal LM, in eval mode, on its device.
            name: what errors call it.
            cache_tokens: capacity of the slot pool; None takes a bounded share of free memory.
            live_tokens: the most tokens that are live at once, which bounds that default.
            max_forward_tokens: the most tokens of one forward.
            fused: attention goes through `kernels.lookahead_attention`; None: not on a CPU, where
                runs of neighbouring slots are read in place.
            merged: decoder layers run in a few launches each where they give what they gave; None:
                not on a CPU, where a launch costs little.
            bytes_beside: what others keep for each cached token, counted in the default capacity.

        Raises:
            ValueError: a bound below 1, or layers that keep no keys and values.
        """
        bounds = {
            "cache_tokens": cache_tokens,
            "live_tokens": live_tokens,
            "max_forward_tokens": max_forward_tokens,
        }
        for bound, given in bounds.items():
            if given is not None and (not isinstance(given, int) or given < 1):
                raise ValueError(f"{bound}={given!r}: expected an integer of at least 1")
        super().__init__(model, name)
        self.max_forward_tokens = max_forward_tokens
        self.fused = model.device.type != "cpu" if fused is None else fused
        self.merges = model.device.type != "cpu" if merged is None else merged
        # On the rank that leads: those who run its forwards too.
        self.leader: Shards | None = None
        # The mesh of a model that is sharded by tensor parallelism, which runs on all its ranks.
        self.mesh = shard_mesh(model)
        config = model.config.get_text_config()
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        shapes, places = layer_layout(model)
        # Of a sharded model, shapes are this rank's share, and so are its attention heads.
        heads = config.num_attention_heads // (1 if self.mesh is None else self.mesh.size())
        self.has_kernel = _has_kernel(heads, shapes, model.dtype)
        if self.fused and model.device.type == "cuda" and not self.has_kernel:
            logger.warning(
                "%s: no kernel takes its attention heads in %s: it runs by plain torch operations, "
                "slowly and without CUDA graphs", name, model.dtype,
            )  # fmt: skip
        self._orders = [StreamOrder(place) for place in dict.fromkeys((model.device, *places))]
        self._parts: list[Any] | None = None
        pool = partial(SlotPool, layer_shapes=shapes, dtype=model.dtype, device=model.device,
                       layer_devices=places)  # fmt: skip
        # Weights are put in their places before memory is counted.
        self.cache = PrefixCache(pool(1))
        self._prepare()
        capacity = cache_tokens or min(
            live_tokens or 1 << 17, default_capacity(shapes, model, bytes_beside, places)
        )
        if self.mesh is not None:
            # A slot is a token's on every rank.
            capacity = least_of_ranks(capacity, self.mesh, model.device)
        self.most_graph_tokens = most_graph_tokens(model)
        widest = min(self.max_positions or _TABLE[1], capacity, _TABLE[1])
        self.cache = PrefixCache(
            pool(capacity),
            # CUDA graphs read the table where it lies: one that grew would cost all of them.
            table_size=(_TABLE[0], widest) if self.fused else None,
        )

    def _prepare(self) -> None:
        # Other numbers in the same modules need no new trial.
        same = self._parts is not None and are_same(self._parts, parts_of_model(self.model))
        self.model.set_attn_implementation(ATTENTION_NAME)
        use_onednn(self.model)
        if same:
            join_again(self.model)
        else:
            # Whatever comes of the trial, no layer answers with what it held before.
            switch_back(self.model)
            self._merge()
        fuse_norms(self.model)
        self._parts = parts_of_model(self.model)
        self._watch_from_now()

    def _merge(self) -> None:
        if not self.merges:
            return
        layers = self.model.config.get_text_config().num_hidden_layers
        merged = merge_layers(self)
        if self.model.device.type == "cuda":
            # The weights' former places.
            torch.cuda.empty_cache()
        logger.info("%s: %d of %d decoder layers are merged", self.name, merged, layers)

    @property
    def merged_layers(self) -> int:
        """How many decoder layers are merged; the others run as their modules do."""
        return merged_layers(self.model)

    def unmerge(self) -> bool:
        """Makes merged layers the modules' own for good; whether there were any."""
        self.merges = False
        return switch_back(self.model) > 0

    def _tell_of_change(self) -> None:
        if self.leader is not None:
            self.leader.follow(self)

    def begin_call(self) -> None:
        """What a call does first, in the cache's lock: the last one is done, on the device too, and
        weights that changed since are followed.

        Raises ValueError: as `follow`.
        """
        for order in self._orders:
            order.begin()
        self.follow()

    @property
    def can_be_graphed(self) -> bool:
        """Whether all of a forward is on one device, to which a CUDA graph belongs, and no rank
        waits for another in the middle of it."""
        return not self.cache.pool.is_spread and self.mesh is None

    @property
    def device(self) -> torch.device:
        # A model's own property walks over its modules.
        return self.cache.pool.device

    def row(self, given: Prefix, index: int, skip_token: int | None, candidates: int) -> Row:
        """A prefix that this model can read, with `candidates` tokens after it.

        Args:
            given: the prefix as the caller has it.
            index: what errors call the row.
            skip_token: one leading token with this id is not shown to the model; a prefix that is
                nothing else keeps it.
            candidates: how many distinct candidates follow.

        Raises:
            ValueError: an empty prefix, a token outside the vocabulary, more tokens than the model
                has positions, or than the cache has slots.
        """
        prefix: PrefixHandle | Ints
        state = None
        if isinstance(given, PrefixHandle):
            prefix, state = given, given.state()
            tokens, lowest, highest, _ = state
        else:
            prefix = tokens = as_ints(given)
            lowest, highest = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
        if not len(tokens):
            raise ValueError(f"row {index} has an empty prefix: expected at least one token id")
        self.check_vocabulary(lowest, highest, f"row {index}: prefix token")
        skip = int(skip_token is not None and len(tokens) > 1 and tokens[0] == skip_token)
        self._check_fits(len(tokens) - skip, candidates, index)
        return Row(prefix, skip, state)

    def refusal(self, given: Prefix, skip_token: int | None, candidates: int) -> str | None:
        """What `row` would raise, or None."""
        try:
            self.row(given, 0, skip_token, candidates)
        except ValueError as error:
            return str(error).removeprefix("row 0: ")
        return None

    def check_vocabulary(self, lowest: int, highest: int, what: str) -> None:
        """Raises ValueError where ids between these two are not all in the vocabulary."""
        if lowest < 0 or highest >= self.vocab_size:
            odd = lowest if lowest < 0 else highest
            raise ValueError(
                f"{what} {odd} is outside the vocabulary of {self.name}, which has "
                f"{self.vocab_size} tokens: policy and scorer must share their token ids"
            )

    def _check_fits(self, length: int, candidates: int, index: int) -> None:
        # Candidates share one position.
        positions = length + min(candidates, 1)
        if self.max_positions is not None and positions > self.max_positions:
            raise ValueError(
                f"row {index} needs {positions} positions but {self.name} has "
                f"{self.max_positions}: shorten the prompt or lower max_new_tokens"
            )
        needed = length + candidates
        if needed > self.cache.capacity:
            raise ValueError(
                f"cache_tokens={self.cache.capacity} is too small for one row of {self.name}: its "
                f"prefix has {length} tokens and {candidates} candidates, so cache_tokens must be "
                f"at least {needed}"
            )

    def place(self, row: Row, candidates: Ints = NO_INTS, *, reread_last: bool = False,
              alone: bool = False, rides: int | None = None) -> Placement | None:  # fmt: skip
        """A place in the cache for a row of `row()`; None where it has to wait for the next batch.

        alone: no other row of the batch was placed, so what the cache holds may go. rides: as of
        `PrefixCache.place`.
        """
        place = partial(self.cache.place, row.prefix, row.skip, candidates, state=row.state,
                        reread_last=reread_last, rides=rides)  # fmt: skip
        placement = place()
        if placement is None and alone:
            self.cache.clear()
            placement = place()
            assert placement is not None
        return placement

    def batches(
        self, placements: Sequence[Placement], ride: RideWork | None = None
    ) -> list[PackedBatch]:
        """The forwards that these rows need, in order; of those that ride, first."""
        work = [placement.work for placement in placements]
        cache = self.cache
        written = cache.write_tables(told=self.leader is not None)
        if self.leader is not None:
            self.leader.wrote(self, written)
        table, limit = cache.tables.table, self.max_forward_tokens
        return list(pack(work, table, cache.pool, limit, fused=self.fused, ride=ride))

    def forward(self, batch: PackedBatch, read: Tensor | None = None) -> Tensor:
        """One packed forward: hidden states [tokens, hidden], or logits [n, vocab].

        Args:
            batch: the tokens.
            read: int64 [n], for causal LMs: tokens whose logits are wanted.
        """
        if self.leader is not None:
            return self.leader.forward(self, batch, read)
        return self.run(batch, read)

    @without_autograd
    def run(self, batch: PackedBatch, read: Tensor | None = None) -> Tensor:
        """`forward` on this rank: all there is, where the model is not sharded."""
        inputs = {
            "input_ids": batch.token_ids[None],
            # The padding of a CUDA graph has position -1; any will do for it.
            "position_ids": batch.positions.clamp(min=0)[None],
            cache_argument(self.model): SlotCache(batch),
            "packed": batch,
            "use_cache": True,
        }
        if read is not None:
            return self.model(**inputs, logits_to_keep=read).logits[0].to(self.device)
        # Of a model on several devices it comes from the last one.
        return self.model(**inputs).last_hidden_state[0].to(self.device)


def _has_kernel(heads: int, shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> bool:
    """Whether `kernels.lookahead_attention` has a kernel for every layer."""
    return all(has_tile(dtype, heads // kv_heads, max(k, v)) for kv_heads, k, v in shapes)
