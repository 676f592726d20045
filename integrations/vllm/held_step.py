"""The forward of a step that is known already: of tokens that were candidates the step before.

A guided token was forwarded when it was a candidate. Where that is so of every row of a step, its
hidden states are handed to vLLM in place of a forward, and the keys and values move from the
blocks that were set aside to the requests' own. A step with any other row is forwarded as ever,
the guided rows with it.

vLLM has no interface for that: the runner's `_model_forward` (V1) is replaced on the runner that we
sit at; on Model Runner V2 its `prepare_attn`, which is told the batch, and its model's `forward`.
Where V2 replays a whole graph, the forward is its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guided_decode.integrations.vllm.own_forward import OwnForward
from guided_decode.prefix import PrefixHandle


class Step(NamedTuple):
    """What the runner is about to forward: the row of each request, and its first position.

    rows: by batch index. positions: on the host. single: whether each has one token.
    """

    rows: Sequence[PrefixHandle | None]
    positions: Sequence[int]
    single: bool


class _Held(NamedTuple):
    """The candidates of the last step. rows: their requests. first, count: of each one's."""

    tokens: Tensor  # int64 [candidates]
    hidden: Tensor  # [candidates, hidden]
    blocks: Tensor  # int64 [groups, candidates]
    places: dict[int, tuple[int, int, int]]  # id of the handle: first, count, position
    handles: Sequence[PrefixHandle]  # kept, so that no id is another's


class HeldStep:
    """Answers forwards from the look ahead of the step before."""

    def __init__(self, forward: OwnForward) -> None:
        self._forward = forward
        # Given vLLM's batch, the handles of its rows, None where a row is not ours.
        self.standing: Callable[[Any], Sequence[PrefixHandle | None]] | None = None
        self._held: _Held | None = None
        self._batch: Any = None
        self._sits = False
        self.answered = 0

    def begin(self) -> None:
        """The step's forward is over: a graph of the whole step asked for nothing, and the forwards
        that look ahead are answered by nobody."""
        self._held = self._batch = None

    def hold(self, handles: dict[int, PrefixHandle]) -> None:
        """Keeps what this step looked ahead at, for the next. handles: by the step's rows."""
        parts = self._forward.parts
        if self.standing is not None and parts:
            self._sit()
        if not parts:
            self._held = None
            return
        places: dict[int, tuple[int, int, int]] = {}
        asked = [each for part in parts for each in part.asked]
        for i, each in enumerate(asked):
            first, count, _ = places.get(id(handles[each.at]), (i, 0, 0))
            places[id(handles[each.at])] = (first, count + 1, each.length)
        self._held = _Held(
            torch.tensor([each.token for each in asked]).to(self._forward.device),
            torch.cat([part.hidden for part in parts]),
            torch.cat([part.blocks for part in parts], 1),
            places,
            list(handles.values()),
        )

    def _sit(self) -> None:
        if self._sits:
            return
        self._sits = True
        runner = self._forward.runner
        if hasattr(runner, "_model_forward"):
            runner._model_forward = self._around(runner._model_forward, self._of_v1)
        else:
            prepare = runner.prepare_attn

            def prepared(input_batch: Any) -> Any:
                self._batch = input_batch
                return prepare(input_batch)

            runner.prepare_attn = prepared
            runner.model.forward = self._around(runner.model.forward, self._of_v2)
        reload = runner.reload_weights

        def reloaded(*args: Any, **kwargs: Any) -> Any:
            # What was held is of the weights before.
            self.begin()
            return reload(*args, **kwargs)

        runner.reload_weights = reloaded

    def _around(
        self, forward: Callable[..., Any], step_of: Callable[[], Step | None]
    ) -> Callable[..., Any]:
        def answered(*args: Any, **kwargs: Any) -> Any:
            held, self._held = self._held, None
            if held is not None:
                step = step_of()
                found = None if step is None else self._answer(held, step, kwargs)
                if found is not None:
                    return found
            return forward(*args, **kwargs)

        return answered

    def _of_v1(self) -> Step | None:
        runner = self._forward.runner
        batch = runner.input_batch
        rows = batch.num_reqs
        starts = runner.query_start_loc.np[: rows + 1]
        return Step(
            self._rows_of(batch),
            batch.num_computed_tokens_cpu[:rows].tolist(),
            bool(starts[-1] == rows),
        )

    def _of_v2(self) -> Step | None:
        batch, self._batch = self._batch, None
        if batch is None:
            return None
        return Step(
            self._rows_of(batch),
            batch.num_computed_tokens_np[: batch.num_reqs].tolist(),
            batch.num_tokens == batch.num_reqs,
        )

    def _rows_of(self, batch: Any) -> Sequence[PrefixHandle | None]:
        assert self.standing is not None
        return self.standing(batch)

    def _answer(self, held: _Held, step: Step, given: dict[str, Any]) -> Tensor | None:
        """Hidden states, [tokens and padding, hidden], or None where the step is not held."""
        tokens = given.get("input_ids")
        if not step.single or tokens is None:
            return None
        places = []
        for handle, position in zip(step.rows, step.positions, strict=True):
            place = None if handle is None else held.places.get(id(handle))
            if place is None or place[2] != position:
                return None
            places.append(place)
        rows, most = len(places), max(count for _, count, _ in places)
        at, counts, positions = torch.tensor(places).to(held.tokens.device).unbind(1)
        columns = torch.arange(most, device=at.device)
        index = (at[:, None] + columns).clamp(max=len(held.tokens) - 1)
        same = held.tokens[index] == tokens[:rows, None].long()
        same &= columns < counts[:, None]
        if not bool(same.any(1).all()):
            return None
        chosen = index.gather(1, same.int().argmax(1, keepdim=True)).flatten()
        for group in range(len(held.blocks)):
            last = positions // self._forward.block_size(group)
            table = self._forward.block_table(group)[:rows]
            target = table.gather(1, last[:, None]).flatten().long()
            self._forward.copy_blocks(group, held.blocks[group][chosen], target)
        hidden = held.hidden.new_zeros(len(tokens), held.hidden.shape[1])
        hidden[:rows] = held.hidden[chosen]
        self.answered += 1
        return hidden
