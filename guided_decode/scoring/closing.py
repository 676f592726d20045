"""How a scorer is ended: only one that is sharded over processes has something to end."""

from collections.abc import Iterator

from guided_decode.cache.closable import Closable
from guided_decode.cache.one_process import OneProcess
from guided_decode.forward.packed_model import PackedModel


class Closing(OneProcess, Closable):
    """A scorer of models in this process; as a context manager it closes itself at the end.

    is_leader: whether this rank scores; the others of a sharded scorer have a `Follower`.
    """

    is_leader = True

    def _packed_models(self) -> Iterator[PackedModel]:
        """The models that it runs."""
        raise NotImplementedError

    def _models_beside(self) -> Iterator[PackedModel]:
        """Those of its reward model and its reference."""
        yield from ()

    def _is_shared(self) -> bool:
        """Whether any weights are those of a model in memory."""
        models = (*self._packed_models(), *self._models_beside())
        return any(model.origin is not None for model in models)

    def freeze(self) -> None:
        """No call from now on looks whether weights changed, its reward model's and reference's
        neither: for whoever loaded it from a path and hands it out to nobody who writes, as
        servers do. What changed until now is followed; later writes are ignored for good.

        Of a sharded scorer the other ranks go on looking.

        Raises ValueError: it shares weights with a model in memory; nothing is frozen then.
        """
        if self._is_shared():
            raise ValueError(
                "a scorer that shares weights with a model in memory follows that model: load it "
                "from a path to freeze it"
            )
        for model in (*self._packed_models(), *self._models_beside()):
            model.freeze()

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
