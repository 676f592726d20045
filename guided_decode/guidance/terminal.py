"""Scoring with the terminal rule: what Q is for a candidate that would end the request."""

import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from guided_decode.scorer import Prefix, Scorer, Scores


class TerminalScores(NamedTuple):
    """scores: as of `Scorer.score`; exempt: bool [rows, k] where the candidates are, terminals with
    A = 0, or None."""

    scores: Scores
    exempt: Tensor | None


def score_candidates(
    scorer: Scorer,
    prefixes: Sequence[Prefix],
    candidates: Tensor,  # [rows, k] int64, -1 where padded
    terminals: Sequence[Collection[int]],  # one collection a row
) -> TerminalScores:
    """Scores candidates; a row's `terminals` among them get their Q by the scorer's terminal rule.

    "baseline": they are not scored and exempt. "critic": Q = V(prefix + EOS), EOS being the
    critic's own. "reward": Q = the reward model's score of the response that ends here.
    "included": they are scored like any other candidate.

    Raises ValueError: the rule is "reward" and the scorer has no reward model.
    """
    ends = None if scorer.terminal == "included" else _is_terminal(candidates, terminals)
    if ends is None:
        return TerminalScores(scorer.score(prefixes, candidates), None)
    if scorer.terminal == "critic":
        if scorer.eos_token_id is not None:
            candidates = candidates.masked_fill(ends, scorer.eos_token_id)
        return TerminalScores(scorer.score(prefixes, candidates), None)
    values, baseline = scorer.score(prefixes, candidates.masked_fill(ends, -1))
    if scorer.terminal == "baseline":
        return TerminalScores(Scores(values, baseline), ends)
    rewards = _final_rewards(scorer, prefixes, ends).to(values.device)
    values = torch.where(ends.to(values.device), rewards[:, None], values)
    return TerminalScores(Scores(values, baseline), None)


def _is_terminal(candidates: Tensor, terminals: Sequence[Collection[int]]) -> Tensor | None:
    ids = _ids_of(tuple(map(tuple, terminals)))
    if ids is None:
        return None
    if candidates.device.type == "cpu":
        # A few numbers: numpy begins sooner than torch.
        found = (candidates.numpy()[..., None] == ids.numpy()).any(-1)
        return torch.from_numpy(found) if found.any() else None
    ends = (candidates[..., None] == ids.to(candidates.device, non_blocking=True)).any(-1)
    return ends if bool(ends.any()) else None


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _ids_of(terminals: tuple[tuple[int, ...], ...]) -> Tensor | None:
    """The rows' terminals, int64 [rows, 1, n], or [1, 1, n] where all have the same; or None."""
    rows = terminals[:1] if len(set(terminals)) == 1 else terminals
    width = max(map(len, rows), default=0)
    if not width:
        return None
    # Candidates of -1 are padding, so -2 pads terminals.
    padded = [[*ends, *[-2] * (width - len(ends))] for ends in rows]
    return torch.tensor(padded, dtype=torch.int64)[:, None]


def _final_rewards(scorer: Scorer, prefixes: Sequence[Prefix], ends: Tensor) -> Tensor:
    """Reward of each row's response, ended by the reward model's EOS; NaN for rows with none."""
    reward = scorer.reward
    if reward is None or reward.eos_token_id is None:
        raise ValueError(
            'terminal="reward" was given without a reward model that knows its EOS: '
            "pass load_scorer(..., reward=...)"
        )
    rows = ends.any(-1).nonzero().flatten().tolist()
    last = torch.full((len(rows), 1), reward.eos_token_id, dtype=torch.int64)
    rewards = torch.full((len(prefixes),), torch.nan, dtype=torch.float32)
    rewards[rows] = reward.score([prefixes[i] for i in rows], last).values[:, 0].float().cpu()
    return rewards
