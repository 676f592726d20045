"""Values of prefixes as the server meets them, one JSON line each, for whoever runs it."""

import json
import logging
import time
from collections.abc import Sequence
from hashlib import blake2b

from guided_decode.integrations.vllm.rows import LiveRow
from guided_decode.integrations.vllm.server_config import ServerConfig

logger = logging.getLogger("guided_decode")


class ValueLog:
    """Appends to the file of `value_log`.

    A line has time (seconds since the epoch), prompt and response (tokens so far), value, group (a
    digest of guide_group, or null) and pruned.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Raises ValueError: the file cannot be written."""
        assert config.value_log is not None
        self._every = config.value_log_every
        self._failed = False
        try:
            self._file = open(config.value_log, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"value_log={config.value_log!r} cannot be written: {error}") from None

    def wants(self, length: int) -> bool:
        """Whether a response of so many tokens is logged."""
        return length % self._every == 0

    def write(self, values: Sequence[tuple[LiveRow, int, float]]) -> None:
        """Logs V of responses when they had so many tokens."""
        lines = [
            json.dumps(
                {
                    "time": time.time(),
                    "prompt": row.prompt_length,
                    "response": length,
                    "value": value,
                    "group": group_digest(row.request.pruning.group)
                    if row.request.pruning
                    else None,
                    "pruned": row.sibling is not None and row.sibling.is_pruned,
                }
            )
            for row, length, value in values
        ]
        if not lines or self._failed:
            return
        try:
            self._file.write("\n".join(lines) + "\n")
            self._file.flush()
        except OSError as error:
            self._failed = True
            logger.warning("values are no longer logged to %s: %s", self._file.name, error)


def group_digest(group: str) -> str:
    """What stands for a group's name, which is its clients' secret."""
    return blake2b(group.encode(), digest_size=8).hexdigest()
