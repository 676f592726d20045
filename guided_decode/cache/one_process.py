"""How objects that hold a model, a cache or a lock are copied, and that they are never pickled."""

import copy
from typing import Any, NoReturn, Self


class OneProcess:
    """Its copies are made attribute by attribute; it stays in the process that loaded it."""

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update({name: copy.deepcopy(each, memo) for name, each in vars(self).items()})
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled: it holds a model with its cache, which "
            "belong to one process; call load_scorer in each process instead"
        )
