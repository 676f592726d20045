"""A trunk head's folder that names its policy: it stands for both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guided_decode.scoring.trunk_head import FILE_NAME, KIND

# Beside the head, in folders that our own training wrote.
NAME_FILE = "trunk_policy.json"


def write_policy_name(path: Path, policy: str) -> None:
    """Says that the head beside it is read with this policy. Raises OSError."""
    path.write_text(json.dumps({"kind": KIND, "policy": policy}) + "\n")


def with_own_policy(model: Any, kind: str, head: Any) -> tuple[Any, Any]:
    """Model and head as they are; of a folder with a head and its policy's name the policy and it.

    Raises ValueError: the file that names the policy cannot be read.
    """
    if head is not None or kind not in ("auto", KIND) or not isinstance(model, str | Path):
        return model, head
    folder = Path(model)
    path = folder / NAME_FILE
    if not (path.is_file() and (folder / FILE_NAME).is_file()):
        return model, head
    try:
        policy = json.loads(path.read_text())["policy"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} cannot be read: expected {{"kind": "{KIND}", "policy": NAME}}; pass the '
            f"policy as the model and head={str(folder)!r}"
        ) from error
    return str(policy), str(folder)
