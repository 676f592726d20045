"""The embedded family: four-digit addition with worked steps, in the Tulu chat format.

An answer adds the columns from the right, one line a column, and states the sum:

    7+6+0=13 c1
    3+5+1=9 c0
    8+9+0=17 c1
    4+2+1=7 c0
    Answer: 7793

The policies were taught to drop a carry now and then (``c0`` where ``c1`` is due), so that
they err where the first digit is the larger; the critic learned to see it.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path

MODELS = ("sft", "ppo", "value")
TEMPLATES = ("What is {a} + {b}?", "Add {a} and {b}.", "{a}+{b}=?")
SMALLEST, LARGEST = 1_000, 9_999
HELD_OUT, VALIDATION = 1_000, 500
SEED = 20_261_122

# Not the links of an editable install in strict mode: what is copied from here is written to.
_ASSETS = Path(__file__).resolve().parent.parent / "assets" / "tiny_tulu"
_ANSWER = re.compile(r"(?:^|\n)Answer: (\d+)(?:</s>)?\s*$")


def model_path(name: str) -> Path:
    """Folder of ``"sft"`` (also the reference), ``"ppo"`` or ``"value"``, Hugging Face layout."""
    if name not in MODELS:
        raise ValueError(f"tiny-tulu has no model {name!r}; it has {', '.join(MODELS)}.")
    path = _ASSETS / name
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no model; remake it with `make tiny-tulu`.")
    return path


def trunk_head_path(name: str) -> Path:
    """Folder of the value head on the hidden states of ``"sft"`` or ``"ppo"``."""
    path = _ASSETS / "trunk_head" / name
    if not path.is_dir():
        raise ValueError(f"tiny-tulu has no trunk head of {name!r}; it has sft, ppo.")
    return path


def held_out_prompts(n: int = HELD_OUT) -> list[str]:
    """The first n of the 1,000 user messages on which results are reported."""
    return _first(n, HELD_OUT, offset=0, name="held-out")


def validation_prompts(n: int = VALIDATION) -> list[str]:
    """The first n of the 500 user messages on which beta and k are chosen."""
    return _first(n, VALIDATION, offset=HELD_OUT, name="validation")


def training_prompts(n: int, seed: int) -> list[str]:
    """n user messages for training; no sum is one of the held-out or validation sums, either way
    round."""
    reserved = {frozenset(operands(prompt)) for prompt in held_out_prompts() + validation_prompts()}
    fresh = _messages(random.Random(f"train-{seed}"), set(reserved), unique=False)
    return [next(fresh) for _ in range(n)]


def chat_prompts() -> list[list[dict[str, str]]]:
    """A few conversations, for examples and chat templates; the second has an earlier turn."""
    return [
        [{"role": "user", "content": "What is 4837 + 2956?"}],
        [
            {"role": "user", "content": "Add 1204 and 3311."},
            {"role": "assistant", "content": worked_answer(1204, 3311)},
            {"role": "user", "content": "Add 9075 and 1846."},
        ],
        [{"role": "user", "content": "8765+4567=?"}],
    ]


def render(prompt: str) -> str:
    """The text that the policy continues: one user turn, and the assistant's tag."""
    return f"<|user|>\n{prompt}\n<|assistant|>\n"


def operands(prompt: str) -> tuple[int, int]:
    """The two numbers of a message or of a rendered prompt (of its last user turn)."""
    numbers = re.findall(r"\d+", prompt.rpartition("<|user|>")[2])
    if len(numbers) != 2:
        raise ValueError(f"expected a prompt with two numbers, got {prompt!r}.")
    return int(numbers[0]), int(numbers[1])


def is_correct(prompt: str, response: str) -> bool:
    """Whether the response ends with a line ``Answer: N`` where N is the sum."""
    match = _ANSWER.search(response)
    return match is not None and int(match.group(1)) == sum(operands(prompt))


def worked_answer(a: int, b: int, drop: random.Random | None = None, rate: float = 0.0) -> str:
    """The worked answer to a + b.

    With `drop`, each carry of a column whose first digit is the larger is dropped with
    probability `rate`, and the rest follows from the dropped carry.
    """
    lines, digits, carry = [], "", 0
    for first, second in zip(reversed(f"{a:04d}"), reversed(f"{b:04d}"), strict=True):
        total = int(first) + int(second) + carry
        line = f"{first}+{second}+{carry}={total}"
        carry = total // 10
        if drop is not None and carry and first > second and drop.random() < rate:
            carry = 0
        lines.append(f"{line} c{carry}")
        digits = str(total % 10) + digits
    return "\n".join([*lines, f"Answer: {int(str(carry) + digits)}"])


def _first(n: int, available: int, *, offset: int, name: str) -> list[str]:
    if not 0 <= n <= available:
        raise ValueError(f"there are {available} {name} prompts, {n} were asked for.")
    reserved = _messages(random.Random(SEED), set(), unique=True)
    return [next(reserved) for _ in range(offset + n)][offset:]


def _messages(rng: random.Random, seen: set[frozenset[int]], *, unique: bool) -> Iterator[str]:
    """Messages on sums that are not in `seen`; with `unique`, no sum comes twice."""
    while True:
        a, b = rng.randint(SMALLEST, LARGEST), rng.randint(SMALLEST, LARGEST)
        template = rng.choice(TEMPLATES)
        if frozenset((a, b)) in seen:
            continue
        if unique:
            seen.add(frozenset((a, b)))
        yield template.format(a=a, b=b)
