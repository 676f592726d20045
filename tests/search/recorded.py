"""A generator that records what it answers, and one that answers from the record alone."""


class Recorder:
    """Hands requests on, and keeps each prefix's answer."""

    def __init__(self, generator):
        self._generator = generator
        self.record = {}

    def extend(self, prefixes, n, *, max_tokens, sampling, seeds):
        answers = self._generator.extend(
            prefixes, n, max_tokens=max_tokens, sampling=sampling, seeds=seeds
        )
        asked = zip(map(tuple, prefixes), n, max_tokens, sampling, seeds, strict=True)
        self.record |= dict(zip(asked, answers, strict=True))
        return answers

    def next_tokens(self, prefixes, k, *, temperatures, references):
        answers = self._generator.next_tokens(
            prefixes, k, temperatures=temperatures, references=references
        )
        asked = zip(map(tuple, prefixes), k, temperatures, references, strict=True)
        self.record |= dict(zip(asked, answers, strict=True))
        return answers


class Recorded:
    """Answers what was asked before, and nothing else: a search that asks otherwise fails."""

    def __init__(self, record):
        self._record = record

    def extend(self, prefixes, n, *, max_tokens, sampling, seeds):
        asked = zip(map(tuple, prefixes), n, max_tokens, sampling, seeds, strict=True)
        return [self._record[each] for each in asked]

    def next_tokens(self, prefixes, k, *, temperatures, references):
        asked = zip(map(tuple, prefixes), k, temperatures, references, strict=True)
        return [self._record[each] for each in asked]
