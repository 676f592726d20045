"""What has an end: processes, connections, threads."""

from typing import Self


class Closable:
    """Has `close`; as a context manager it closes itself at the end."""

    def close(self) -> None:
        """Ends what it holds."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
