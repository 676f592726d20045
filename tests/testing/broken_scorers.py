"""Scorers that each break one promise, the way that such a scorer really goes wrong."""

from __future__ import annotations

import math

import torch

from guided_decode import Scores
from guided_decode.prefix import PrefixHandle
from tests.testing.plain_scorer import EOS, VOCAB, PlainScorer


class WithoutRefusal(PlainScorer):
    @property
    def refusal(self):
        raise AttributeError


class InDoubles(PlainScorer):
    def answer(self, rows, candidates):
        return Scores(*(each.double() for each in super().answer(rows, candidates)))


class OverflowingWhenLong(PlainScorer):
    """As a model in float16 does; the other promises are tried with shorter prefixes."""

    def answer(self, rows, candidates):
        values, baseline = super().answer(rows, candidates)
        if len(rows) == 4 and [len(ids) for ids in rows[:3]] == [2, 7, 21]:
            values[3] = math.inf
        return Scores(values, baseline)


class PaddingAsATokenOfItsOwn(PlainScorer):
    def value(self, ids, token):
        return self.function((*ids, token % VOCAB))


class WithoutRows(PlainScorer):
    def answer(self, rows, candidates):
        if not rows:
            raise IndexError("list index out of range")
        return super().answer(rows, candidates)


class Noisy(PlainScorer):
    """Dropout that was left on, say, on one of the layers."""

    def __init__(self):
        super().__init__()
        self.last = None

    def answer(self, rows, candidates):
        values, baseline = super().answer(rows, candidates)
        again = (rows, candidates.tolist()) == self.last and [*map(len, rows)] == [6, 13]
        self.last = rows, candidates.tolist()
        return Scores(values + 0.01 * again, baseline)


class PaddedOnTheRight(PlainScorer):
    """A batch of four or more is padded, and the padding is read."""

    def answer(self, rows, candidates):
        if len(rows) == 4 and candidates.shape[1] and len({len(ids) for ids in rows}) == 4:
            longest = max(len(ids) for ids in rows)
            if longest == 40:
                rows = [(*ids, *[0] * (longest - len(ids))) for ids in rows]
        return super().answer(rows, candidates)


class SortedByLength(PlainScorer):
    """Rows are sorted, and not put back."""

    def answer(self, rows, candidates):
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        if [len(ids) for ids in rows] in ([15, 3, 8, 11], [8, 15, 11, 3]):
            rows, candidates = [rows[i] for i in order], candidates[order]
        return super().answer(rows, candidates)


class OneCandidateSeesAnother(PlainScorer):
    """The attention mask lets a candidate see the one before it, where ids go down."""

    def answer(self, rows, candidates):
        values, baseline = super().answer(rows, candidates)
        if candidates.shape[1] == 2 and [len(ids) for ids in rows] == [10, 5]:
            values[:, 1] += 0.1
        return Scores(values, baseline)


class ReadsTheTokenBefore(PlainScorer):
    """Off by one: V of a prefix is read a token too early."""

    def answer(self, rows, candidates):
        values, _ = super().answer(rows, candidates)
        baseline = [self.function(ids[:-1]) for ids in rows]
        return Scores(values, torch.tensor(baseline, dtype=torch.float32))


class DriftingCache(PlainScorer):
    """A cached prefix goes on from where it was, with positions that begin anew."""

    def __init__(self):
        super().__init__()
        self.known = {}

    def answer(self, rows, candidates):
        values, baseline = super().answer(rows, candidates)
        for i, ids in enumerate(rows):
            if ids not in self.known:
                before = self.known.get(ids[:-1])
                # From the third token on that was added one by one.
                steps = 0 if before is None else before + 1
                self.known[ids] = steps
            if self.known[ids] >= 3:
                values[i] += 0.1
                baseline[i] += 0.1
        return Scores(values, baseline)


class MistakesForks(PlainScorer):
    """The cache looks up the first tokens and the length."""

    def __init__(self):
        super().__init__()
        self.known = {}

    def answer(self, rows, candidates):
        rows = [self.known.setdefault((ids[:13], len(ids)), ids) for ids in rows]
        return super().answer(rows, candidates)


class TakesNoTensors(PlainScorer):
    def read(self, prefix):
        if isinstance(prefix, torch.Tensor):
            raise TypeError("unhashable tensor")
        return super().read(prefix)


class HandlesByLength(PlainScorer):
    """A handle that has not grown is taken for unchanged."""

    def __init__(self):
        super().__init__()
        self.known = {}

    def read(self, prefix):
        ids = super().read(prefix)
        if not isinstance(prefix, PrefixHandle):
            return ids
        handle, before = self.known.get(id(prefix), (None, ()))
        if handle is prefix and len(before) == len(ids):
            return before
        self.known[id(prefix)] = prefix, ids
        return ids


