"""Brute force: guidance recomputed from its definition, with no cache and in plain loops.

Every value is one forward of the stock class over the whole sequence; the arithmetic on logits is
float64 on Python numbers. Nothing here is shared with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Ids = Sequence[int]
UNDECIDED = 1e-4  # closer to a threshold than this, float32 may fall on either side


def log_softmax(logits: Ids) -> list[float]:
    """The full softmax of one row, at temperature 1, in float64."""
    top = max(logits)
    total = math.fsum(math.exp(x - top) for x in logits)
    return [x - top - math.log(total) for x in logits]


def candidates(logits: Sequence[float], top_k: int | None, top_p: float) -> list[int]:
    """The candidate set C of one row, by logit descending, ties by token id."""
    alive = [token for token, x in enumerate(logits) if x != -math.inf]
    ordered = sorted(alive, key=lambda token: (-logits[token], token))[:top_k]
    if top_p >= 1:  # no proper subset of the vocabulary reaches a mass of 1
        return ordered
    logp, mass, kept = log_softmax(logits), 0.0, []
    for token in ordered:
        kept.append(token)
        mass += math.exp(logp[token])
        if mass >= top_p:
            break
    return kept


@dataclass
class Values:
    """V of whole sequences: the stock model's output at the last token, one forward a length."""

    model: torch.nn.Module
    drop_bos: int | None = None  # the BOS id, for families whose trainer dropped it
    transform: Callable[[Tensor], Tensor] = lambda output: output[..., 0]
    known: dict[tuple[int, ...], float] = field(default_factory=dict)

    def __call__(self, sequences: Sequence[Ids]) -> list[float]:
        """V(s) of each sequence s."""
        return self.forward([self.read(sequence) for sequence in sequences])

    def after(self, prefix: Ids, tokens: Ids) -> list[float]:
        """V(s·a) of each token a after the prefix s."""
        return self.forward([(*self.read(prefix), token) for token in tokens])

    def read(self, prefix: Ids) -> tuple[int, ...]:
        """The ids that the model reads for a prefix: one that is only BOS keeps it."""
        leading_bos = len(prefix) > 1 and prefix[0] == self.drop_bos
        return tuple(prefix[1:] if leading_bos else prefix)

    def forward(self, wanted: list[tuple[int, ...]]) -> list[float]:
        """The head at the last token of each sequence of ids."""
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for ids in dict.fromkeys(wanted):
            if ids not in self.known:
                by_length.setdefault(len(ids), []).append(ids)
        for same_length in by_length.values():
            for start in range(0, len(same_length), 64):
                part = same_length[start : start + 64]
                # The trunk and the head of the class itself: its own pooling would read a
                # sequence that ends in the pad id at another place.
                hidden = self.model.base_model(torch.tensor(part)).last_hidden_state[:, -1]
                output = self.transform(self.model.score(hidden).float())
                self.known.update(zip(part, output.tolist(), strict=True))
        return [self.known[ids] for ids in wanted]


@dataclass
class LogProbs:
    """log π(·|s) of a causal LM, one whole forward a sequence."""

    model: torch.nn.Module

    def logits(self, prefix: Ids) -> Tensor:
        """The raw next-token logits after a prefix, [vocab]."""
        return self.model(torch.tensor([list(prefix)])).logits[0, -1].float()

    def __call__(self, prefix: Ids) -> list[float]:
        return log_softmax(self.logits(prefix).tolist())

    def of_continuation(self, prefix: Ids, continuation: Ids) -> float:
        """log π(y|x)."""
        ids = [*prefix, *continuation]
        logits = self.model(torch.tensor([ids])).logits[0].double()
        logp = torch.log_softmax(logits, -1)
        first = len(prefix) - 1
        return sum(logp[first + t, token].item() for t, token in enumerate(continuation))


@dataclass
class Row:
    """One guided row: its logits, and the candidates that float32 may prune or not."""

    logits: list[float]
    undecided: set[int]
    candidates: list[int]

    def decision(self) -> tuple[int, float]:
        """The greedy token, and how far the runner-up lies behind it."""
        order = sorted(range(len(self.logits)), key=lambda token: (-self.logits[token], token))
        gap = self.logits[order[0]] - self.logits[order[1]]
        return order[0], 0.0 if self.undecided else gap


