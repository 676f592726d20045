"""Instructions whose fulfilment a program checks (after IFEval, arXiv 2311.07911).

A prompt names a topic and two constraints in fixed words, from which `reward` reads them back: any
prompt with those words in it is judged, also one that was not made here.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from guided_decode.smol.topics import Split, topics

# At least this many prompts are made of each topic.
PER_TOPIC = 4
# Short answers are asked for, so that most end by themselves within 64 tokens.
REQUESTS = (
    "Write briefly about {topic}.",
    "Describe {topic} briefly.",
    "Say something short about {topic}.",
    "Write a short note about {topic}.",
)
# Common words, so that a small model hits upon them now and then.
WORDS = ("day", "home", "like", "new", "people", "small")
AVOIDED = ("and", "is", "of", "with")
FIRST_WORDS = ("The", "A", "In", "As", "On")
_COUNTS = {"two": 2, "three": 3}
_CLOSING = " \n\"'”’*)"
# Full stops that end no sentence.
_ABBREVIATED = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e)\.", re.IGNORECASE)
_NUMBER = re.compile(r"(?<=\d)[.,](?=\d)")


@dataclass(frozen=True, slots=True)
class Constraint:
    """One kind of constraint.

    text: as it stands in a prompt, with `{}` for its value. pattern: of a value. values: those that
    prompts are made with; none: no prompt of ours asks for it. holds: whether a response that is
    not empty keeps it, given the value.
    """

    name: str
    text: str
    pattern: str
    values: tuple[str, ...]
    holds: Callable[[str, str], bool]

    def render(self, value: str) -> str:
        """The constraint in words."""
        return self.text.format(value)

    def find(self, prompt: str) -> list[str]:
        """The values with which a prompt asks for it."""
        before, _, after = self.text.partition("{}")
        wanted = f"({self.pattern})" if "{}" in self.text else "()"
        return re.findall(re.escape(before) + wanted + re.escape(after), prompt)


def words(text: str) -> list[str]:
    """The words of a text, in lower case; "don't" and "well-known" are one each."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def sentences(text: str) -> int:
    """How many sentences a text has; what follows the last full stop counts as one."""
    text = _NUMBER.sub("", _ABBREVIATED.sub("", text))
    return sum(bool(words(part)) for part in re.split(r"[.!?…]+", text))


CONSTRAINTS = (
    Constraint(
        "sentences", "Use exactly {} sentences.", "two|three", (),
        lambda text, value: sentences(text) == _COUNTS[value],
    ),
    Constraint(
        "one sentence", "Use only one sentence.", "", ("",), lambda text, _: sentences(text) == 1
    ),
    Constraint(
        "no commas", "Do not use any commas.", "", ("",), lambda text, _: "," not in text
    ),
    Constraint(
        "word", 'Use the word "{}".', r"\w+", WORDS, lambda text, value: value in words(text)
    ),
    Constraint(
        "no word", 'Do not use the word "{}".', r"\w+", AVOIDED,
        lambda text, value: value not in words(text),
    ),
    Constraint(
        "at most", "Use at most {} words.", r"\d+", ("20",),
        lambda text, value: len(words(text)) <= int(value),
    ),
    Constraint(
        "at least", "Use at least {} words.", r"\d+", (),
        lambda text, value: len(words(text)) >= int(value),
    ),
    Constraint(
        "first word", 'Begin with the word "{}".', r"\w+", FIRST_WORDS,
        lambda text, value: words(text)[:1] == [value.lower()],
    ),
    Constraint(
        "short words", "Do not use words of more than {} letters.", r"\d+", ("10",),
        lambda text, value: all(len(word) <= int(value) for word in words(text)),
    ),
    Constraint(
        "full stop", "End with a full stop.", "", (),
        lambda text, _: text.rstrip(_CLOSING).endswith("."),
    ),
)  # fmt: skip
# Those that half a response already tells something of; a full stop at the end is not.
_ASKED = [kind for kind in CONSTRAINTS if kind.values]
# Pairs of which prompts do not ask for both.
_CLASHES = ({"word", "no word"},)


def prompts(split: Split) -> list[str]:
    """The user messages of a split: 580 for training, 100 for validation, 300 held out."""
    return [
        f"{REQUESTS[i % len(REQUESTS)].format(topic=topic)} {_two_constraints(topic, i)}"
        for topic in topics(split)
        for i in range(PER_TOPIC)
    ]


def reward(prompt: str, response: str) -> float:
    """The share of the prompt's constraints that the response keeps; an empty one keeps none.

    Args:
        prompt: a user message, or a rendered chat with it, whose last turn counts.
        response: its text.

    Raises ValueError: the prompt has no constraint in it.
    """
    wanted = constraints_of(prompt)
    text = response.strip()
    if not text:
        return 0.0
    return sum(kind.holds(text, value) for kind, value in wanted) / len(wanted)


def constraints_of(prompt: str) -> list[tuple[Constraint, str]]:
    """The constraints in a prompt with their values. Raises ValueError: there are none."""
    message = prompt.rpartition("<|im_start|>user\n")[2]
    found = [(kind, value) for kind in CONSTRAINTS for value in kind.find(message)]
    if not found:
        raise ValueError(
            f"expected a prompt with a constraint in it, such as {CONSTRAINTS[0].render('two')!r} "
            f"or {CONSTRAINTS[1].text!r}, got {message[:80]!r}"
        )
    return found


def _two_constraints(topic: str, i: int) -> str:
    """Two that go together; the same for the same topic and number, on every machine."""
    rng = random.Random(f"{topic}-{i}")
    while True:
        pair = rng.sample(_ASKED, 2)
        if {kind.name for kind in pair} not in _CLASHES:
            return " ".join(kind.render(rng.choice(kind.values)) for kind in pair)
