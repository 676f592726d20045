"""Promises about what the numbers mean: values of longer prefixes, ends, references."""

from __future__ import annotations

import torch

from guided_decode.scorer import Scores
from guided_decode.testing.bench import Bench
from guided_decode.testing.promise import Broken


def lookahead(bench: Bench) -> None:
    """Q(s, a) = V(s·a), and with terminals included any Q."""
    if bench.scorer.terminal == "included":
        return
    prefixes, candidates = bench.rows(9, 4), bench.candidates(2, 3)
    got = bench.ask(prefixes, candidates)
    longer = [
        [*prefix, token]
        for prefix, row in zip(prefixes, candidates.tolist(), strict=True)
        for token in row
    ]
    after = bench.ask(longer, torch.empty(len(longer), 0, dtype=torch.int64)).baseline
    expected = Scores(after.view(got.values.shape), got.baseline)
    what = ("as a candidate's value", "as the baseline of the prefix with it")
    bench.same(got, expected, what, candidates)


def terminal(bench: Bench) -> None:
    """An end has a score where the terminal rule asks for one."""
    scorer, prefixes = bench.scorer, bench.rows(9, 4)
    rule = scorer.terminal
    asked = scorer
    if rule == "reward":
        if scorer.reward is None:
            raise Broken('terminal="reward" without a reward model: reward is None')
        asked = scorer.reward
    end = asked.eos_token_id
    if end is None:
        if rule == "reward":
            raise Broken('terminal="reward", whose reward model has no eos_token_id to be read at')
        return
    if not 0 <= end < asked.vocab_size:
        raise Broken(f"eos_token_id={end} is outside its vocabulary of {asked.vocab_size} tokens")
    if rule == "baseline":
        return
    values = bench.ask(prefixes, torch.tensor([[end]] * len(prefixes)), asked).values
    odd = (~values.isfinite()).nonzero()
    if len(odd):
        first = odd[0].tolist()
        raise Broken(f'terminal="{rule}", and {values[tuple(first)]} at EOS ({end}) of row '
                     f"{first[0]}", odd[:, 0].tolist())  # fmt: skip


def vocabulary(bench: Bench) -> None:
    """One call has all candidates, where `scores_vocabulary` says so."""
    if not bench.scorer.scores_vocabulary:
        return
    prefixes, some = bench.rows(6, 10), bench.candidates(2)
    every = torch.arange(bench.scorer.vocab_size).expand(2, -1)
    whole = bench.ask(prefixes, every)
    expected = bench.ask(prefixes, some)
    got = Scores(whole.values.gather(-1, some), whole.baseline)
    bench.same(got, expected, ("among the whole vocabulary", "among four"), some)


def reference(bench: Bench) -> None:
    """A reference answers with log-probabilities, NaN where padded."""
    language_model = bench.scorer.reference
    if language_model is None:
        return
    prefixes, candidates = bench.rows(6, 10), bench.candidates(2)
    candidates[0, 1] = -1
    found = language_model.log_probs(prefixes, candidates).detach().cpu()
    if found.shape != candidates.shape or found.dtype != torch.float32:
        raise Broken(f"log_probs are {found.dtype} {list(found.shape)}, where torch.float32 "
                     f"{list(candidates.shape)} is due")  # fmt: skip
    if not torch.equal(found.isnan(), candidates < 0):
        raise Broken("log_probs are NaN elsewhere than at -1")
    mass = found.exp().nansum(-1)
    rows = (mass > 1.0 + 1e-3).nonzero().flatten().tolist()
    if rows:
        raise Broken(f"log_probs of row {rows[0]}: four tokens have probability "
                     f"{mass[rows[0]]:.4g} together", rows)  # fmt: skip