class HandlesByAddress(PlainScorer):
    """A handle is known by id(), which another one gets when it is gone.

    No two checks ask for handles of one length, so that only one of them meets this by chance.
    """

    def __init__(self):
        super().__init__()
        self.known = {}

    def read(self, prefix):
        ids = super().read(prefix)
        if not isinstance(prefix, PrefixHandle):
            return ids
        return self.known.setdefault((id(prefix), prefix.version, len(ids)), ids)


class LosesHandles(PlainScorer):
    """Of a handle that was forgotten only what is new since is read."""

    def __init__(self):
        super().__init__()
        self.known = {}

    def read(self, prefix):
        ids = super().read(prefix)
        if not isinstance(prefix, PrefixHandle):
            return ids
        key = (id(prefix), prefix.version)
        handle, start, length = self.known.pop(key, (prefix, 0, 0))
        if handle is prefix and length and len(self.known) >= 16:
            start = length - 1
        self.known[key] = prefix, start, len(ids)
        while len(self.known) > 64:
            del self.known[next(iter(self.known))]
        return ids[start:]


class KeepsItsAnswer(PlainScorer):
    """What it hands out is what it looks up."""

    def __init__(self):
        super().__init__()
        self.known = {}

    def answer(self, rows, candidates):
        key = str((rows, candidates.tolist()))
        if key not in self.known:
            self.known[key] = super().answer(rows, candidates)
        return self.known[key]


class WritesInPlace(PlainScorer):
    """Its buffer was made in inference mode, and is written to outside of it."""

    def __init__(self):
        super().__init__()
        self.buffer = None

    def answer(self, rows, candidates):
        values, baseline = super().answer(rows, candidates)
        if torch.is_inference_mode_enabled() and self.buffer is None:
            self.buffer = torch.zeros(1)
        if self.buffer is not None:
            buffer, self.buffer = self.buffer, None
            buffer.add_(1.0)
            self.buffer = buffer
        return Scores(values, baseline)


class WrapsIds(PlainScorer):
    """An embedding takes an id of -1 for the last one."""

    def check(self, prefixes, candidates):
        if prefixes and not isinstance(prefixes[-1], PrefixHandle) and len(prefixes) == 2:
            ids = list(prefixes[-1])
            if ids and ids[-1] == -1:
                prefixes = [prefixes[0], [*ids[:-1], VOCAB - 1]]
        super().check(prefixes, candidates)


class RefusesNothing(PlainScorer):
    def refusal(self, prefix, candidates):
        return None


class NoValueAtEos(PlainScorer):
    """A critic that was never trained at EOS, with the rule of one that was."""

    def value(self, ids, token):
        return math.nan if token == EOS else super().value(ids, token)


class LimitedWidth(PlainScorer):
    """It says that it scores the vocabulary, and scores the first 50 candidates."""

    scores_vocabulary = True

    def answer(self, rows, candidates):
        values, baseline = super().answer(rows, candidates)
        values[:, 50:] = 0.0
        return Scores(values, baseline)


class ReferenceOfLogits(PlainScorer):
    """Its reference hands out logits."""

    @property
    def reference(self):
        return self

    def log_probs(self, prefixes, candidates):
        return self.score(prefixes, candidates).values.abs()


class CountsNothing(PlainScorer):
    def score(self, prefixes, candidates):
        scores = super().score(prefixes, candidates)
        self.stats.reset()
        return scores


# By the promise that each breaks.
BROKEN = {
    "protocol": WithoutRefusal,
    "form": InDoubles,
    "finite": OverflowingWhenLong,
    "padding": PaddingAsATokenOfItsOwn,
    "nothing": WithoutRows,
    "repeats": Noisy,
    "batch": PaddedOnTheRight,
    "row order": SortedByLength,
    "candidate order": OneCandidateSeesAnother,
    "lookahead": ReadsTheTokenBefore,
    "cached": DriftingCache,
    "forks": MistakesForks,
    "forms": TakesNoTensors,
    "handles": HandlesByLength,
    "new handles": HandlesByAddress,
    "eviction": LosesHandles,
    "arguments": KeepsItsAnswer,
    "modes": WritesInPlace,
    "refuses": WrapsIds,
    "refusal": RefusesNothing,
    "terminal": NoValueAtEos,
    "vocabulary": LimitedWidth,
    "reference": ReferenceOfLogits,
    "counts": CountsNothing,
}
