"""The policy's own trunk as a scorer: vLLM's model looks ahead, a head reads values."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from guided_decode.guidance.step import is_device_error
from guided_decode.integrations.vllm.held_step import HeldStep
from guided_decode.integrations.vllm.own_forward import LookAhead, OwnForward
from guided_decode.integrations.vllm.rows import LiveRow, Placed
from guided_decode.integrations.vllm.trunk_tap import TrunkTap
from guided_decode.prefix import PrefixHandle
from guided_decode.scorer import Prefix, Scores, TerminalRule
from guided_decode.scoring.asked import check_asked

Broadcast = Callable[[Tensor], Tensor]


class OwnTrunk:
    """Scores candidates of the rows of the step that is under way, and of no others.

    V(prefix) comes from the hidden states of that step, V(prefix + candidate) from a forward of
    the candidates over the requests' own KV blocks. A `Scorer`, in the step that `begin` began.
    """

    reward = None
    reference = None
    bos_token_id = None
    scores_vocabulary = False

    def __init__(
        self,
        tap: TrunkTap,
        forward: OwnForward,
        *,
        vocab_size: int,
        max_length: int,
        eos_token_id: int | None = None,
        terminal: TerminalRule = "baseline",
        held: HeldStep,
        broadcast: Broadcast | None = None,
    ) -> None:
        """
        Args:
            tap: has the head and this step's hidden states.
            forward: of the policy's model.
            vocab_size: of the policy's logits.
            max_length: tokens of the longest sequence that the engine takes.
            eos_token_id: what the terminal rule "critic" reads V at.
            terminal: "baseline" or "critic".
            held: takes what was looked at for the next step's forward.
            broadcast: hands a tensor of the leading rank to all, who forward the same candidates;
                None with one rank.
        """
        self.tap = tap
        self.stats = tap.stats
        self.vocab_size = vocab_size
        self.terminal = terminal
        self.eos_token_id = eos_token_id
        self._forward = forward
        self._max_length = max_length
        self.held = held
        self._broadcast = broadcast
        self._rows: dict[int, PrefixHandle] = {}
        # By the rows' handles: which row of the step, and which request of the batch.
        self._at: dict[int, tuple[int, int]] = {}
        self._batch = 0

    def begin(self, rows: Sequence[Placed], batch: int) -> None:
        """A step begins. rows: those that may be scored. batch: how many rows it has in all."""
        self.held.begin()
        self._forward.begin()
        self._batch = batch
        # V1 also calls for prompts that it prefills in chunks, whose sample it drops.
        whole = [p for p in rows if self._forward.has_prefix(p.at, len(p.row.history))]
        self._rows = {p.at: p.row.history for p in whole}
        self._at = {
            id(p.row.history): (p.at, p.at if p.row.place is None else p.row.place) for p in whole
        }

    def stands(self, row: LiveRow) -> bool:
        """Whether this step's logits are those after the row's whole history."""
        return id(row.history) in self._at

    def refusal(self, prefix: Prefix, candidates: int) -> str | None:
        """As of `Scorer`."""
        if not isinstance(prefix, PrefixHandle):
            return "a prefix came that is no row of this step: expected its row's handle"
        if candidates and self._forward.unfit is not None:
            return self._forward.unfit
        if candidates and len(prefix) >= self._max_length:
            return f"no position is left behind a prefix of max_model_len={len(prefix)} tokens"
        return None

    def score(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Scores:
        """As of `Scorer`; prefixes: handles of this step's rows.

        Raises ValueError: a prefix of no such row, or one that is refused.
        """
        check_asked(prefixes, candidates, self.vocab_size)
        begun = time.perf_counter()
        for prefix in prefixes:
            reason = self.refusal(prefix, candidates.shape[1])
            if id(prefix) not in self._at:
                reason = "a prefix came that is no row of this step: expected its row's handle"
            if reason is not None:
                raise ValueError(reason)
        places = [self._at[id(prefix)] for prefix in prefixes]
        baseline = torch.tensor(
            self.tap.values([at for at, _ in places], self._batch), dtype=torch.float32
        )
        values = torch.full(candidates.shape, torch.nan, dtype=torch.float32)
        known = candidates.cpu()
        rows, columns = (known >= 0).nonzero(as_tuple=True)
        asked = [
            LookAhead(places[row][0], places[row][1], len(prefixes[row]), token)
            for row, token in zip(rows.tolist(), known[rows, columns].tolist(), strict=True)
        ]
        if asked:
            values[rows, columns] = self.tap.head(self._hidden(asked)).float().cpu()
        self.stats.add(candidate_tokens=len(asked), seconds=time.perf_counter() - begun)
        return Scores(values, baseline)

    def _hidden(self, asked: Sequence[LookAhead]) -> Tensor:
        begun, before = time.perf_counter(), self._forward.forwards
        if self._broadcast is not None:
            self._tell(len(asked))
            self._broadcast(self._on_device(asked))
        try:
            hidden = self._forward.hidden(asked)
        except BaseException:
            # Of a part that failed nothing is held, on no rank.
            self._forward.begin()
            raise
        self.stats.add(
            forwards=self._forward.forwards - before,
            forward_seconds=time.perf_counter() - begun,
        )
        return hidden

    def end(self) -> None:
        """The step is over: other ranks forward nothing more in it."""
        self.tap.forget()
        if self._broadcast is not None:
            self._tell(0)
        self._settle()

    def follow(self) -> None:
        """On a rank that takes over: the same forwards as the rank that leads, until its `end`."""
        assert self._broadcast is not None
        while count := int(self._tell(0).item()):
            given = self._broadcast(self._on_device([LookAhead(0, 0, 0, 0)] * count))
            try:
                self._forward.hidden([LookAhead(*each) for each in given.tolist()])
            except Exception as error:
                # The leading rank meets it too, and decides what becomes of it.
                if is_device_error(error):
                    raise
                self._forward.begin()
        self._settle()

    def _settle(self) -> None:
        self.held.hold(self._rows)
        self._rows, self._at = {}, {}

    def _tell(self, count: int) -> Tensor:
        assert self._broadcast is not None
        return self._broadcast(torch.tensor([count], device=self._forward.device))

    def _on_device(self, asked: Sequence[LookAhead]) -> Tensor:
        return torch.tensor(asked, dtype=torch.int64, device=self._forward.device)
