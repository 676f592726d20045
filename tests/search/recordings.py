"""A local generator's answers: live, and recorded, for engines that are to give the same."""

import threading

from guided_decode.search import Continuation
from guided_decode.search.seeds import derive


class Live:
    """A generator as the model of a server: a draw from a seed, and whole distributions."""

    def __init__(self, generator):
        self.generator, self._lock = generator, threading.Lock()

    def draw(self, prefix, most, how, seed):
        with self._lock:
            asked = self.generator.extend(
                [prefix], [1], max_tokens=[most], sampling=[how], seeds=[seed]
            )
        return asked[0][0]

    def log_probs(self, prefix):
        with self._lock:
            return distribution(self.generator, prefix)


class Recording:
    """A generator that remembers its answers; `Recorded` and, as the model of a server, `draw` and
    `log_probs` know no others."""

    def __init__(self, generator):
        self.generator = generator
        self.draws, self.distributions, self.nexts = {}, {}, {}

    def extend(self, prefixes, n, *, max_tokens, sampling, seeds):
        answers = self.generator.extend(
            prefixes, n, max_tokens=max_tokens, sampling=sampling, seeds=seeds
        )
        rows = zip(prefixes, max_tokens, sampling, seeds, answers, strict=True)
        for prefix, most, how, seed, own in rows:
            for number, each in enumerate(own):
                drawn_by = 0 if how.temperature == 0 else derive(seed, number)
                self.draws[tuple(prefix), most, how, drawn_by] = each
        return answers

    def next_tokens(self, prefixes, k, **how):
        for prefix in prefixes:
            self.distributions[tuple(prefix)] = distribution(self.generator, prefix)
        answers = self.generator.next_tokens(prefixes, k, **how)
        self.nexts |= dict(zip(_asked(prefixes, k, how), answers, strict=True))
        return answers

    def draw(self, prefix, most, how, seed):
        found = self.draws.get((prefix, most, how, seed))
        if found is None:
            assert (most, how.temperature) == (1, 0), "what was never drawn"
            log_probs = self.distributions[prefix]
            token = max(range(len(log_probs)), key=lambda i: log_probs[i])
            ends = token in self.generator.eos_token_ids
            found = Continuation((token,), (log_probs[token],), "eos" if ends else "length")
        return found

    def log_probs(self, prefix):
        return self.distributions[prefix]


class Recorded:
    """A generator that answers what a `Recording` was asked: a search that asks otherwise fails."""

    def __init__(self, recording):
        self._recording = recording

    def extend(self, prefixes, n, *, max_tokens, sampling, seeds):
        draws = self._recording.draws
        rows = zip(prefixes, n, max_tokens, sampling, seeds, strict=True)
        return [
            [
                draws[tuple(prefix), most, how, 0 if how.temperature == 0 else derive(seed, number)]
                for number in range(count)
            ]
            for prefix, count, most, how, seed in rows
        ]

    def next_tokens(self, prefixes, k, **how):
        return [self._recording.nexts[each] for each in _asked(prefixes, k, how)]


def _asked(prefixes, k, how):
    return list(zip(map(tuple, prefixes), k, *(how[name] for name in sorted(how)), strict=True))


def distribution(generator, prefix):
    """The log-probabilities of all next tokens, at temperature 1."""
    return generator.policy.next_logits([prefix])[0].log_softmax(-1).tolist()
