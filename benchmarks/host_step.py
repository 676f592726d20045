"""Steps of an engine whose critic's forward is next to nothing: what is left is the host's work.

`host_work` runs this file, by its path, over the package of another checkout too: it imports
nothing of the benchmarks.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from guided_decode import PrefixHandle, Scores
from guided_decode.forward.packed import PackedBatch
from guided_decode.forward.packed_model import PackedModel
from guided_decode.integrations.vllm.engine import GuidedEngine
from guided_decode.integrations.vllm.rows import BatchRows
from guided_decode.integrations.vllm.server_config import parse_config
from guided_decode.scoring.critic import CriticScorer

# Small, since passes over the vocabulary are the device's work.
VOCAB = 64
_EOS = 2
_DRAWN = 16


@dataclass(frozen=True)
class Case:
    """full: the pool holds the rows and little more, so that each step evicts."""

    rows: int
    prefix: int
    k: int
    full: bool = False

    def __str__(self) -> str:
        pool = ", full pool" if self.full else ""
        return f"{self.rows} rows, prefix {self.prefix}, k {self.k}{pool}"


@dataclass
class Turn:
    """Microseconds of one step, a mean over a turn's: its parts, without the forward.

    before: histories, candidates. look_up: the scorer, from its call to its answer. after: the rule
    and the logits. forward: beside them.
    """

    before: float = 0.0
    look_up: float = 0.0
    after: float = 0.0
    forward: float = 0.0

    @property
    def total(self) -> float:
        return self.before + self.look_up + self.after


class DisagreementError(Exception):
    """Guided logits are not what the rule makes of the critic's values."""


def value(token: Tensor, position: Tensor) -> Tensor:
    """The critic: V of a prefix by its last token and where that stands."""
    return ((token * 7 + position * 3) % 101).float() / 50


class Weightless(CriticScorer):
    """A critic without a forward, and when its parts began: the thread's seconds."""

    def __init__(self, cache_tokens: int, positions: int) -> None:
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=positions,
        )
        model = PackedModel(LlamaModel(config).eval(), "the critic", cache_tokens=cache_tokens)
        super().__init__(model, lambda hidden: hidden, graphs=False)
        self.begun = self.ended = self.forward = 0.0

    def score(self, prefixes: Any, candidates: Tensor) -> Scores:
        self.begun, self.forward = time.thread_time(), 0.0
        scores = super().score(prefixes, candidates)
        self.ended = time.thread_time()
        return scores

    def _write_values(self, batch: PackedBatch) -> None:
        begun = time.thread_time()
        values = value(batch.token_ids, batch.positions)
        self.cache.pool.values.index_copy_(0, batch.slots, values)
        self.forward += time.thread_time() - begun


class Decoding:
    """A case: rows that go on, each with its likeliest guided token."""

    def __init__(self, case: Case, most_steps: int) -> None:
        """most_steps: of all turns."""
        torch.manual_seed(0)
        self.case = case
        needed = case.rows * (case.prefix + case.k + 2 + most_steps)
        room = needed if case.full else needed + case.rows * most_steps * case.k
        self.scorer = Weightless(room, case.prefix + most_steps + 2)
        if hasattr(self.scorer, "freeze"):
            # As the server does; older checkouts cannot.
            self.scorer.freeze()
        config = parse_config({"scorer": "none", "log_every": 0}, "the benchmark")
        self.engine = GuidedEngine(config, self.scorer, end_ids=(_EOS,))
        self.rows = BatchRows(self.engine.admit)
        self.outputs: list[list[int]] = [[] for _ in range(case.rows)]
        asked: Any = SimpleNamespace(
            extra_args={"guide": 1, "guide_top_k": case.k}, stop_token_ids=None,
            all_stop_token_ids={_EOS}, ignore_eos=False, min_tokens=0, structured_outputs=None,
        )  # fmt: skip
        prompts = torch.randint(3, VOCAB, (case.rows, case.prefix)).tolist()
        for i, (prompt, output) in enumerate(zip(prompts, self.outputs, strict=True)):
            row = self.rows._new(asked, prompt, output)
            assert row is not None
            self.rows._rows[i] = row
        self.drawn = torch.randn(_DRAWN, case.rows, VOCAB)
        # The critic's end token has its own rule, and would end the row.
        self.drawn[..., _EOS] = -50.0
        self.done = 0

    @torch.no_grad()
    def turn(self, steps: int) -> Turn:
        """So many steps, of which the first is held to the rule.

        Raises DisagreementError.
        """
        turn = Turn()
        for step in range(steps):
            logits = self.drawn[self.done % _DRAWN].clone()
            wanted = self._by_the_rule(logits) if step == 0 else None
            begun = time.thread_time()
            guided = self.engine.step(logits, self.rows.rows())
            ended = time.thread_time()
            if wanted is not None and not torch.allclose(guided, wanted, atol=1e-4):
                raise DisagreementError(f"{self.case} at step {self.done}")
            turn.before += (self.scorer.begun - begun) / steps * 1e6
            spent = self.scorer.ended - self.scorer.begun - self.scorer.forward
            turn.look_up += spent / steps * 1e6
            turn.after += (ended - self.scorer.ended) / steps * 1e6
            turn.forward += self.scorer.forward / steps * 1e6
            for output, token in zip(self.outputs, guided.argmax(-1).tolist(), strict=True):
                output.append(token)
            self.done += 1
        return turn

    def _by_the_rule(self, logits: Tensor) -> Tensor:
        """Guided logits by brute force."""
        candidates = logits.topk(self.case.k).indices
        length = self.case.prefix + self.done
        last = torch.tensor(
            [(output or self._prompt(i))[-1] for i, output in enumerate(self.outputs)]
        )
        baseline = value(last, torch.tensor(length - 1))
        moved = value(candidates, torch.tensor(length)) - baseline[:, None]
        guided = torch.full_like(logits, -torch.inf)
        return guided.scatter(-1, candidates, logits.gather(-1, candidates) + moved)

    def _prompt(self, row: int) -> Sequence[int]:
        handle: PrefixHandle | None = self.rows._rows[row][0].handle
        assert handle is not None
        return handle.tokens.tolist()


class Timed:
    """Answers turn by turn, with one case set up at a time."""

    def __init__(self) -> None:
        self._decoding: Decoding | None = None

    def begin(self, case: Case, most_steps: int) -> None:
        """Sets a case up, with its first two steps: prompts, and where handles stand."""
        self._decoding = None
        self._decoding = Decoding(case, most_steps + 2)
        self._decoding.turn(2)

    def turn(self, steps: int) -> Turn:
        """One turn of the case."""
        assert self._decoding is not None
        return self._decoding.turn(steps)


def serve() -> None:
    """Orders on stdin, a line of JSON each, are answered on stdout."""
    torch.set_num_threads(1)
    timed = Timed()
    for line in sys.stdin:
        order = json.loads(line)
        if "case" in order:
            timed.begin(Case(**order["case"]), order["most_steps"])
            print("{}", flush=True)
        else:
            print(json.dumps(vars(timed.turn(order["steps"]))), flush=True)


if __name__ == "__main__":
    serve()
