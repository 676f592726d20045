"""A model that is followed: its weights, and the adapters in them, may change between two calls."""

from typing import Any, Self

from transformers import PreTrainedModel

from guided_decode.cache.one_process import OneProcess
from guided_decode.cache.prefix_cache import PrefixCache
from guided_decode.forward.layer_trial import join_again
from guided_decode.forward.weights import WeightWatch, origin_of


class FollowedModel(OneProcess):
    """What a scorer runs: a model of its own, or a copy that shares the weights of a caller's.

    changes: how often the model was not what it was, for those who keep something made of it.
    """

    cache: PrefixCache

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        """name: what errors call it."""
        self.model = model
        self.origin = origin_of(model)
        self.name = name
        self.vocab_size = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        self.changes = 0
        self._frozen = False
        self._watch: WeightWatch

    def _prepare(self) -> None:
        """Makes the model ready for packed forwards, and ends with `_watch_from_now`."""
        raise NotImplementedError

    def _tell_of_change(self) -> None:
        """Hands it on to whoever else runs the model."""
        raise NotImplementedError

    def _watch_from_now(self) -> None:
        self._watch = self._new_watch()

    def _new_watch(self) -> WeightWatch:
        if self.origin is None:
            return WeightWatch((self.model,))
        return WeightWatch(self.origin.watched, self.origin.adapters)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        watch = self._watch
        memo[id(watch)] = watch
        copied = super().__deepcopy__(memo)
        if self.origin is None:
            join_again(copied.model)
            copied._watch_from_now()
            # Of a copy nobody has said that its weights stay.
            copied._frozen = False
        # Else it has seen the caller's model as often as this one has.
        return copied

    def changed(self) -> bool:
        """Whether its weights, or the adapters in them, are not what they were."""
        return not self._frozen and self._watch.changed()

    def freeze(self) -> None:
        """Follows the weights once more, and looks at them no more: whoever calls it holds the
        model alone, and never writes. Of 30 layers a look takes some 65 µs a call."""
        with self.cache.lock:
            self.follow()
            self._frozen = True

    def follow(self) -> None:
        """Follows the weights, and the adapters in them, if they changed since the last call.

        The cache is then empty, what was a copy of the caller's model is a new one, and `changes`
        is one more.

        Raises:
            ValueError: the model has another dtype, device or vocabulary now.
        """
        if not self.changed():
            return
        # Whatever comes of it, no answer may come from what was cached before.
        self.cache.clear()
        self._tell_of_change()
        model = self.model if self.origin is None else self.origin.read()
        self._check_like(model)
        self.changes += 1
        self.model = model
        self._prepare()

    def _check_like(self, model: PreTrainedModel) -> None:
        pool, vocab = self.cache.pool, len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        given = [str(model.dtype), str(model.device), vocab]
        wanted = [str(pool.keys[0].dtype), str(pool.device), self.vocab_size]
        if given != wanted:
            now, before = (
                f"{kind} on {place} with {n} tokens" for kind, place, n in (given, wanted)
            )
            raise ValueError(
                f"the model that {self.name} was loaded from has become {now}, where it was "
                f"{before}: a scorer follows its weights and adapters only; call load_scorer again"
            )
