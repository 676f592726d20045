"""Where the models of both tasks lie in this package."""

from pathlib import Path

from guided_decode import tiny_tulu
from guided_decode.tiny_tulu import lists


def embedded_path(name: str) -> Path:
    """Folder of a model of the sums ("sft") or, as "lists/sft", of one of the lists."""
    task, _, part = name.rpartition("/")
    return lists.model_path(part) if task == "lists" else tiny_tulu.model_path(part)
