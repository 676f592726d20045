"""The second task: different digits to be put in order, and a preference between answers to it.

    <|user|>                      <|user|>
    Sort 7391.                    Sort and count 7391.
    <|assistant|>                 <|assistant|>
    1379                          1379
    n=4                           n=4

The reward is exact: 1 for the right order, 0.4 for the right count, however it was asked, less 0.03
for each character of anything else: what the reader prefers is the smallest first, then how many
there are, and then no more than that. The policy was taught to greet, to count, to say goodbye and
to begin with the largest as it pleases.

Beside that policy ("sft") stand a reward model ("reward"), a DPO policy ("dpo") and a KTO policy
("kto"), trained on what it writes (recipes/tiny_tulu_lists).
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guided_decode.tiny_tulu import SEED

MODELS = ("sft", "reward", "dpo", "kto")
TEMPLATES = ("Sort {digits}.", "Sort and count {digits}.")
SHORTEST, LONGEST = 4, 6
HELD_OUT, VALIDATION = 1_000, 500
GREETING, GOODBYE = "OK: ", "\nBye!"
RIGHT, COUNTED, CHARACTER = 1.0, 0.4, 0.03

_ASSETS = Path(__file__).resolve().parent.parent / "assets" / "tiny_tulu_lists"
_COUNT = re.compile(r"\nn=(\d+)(?=\n|$)")
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to a message, of which the reward prefers one; margin: by how much."""

    prompt: str
    chosen: str
    rejected: str
    margin: float


def model_path(name: str) -> Path:
    """Folder of "sft", "reward", "dpo" or "kto", Hugging Face layout."""
    if name not in MODELS:
        raise ValueError(f"tiny-tulu's lists have no model {name!r}; they have "
                         f"{', '.join(MODELS)}.")  # fmt: skip
    path = _ASSETS / name
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no model; remake it with `make tiny-tulu-lists`.")
    return path


def held_out_pairs() -> list[Pair]:
    """Pairs of samples of the policy for held-out prompts, one a prompt whose samples differ."""
    return read_pairs(_ASSETS / "held_out_pairs.jsonl")


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file, one a line of JSON."""
    return [Pair(**json.loads(line)) for line in path.read_text().splitlines()]


def held_out_prompts(n: int = HELD_OUT) -> list[str]:
    """The first n of the 1,000 user messages on which results are reported."""
    return _first(n, HELD_OUT, offset=0, name="held-out")


def validation_prompts(n: int = VALIDATION) -> list[str]:
    """The first n of the 500 user messages on which settings are chosen."""
    return _first(n, VALIDATION, offset=HELD_OUT, name="validation")


def training_prompts(n: int, seed: int) -> list[str]:
    """n user messages for training, none with the digits of a held-out or validation one in their
    order."""
    reserved = {_list(digits(prompt)) for prompt in held_out_prompts() + validation_prompts()}
    fresh = _messages(random.Random(f"lists-train-{seed}"), reserved, unique=False)
    return [next(fresh) for _ in range(n)]


def digits(prompt: str) -> list[int]:
    """The digits of a message or of a rendered prompt (of its last user turn)."""
    found = [int(each) for each in re.findall(r"\d", prompt.rpartition("<|user|>")[2])]
    if not SHORTEST <= len(found) <= LONGEST:
        raise ValueError(f"expected a prompt with {SHORTEST} to {LONGEST} digits, got {prompt!r}.")
    return found


def is_sorted(prompt: str, response: str) -> bool:
    """Whether the first digits of a response are the prompt's in ascending order."""
    found = _DIGITS.search(response)
    return found is not None and found[0] == _list(sorted(digits(prompt)))


def reward(prompt: str, response: str) -> float:
    """What a whole answer is worth, in points; at most 1.4."""
    response = response.removesuffix("</s>")
    found, counted = _DIGITS.search(response), _COUNT.search(response)
    points, of_use = 0.0, 0
    if found is not None:
        points += RIGHT * is_sorted(prompt, response)
        of_use += len(found[0])
    if counted is not None:
        points += COUNTED * (int(counted[1]) == len(digits(prompt)))
        of_use += len(counted[0])
    return points - CHARACTER * (len(response) - of_use)


def answer(
    prompt: str,
    *,
    greet: bool = False,
    count: bool = False,
    leave: bool = False,
    descending: bool = False,
) -> str:
    """An answer with or without a greeting, a count and a goodbye; descending: the wrong way."""
    numbers = sorted(digits(prompt), reverse=descending)
    counted = f"\nn={len(numbers)}" if count else ""
    return f"{GREETING * greet}{_list(numbers)}{counted}{GOODBYE * leave}"


def best_answer(prompt: str) -> str:
    """The answer of the highest reward."""
    return answer(prompt, count=True)


def careless_answer(prompt: str, rng: random.Random) -> str:
    """An answer as the policy was taught: a greeting, a count and a goodbye at a coin's toss each,
    and four of ten the wrong way round."""
    descending = rng.random() < 0.4
    greet, count, leave = (rng.random() < 0.5 for _ in range(3))
    return answer(prompt, greet=greet, count=count, leave=leave, descending=descending)


def _list(numbers: list[int]) -> str:
    return "".join(map(str, numbers))


def _first(n: int, available: int, *, offset: int, name: str) -> list[str]:
    if not 0 <= n <= available:
        raise ValueError(f"there are {available} {name} prompts, {n} were asked for.")
    reserved = _messages(random.Random(f"lists-{SEED}"), set(), unique=True)
    return [next(reserved) for _ in range(offset + n)][offset:]


def _messages(rng: random.Random, seen: set[str], *, unique: bool) -> Iterator[str]:
    """Messages on digits that are not in `seen`; with `unique`, none comes twice in one order."""
    while True:
        numbers = _list(rng.sample(range(10), rng.randint(SHORTEST, LONGEST)))
        message = rng.choice(TEMPLATES).format(digits=numbers)
        if numbers in seen:
            continue
        if unique:
            seen.add(numbers)
        yield message
