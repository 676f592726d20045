"""Rollouts: what the policy wrote, and what it got for it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Rollout:
    """prompt, response: token ids, the latter with its EOS. reward: None where a critic judges."""

    prompt: list[int]
    response: list[int]
    reward: float | None = None


def load_rollouts(path: Path, tokenizer: Any) -> list[Rollout]:
    """Rollouts of a JSONL file: {"prompt": ..., "response": ..., "reward": 1.0} a line.

    Prompt and response are text, tokenised without special tokens, or lists of token ids; reward
    may be missing. A text response has EOS added where it lacks it.

    Raises ValueError: names the line that is none of these, or whose response is empty.
    """
    rollouts = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            prompt, response = (_ids(row[key], tokenizer) for key in ("prompt", "response"))
            reward = None if row.get("reward") is None else float(row["reward"])
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}:{number}: expected {{"prompt": ..., "response": ..., "reward": ...}}, '
                f"got {line[:80]!r}."
            ) from error
        if not prompt or not response:
            raise ValueError(f"{path}:{number}: prompt and response need at least one token each.")
        if isinstance(row["response"], str) and response[-1] != tokenizer.eos_token_id:
            response.append(tokenizer.eos_token_id)
        rollouts.append(Rollout(prompt, response, reward))
    return rollouts


def _ids(given: Any, tokenizer: Any) -> list[int]:
    if isinstance(given, str):
        return list(tokenizer(given, add_special_tokens=False).input_ids)
    return [int(token) for token in given]
