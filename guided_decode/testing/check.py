"""The contract of scorers as checks: all promises, in order, tried on one scorer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from types import MappingProxyType
from typing import Any

from guided_decode.scorer import Scorer
from guided_decode.testing import answers, meanings, prefixes, refusals, stateless
from guided_decode.testing.bench import Bench
from guided_decode.testing.promise import Broken, BrokenPromise, Promise

_LONGEST, _CLOSE = 40, 1e-4

# By name, in the order in which they are tried: what later ones build on comes first.
PROMISES = MappingProxyType({
    each.name: each
    for each in (
        Promise("protocol", "a scorer has all that guided_decode.Scorer has", answers.protocol),
        Promise("form", "values are float32 [rows, k] and baseline float32 [rows]", answers.form),
        Promise("finite", "each candidate and each prefix has a finite value", answers.finite),
        Promise("padding", "a candidate of -1 is NaN and changes nothing else", answers.padding),
        Promise("nothing", "rows without candidates and calls without rows are answered",
                answers.nothing),
        Promise("repeats", "what is asked twice is answered alike", stateless.repeats),
        Promise("batch", "a row in a batch is a row alone", stateless.batch),
        Promise("row order", "the order of rows changes no answer", stateless.row_order),
        Promise("candidate order", "a candidate's value is the same in any place",
                stateless.candidate_order),
        Promise("lookahead", "a candidate's value is the baseline of the prefix with it",
                meanings.lookahead),
        Promise("cached", "what was asked before changes no answer", stateless.cached),
        Promise("forks", "prefixes that begin alike do not disturb each other", stateless.forks),
        Promise("forms", "a prefix may be a list, a tuple, an array, a tensor or a handle",
                prefixes.forms),
        Promise("handles", "a handle is the ids that it holds now", prefixes.handles),
        Promise("new handles", "a new handle is not taken for one that is gone",
                prefixes.new_handles),
        Promise("eviction", "a handle goes on whatever was forgotten meanwhile",
                prefixes.eviction),
        Promise("arguments", "arguments and answers are the caller's", stateless.arguments),
        Promise("modes", "a scorer works inside torch.inference_mode() and outside",
                stateless.modes),
        Promise("refuses", "what is no row is refused with ValueError, and leaves no trace",
                refusals.refuses),
        Promise("refusal", "refusal() says what score() would refuse", refusals.refusal),
        Promise("terminal", "an end has a score where the terminal rule asks for one",
                meanings.terminal),
        Promise("vocabulary", "with scores_vocabulary one call may have all candidates",
                meanings.vocabulary),
        Promise("reference", "a reference answers with log-probabilities", meanings.reference),
        Promise("counts", "stats count the rows", answers.counts),
    )
})  # fmt: skip


def check_scorer(
    scorer: Scorer,
    *,
    fresh: Callable[[], Scorer] | None = None,
    token_ids: Sequence[int] | None = None,
    longest: int = _LONGEST,
    atol: float = _CLOSE,
    rtol: float = _CLOSE,
    leave_out: Collection[str] = (),
    seed: int = 0,
) -> None:
    """Tries every promise of the contract on a scorer; some 150 small calls of `score`.

    Args:
        scorer: what guides, or will.
        fresh: makes the same scorer anew. With it cached answers are compared with those of one
            that remembers nothing; without it, with those after `scorer.cache.clear()` where there
            is such a thing, and else with each other only.
        token_ids: ids that random prefixes are made of, at least 8; None takes the vocabulary
            without BOS and EOS. For scorers that only some ids mean something to.
        longest: tokens of the longest prefix that is asked, at least 24; what the scorer can take.
        atol, rtol: how far answers that should be equal may lie apart, absolutely and relative to
            them: float32's rounding. A model in bfloat16 needs more, some 1e-2.
        leave_out: names of promises that are not tried.
        seed: of the random prefixes.

    Raises:
        BrokenPromise: an AssertionError; the first promise that does not hold, with the rows and
            the figures.
        ValueError: an argument that is none.
    """
    for broken in _tried(scorer, fresh, token_ids, longest, atol, rtol, leave_out, seed):
        raise broken


def broken_promises(scorer: Scorer, **settings: Any) -> list[BrokenPromise]:
    """Every promise that a scorer breaks; arguments as of `check_scorer`."""
    return list(_tried(scorer, **settings))


def _tried(
    scorer: Scorer,
    fresh: Callable[[], Scorer] | None = None,
    token_ids: Sequence[int] | None = None,
    longest: int = _LONGEST,
    atol: float = _CLOSE,
    rtol: float = _CLOSE,
    leave_out: Collection[str] = (),
    seed: int = 0,
) -> Iterator[BrokenPromise]:
    if unknown := set(leave_out) - set(PROMISES):
        raise ValueError(f"leave_out={sorted(unknown)}: expected names of {', '.join(PROMISES)}")
    if longest < 24 or (token_ids is not None and len(set(token_ids)) < 8):
        raise ValueError(f"longest={longest}, {len(set(token_ids or ()))} token_ids: expected at "
                         "least 24 tokens of a prefix, and 8 ids to make them of")  # fmt: skip
    for promise in PROMISES.values():
        if promise.name in leave_out:
            continue
        bench = Bench(scorer, fresh=fresh, token_ids=token_ids, longest=longest, atol=atol,
                      rtol=rtol, seed=f"{seed} {promise.name}")  # fmt: skip
        if (broken := _kept(promise, bench)) is not None:
            yield broken
            if promise.name == "protocol":
                # The others would stumble over what is missing.
                return


def _kept(promise: Promise, bench: Bench) -> BrokenPromise | None:
    try:
        promise.check(bench)
    except Broken as found:
        broken = BrokenPromise(promise, str(found), found.rows)
        broken.__cause__ = found.__cause__
        return broken
    except Exception as error:
        broken = BrokenPromise(promise, f"{type(error).__name__}: {error}")
        broken.__cause__ = error
        return broken
    return None
