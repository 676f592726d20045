"""What a release has of the names that we touch, against how they were read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import griffe
from packaging.version import Version

from guided_decode.integrations.host_surface import Name, Signature, Surface
from scripts.static_names import Found, Sources

_VARIADIC = (griffe.ParameterKind.var_positional, griffe.ParameterKind.var_keyword)


@dataclass(frozen=True, slots=True)
class Difference:
    """A name that is not as it was read. is_optional: we do without."""

    path: str
    what: str
    name: Name
    is_optional: bool = False

    def __str__(self) -> str:
        why = f": {self.name.why}" if self.name.why else ""
        lead = "optional: " if self.is_optional else ""
        return f"{lead}{self.path} {self.what} ({self.name.used_in}{why})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """names: how many paths were looked for, and how many are as they were read."""

    names: int
    differences: list[Difference]

    @property
    def held(self) -> int:
        """How many of the names are as they were read."""
        return self.names - len({difference.path for difference in self.differences})

    @property
    def holds(self) -> bool:
        """Whether everything is there that we cannot do without."""
        return all(difference.is_optional for difference in self.differences)


def compare(surface: Surface, sources: Sources, version: str | None = None) -> Comparison:
    """Looks for every name of the surface.

    version: of the release; without one, names that came late are expected too.
    """
    expected = [name for name in surface.names if _is_due(name, version)]
    return Comparison(
        len({path for name in expected for path in _paths(name)}),
        [difference for name in expected for difference in _differences(name, sources)],
    )


def _is_due(name: Name, version: str | None) -> bool:
    return name.since is None or version is None or Version(version) >= Version(name.since)


def _paths(name: Name) -> list[str]:
    """Everything that a record names."""
    attributes = (*name.has, *name.may_have)
    members = [f"{name.path}.{attribute}" for attribute in attributes]
    return [name.path, *members, *(_setting(name, attribute) for attribute in name.may_set)]


def _setting(name: Name, attribute: str) -> str:
    return f"{name.path} -> {attribute}"


def _differences(name: Name, sources: Sources) -> Iterator[Difference]:
    found = sources.find(name.path)
    if found is None:
        yield Difference(name.path, "is not there", name)
    elif name.takes is not None and not _fits(name.takes, found):
        yield Difference(name.path, f"takes {_shown(found)}, not {name.takes}", name)
    for attribute in (*name.has, *name.may_have):
        what = _attribute_differs([sources.find(f"{name.path}.{a}") for a in attribute.split("|")])
        if what is not None:
            yield Difference(f"{name.path}.{attribute}", what, name, attribute in name.may_have)
    for attribute in name.may_set:
        if isinstance(found, griffe.Function) and attribute not in sources.attributes_set_by(found):
            yield Difference(_setting(name, attribute), "is not set", name, is_optional=True)


def _attribute_differs(either: Sequence[Found | None]) -> str | None:
    found = next((each for each in either if each is not None), None)
    if found is None:
        return "is not there"
    is_method = isinstance(found, griffe.Function)
    return f"is called, {_shown(found)}, not read" if is_method else None


def _fits(signature: Signature, found: Found) -> bool:
    """Whether a call by this signature reaches a function with these parameters."""
    if isinstance(found, griffe.Alias):
        return True
    if not isinstance(found, griffe.Function):
        return False
    named = _named(found)
    wanted = [set(name.split("|")) for name in (*signature.in_order, *signature.by_name)]
    in_order = all(
        parameter.name in names and parameter.kind is not griffe.ParameterKind.keyword_only
        for parameter, names in zip(named, wanted[: len(signature.in_order)], strict=False)
    )
    known = {parameter.name for parameter in named}
    others = [p for p in named if not any(p.name in names for names in wanted)]
    takes_any = any(p.kind is griffe.ParameterKind.var_keyword for p in found.parameters)
    return (
        in_order
        and all(names & known for names in wanted)
        and (takes_any or not signature.any_name)
        and not any(signature.exact or parameter.required for parameter in others)
    )


def _named(function: griffe.Function) -> list[griffe.Parameter]:
    """The parameters that have a name of their own, without self or cls."""
    named = [p for p in function.parameters if p.kind not in _VARIADIC]
    is_method = function.parent is not None and function.parent.is_class
    return named[1:] if is_method and "staticmethod" not in function.labels else named


def _shown(found: Found) -> str:
    """A function's parameters, as they could be written; of what is no function, its kind."""
    if not isinstance(found, griffe.Function):
        return f"no arguments, being of kind {found.kind.value}"
    stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
    named = _named(found)
    shown = [
        f"{stars.get(p.kind, '')}{p.name}{'' if p.required or p.kind in stars else '=…'}"
        for p in found.parameters
        if p in named or p.kind in stars
    ]
    return f"({', '.join(shown)})"
