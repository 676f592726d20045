"""What we touch of an engine, as data: names, attributes and signatures, and where we use them.

A name that may have been renamed is written with both, "cache|past_key_values".
`scripts/host_surface.py` holds the records against a release, without importing it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Signature:
    """The parameters of a function that we rely on; self and cls are not counted.

    in_order: from the first one on. by_name: wherever they stand. any_name: it takes keywords that
    it does not name. exact: it has no others, because the engine calls ours in its place.
    """

    in_order: tuple[str, ...] = ()
    by_name: tuple[str, ...] = ()
    any_name: bool = False
    exact: bool = False

    def __str__(self) -> str:
        named = [f"{name}=" for name in self.by_name]
        return f"({', '.join([*self.in_order, *named, *['**'] * self.any_name])})"


@dataclass(frozen=True, slots=True)
class Name:
    """A module, class, function or attribute of an engine.

    path: where we import it from, or where it is defined if we only meet its objects.
    used_in: our file.
    has: attributes of its objects. may_have: those that we do without, where there are none.
    takes: how it is called.
    may_set: attributes that its body sets on other objects, which we do without likewise.
    since: the first version that has it, where that is not the oldest one we support.
    why: what it is to us, where that is not plain.
    """

    path: str
    used_in: str
    has: tuple[str, ...] = ()
    may_have: tuple[str, ...] = ()
    takes: Signature | None = None
    may_set: tuple[str, ...] = ()
    since: str | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Surface:
    """Everything that we touch of one engine, but for what has long been the same for everyone.

    package: its import name. distributions: who has it. read_in: the version that the records were
    read in. holds_in: others that were compared with it and hold.
    """

    package: str
    distributions: tuple[str, ...]
    read_in: str
    holds_in: tuple[str, ...]
    names: tuple[Name, ...]


def called(*in_order: str, by_name: tuple[str, ...] = (), any_name: bool = False) -> Signature:
    """What we call, or stand in for: we give these arguments, and nothing else may be required."""
    return Signature(in_order, by_name, any_name)


def overridden(*in_order: str) -> Signature:
    """What the engine calls on our class: exactly these arguments may come."""
    return Signature(in_order, exact=True)
