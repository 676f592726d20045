"""A policy and a judge whose whole tree can be enumerated: three tokens, of which one ends."""

import hashlib
import math

from guided_decode.search import Continuation, NextTokens
from guided_decode.search.seeds import derive, uniform

VOCAB, END, DEPTH = 3, 2, 6
PROMPT = (0,)


def _numbers(*what):
    digest = hashlib.blake2b(repr(what).encode(), digest_size=24).digest()
    return [int.from_bytes(digest[i : i + 8], "little") / 2.0**64 for i in (0, 8, 16)]


def tempered(p, temperature):
    """Probabilities at another temperature."""
    weights = [each ** (1 / temperature) for each in p]
    return [each / sum(weights) for each in weights]


class ToyPolicy:
    """Probabilities that are a function of the prefix; draws by inverse distribution function."""

    def __init__(self, seed=0):
        self.seed = seed
        self.calls = []

    def probabilities(self, prefix):
        weights = [0.2 + each for each in _numbers("policy", self.seed, tuple(prefix))]
        return [each / sum(weights) for each in weights]

    def extend(self, prefixes, n, *, max_tokens, sampling, seeds):
        self.calls.append(len(prefixes))
        return [
            [self.continuation(tuple(prefix), derive(seed, i), most, how) for i in range(count)]
            for prefix, count, most, how, seed in zip(
                prefixes, n, max_tokens, sampling, seeds, strict=True
            )
        ]

    def next_tokens(self, prefixes, k, *, temperatures, references, entropies=None):
        self.calls.append(len(prefixes))
        return [
            self.likeliest(tuple(prefix), most, heat, wanted)
            for prefix, most, heat, wanted in zip(
                prefixes, k, temperatures, references, strict=True
            )
        ]

    def likeliest(self, prefix, k, temperature, reference=False):
        p = self.probabilities(prefix)
        order = sorted(range(VOCAB), key=lambda i: (-p[i], i))[:k]
        read = [p, tempered(p, temperature)]
        if reference:
            other = self.reference().probabilities(prefix)
            read += [other, tempered(other, temperature)]
        log_probs = [tuple(math.log(each[i]) for i in order) for each in read]
        return NextTokens(
            tuple(order), log_probs[0], log_probs[1], tuple(i == END for i in order),
            -sum(each * math.log(each) for each in p), *log_probs[2:],
        )  # fmt: skip

    def reference(self):
        return ToyPolicy(self.seed + 1000)

    def continuation(self, prefix, seed, most, how):
        tokens, log_probs = (), ()
        while len(tokens) < most and END not in tokens:
            p = self.probabilities(prefix + tokens)
            if how.temperature == 0:
                token = p.index(max(p))
            else:
                point = uniform(seed, len(prefix) + len(tokens))
                token = next(i for i in range(VOCAB) if point < sum(p[: i + 1]) or i == VOCAB - 1)
            tokens, log_probs = (*tokens, token), (*log_probs, math.log(p[token]))
        return Continuation(tokens, log_probs, "eos" if END in tokens else "length")


class ToyJudge:
    """A number for each text, in [-1, 1]."""

    def __init__(self, seed=0):
        self.seed = seed
        self.calls = []

    def value(self, text):
        return 2 * _numbers("judge", self.seed, text.prompt, text.response, text.finished)[0] - 1

    def judge(self, texts):
        self.calls.append(len(texts))
        return [self.value(text) for text in texts]


def responses(depth=DEPTH):
    """All responses: those that end, and those of full length."""
    found, open_ = [], [()]
    while open_:
        one = open_.pop()
        for token in range(VOCAB):
            longer = (*one, token)
            (found if token == END or len(longer) == depth else open_).append(longer)
    return found


def probability(policy, response):
    p = 1.0
    for i, token in enumerate(response):
        p *= policy.probabilities(PROMPT + response[:i])[token]
    return p