@dataclass
class Oracle:
    """The guidance of one scorer: a critic with its terminal rule, or an implicit reward."""

    values: Values | None = None
    terminal: str = "baseline"
    eos: int = 2  # what ends a response for the critic and the reward model
    reward: Values | None = None
    reference: LogProbs | None = None
    implicit: tuple[LogProbs, LogProbs] | None = None

    def row(
        self,
        prefix: Ids,
        logits: Tensor | Sequence[float],
        config,
        terminals: Ids = (),
        prompt_length: int | None = None,
    ) -> Row:
        """l' of one row, from the definition; `config` has the fields of GuidanceConfig."""
        l = logits.tolist() if isinstance(logits, Tensor) else list(logits)
        chosen = candidates(l, config.top_k, config.top_p)
        if config.rule == "reweight" and config.beta == 0 and config.tail == "keep":
            return Row(l, set(), chosen)
        free = set(terminals) if self.terminal == "baseline" and not self.implicit else set()
        scored = [a for a in chosen if a not in free]
        logp = log_softmax(l)
        gated = config.gate is not None and math.exp(max(logp)) >= config.gate
        if gated or not self.is_open(prefix, config, prompt_length):
            advantage = dict.fromkeys(scored, 0.0)
        else:
            advantage = self.advantages(prefix, scored, logp, config, terminals)

        guided = {a: l[a] for a in chosen}
        undecided: set[int] = set()
        if config.rule == "reweight":
            for a in scored:
                guided[a] = l[a] + config.beta * advantage[a]
        elif scored:
            best = max(scored, key=lambda a: advantage[a])
            for a in scored:
                slack = advantage[a] - (advantage[best] - config.margin)
                if slack < 0:
                    guided[a] = -math.inf
                if a != best and advantage[a] != advantage[best] and abs(slack) < UNDECIDED:
                    undecided.add(a)
        outside = l if config.tail == "keep" else [-math.inf] * len(l)
        return Row([guided.get(a, outside[a]) for a in range(len(l))], undecided, chosen)

    def is_open(self, prefix: Ids, config, prompt_length: int | None) -> bool:
        """Whether the value of the prefix, or its fall by the last token, calls for guidance."""
        if config.value_gate is None and config.value_gate_fall is None:
            return True
        value = self.values([prefix])[0]
        if config.value_gate is not None and value < config.value_gate:
            return True
        if config.value_gate_fall is None or len(prefix) == prompt_length:
            return False
        return self.values([prefix[:-1]])[0] - value > config.value_gate_fall

    def advantages(
        self, prefix: Ids, scored: list[int], logp: list[float], config, terminals: Ids
    ) -> dict[int, float]:
        """A(s, a) of the candidates that are scored."""
        if self.implicit is not None:
            tuned, base = (model(prefix) for model in self.implicit)
            quality, baseline = {a: tuned[a] - base[a] for a in scored}, 0.0
        else:
            inner = [a for a in scored if a not in terminals]
            quality = dict(zip(inner, self.values.after(prefix, inner), strict=True))
            finished = self.reward if self.terminal == "reward" else self.values
            for a in scored:
                if a in terminals:
                    quality[a] = finished.after(prefix, [self.eos])[0]
            baseline = self.values([prefix])[0]
            if config.baseline == "mean" and scored:
                baseline = math.fsum(quality.values()) / len(scored)
        result = {a: quality[a] - baseline for a in scored}
        if config.kl_coef:
            reference = self.reference(prefix)
            for a in scored:
                result[a] -= config.kl_coef * (logp[a] - reference[a])
        return result

    def greedy(
        self, policy: LogProbs, prompt: Ids, config, terminals: Ids, max_new_tokens: int
    ) -> tuple[list[int], list[float]]:
        """The brute-force loop: the tokens it takes, and each decision's gap."""
        sequence, gaps = list(prompt), []
        for t in range(max_new_tokens):
            due = config.abstain is not None and t >= (config.abstain_after or 1)
            if due and self.values([sequence])[0] < config.abstain:
                break
            row = self.row(sequence, policy.logits(sequence), config, terminals, len(prompt))
            token, gap = row.decision()
            sequence.append(token)
            gaps.append(gap)
            if token in terminals:
                break
        return sequence[len(prompt) :], gaps

    def beam_score(
        self, policy: LogProbs, prompt: Ids, response: Ids, config, terminals: Ids
    ) -> float:
        """log π(y) + beta · (V(y) − V(x)); a response that ended is valued by the terminal rule."""
        end = list(response)
        if end[-1] in terminals:
            end.pop()
            if self.terminal != "baseline":
                end.append(self.eos)
        finished = len(end) == len(response) and response[-1] in terminals
        read = self.reward if finished and self.terminal == "reward" else self.values
        advantage = read([[*prompt, *end]])[0] - self.values([prompt])[0]
        return policy.of_continuation(prompt, response) + config.beta * advantage


def assert_row_equal(guided: Tensor, row: Row, atol: float = 1e-4) -> None:
    """A row of guided logits equals brute force, −inf for −inf."""
    expected = torch.tensor(row.logits, dtype=torch.float64)
    decided = torch.ones(len(row.logits), dtype=torch.bool)
    decided[list(row.undecided)] = False
    assert len(row.undecided) <= 1, "the arrangement leaves too much undecided"
    torch.testing.assert_close(
        guided.double().cpu()[decided],
        expected[decided],
        rtol=0,
        atol=atol,
        msg=lambda text: f"guided logits differ from brute force: {text}",
    )


def assert_greedy_equal(
    generated: Sequence[Ids], expected: Sequence[tuple[list[int], list[float]]], allowed: int = 1
) -> None:
    """Token for token; a first difference needs a decision gap under 1e-4, and few may have one."""
    ties = 0
    for number, (tokens, (wanted, gaps)) in enumerate(zip(generated, expected, strict=True)):
        tokens = list(tokens)
        if tokens == wanted:
            continue
        step = next(
            (t for t, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b),
            min(len(tokens), len(wanted)),
        )
        assert step < len(gaps), f"row {number} went on after the end, at step {step}"
        assert gaps[step] < UNDECIDED, (
            f"row {number} differs from brute force at step {step}: {tokens[step:][:3]} instead "
            f"of {wanted[step:][:3]}, decided by {gaps[step]:.2e}"
        )
        ties += 1
    assert ties <= allowed, f"{ties} rows differ from brute force by ties; at most {allowed} may"
