"""How a scorer is ended: only one that is sharded over processes has something to end."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from guided_decode.cache.closable import Closable
from guided_decode.cache.one_process import OneProcess
from guided_decode.forward.packed_model import PackedModel


@runtime_checkable
class Freezable(Protocol):
    """What can be told that its weights stay what they are."""

    def freeze(self) -> None:
        """Looks at them no more."""


class Closing(OneProcess, Closable):
    """A scorer of models in this process; as a context manager it closes itself at the end.

    is_leader: whether this rank scores; the others of a sharded scorer have a `Follower`.
    """

    is_leader = True

    def _packed_models(self) -> Iterator[PackedModel]:
        """The models that it runs."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Looks at no weights again, its reward model's and its reference's neither: for whoever
        loaded it and hands none of them out, as a server does.

        Raises ValueError: it shares weights with a model in memory, which is followed.
        """
        beside = (getattr(self, "reward", None), getattr(self, "reference", None))
        for part in (*self._packed_models(), *beside):
            if isinstance(part, Freezable):
                part.freeze()

    @property
    def closed(self) -> str | None:
        """Why it scores no more: it was closed, or a process that it needs is lost; or None."""
        leaders = (model.leader for model in self._packed_models() if model.leader is not None)
        return next((leader.closed for leader in leaders if leader.closed is not None), None)

    def close(self) -> None:
        """Ends the processes that follow a sharded scorer, which then scores no more.

        Of any other scorer there is nothing to close.
        """
        for model in self._packed_models():
            if model.leader is not None:
                model.leader.close()
