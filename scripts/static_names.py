"""Names of an unpacked package, looked up in its sources: nothing of it is imported or run."""

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import griffe

# An Alias is a name that leads out of the package: it is there, and nothing more can be said.
Found = griffe.Object | griffe.Alias


class Sources:
    """A package's modules, each read when a name leads to it."""

    def __init__(self, folder: Path, package: str) -> None:
        """folder: where the package lies."""
        self._folder = folder
        self._package = package
        self._modules: dict[str, griffe.Module | None] = {}
        self._under_way: set[tuple[str, str]] = set()

    def find(self, path: str) -> Found | None:
        """What a dotted path leads to, through re-exports and base classes; None if nothing.

        Raises SyntaxError: a module on the way cannot be read by this Python.
        """
        first, *names = path.split(".")
        found: Found | None = self._module(first)
        for name in names:
            if found is None or isinstance(found, griffe.Alias):
                break
            found = self._member(found, name)
        return found

    def attributes_set_by(self, function: griffe.Function) -> set[str]:
        """Attributes that the body assigns, of any object."""
        assert isinstance(function.filepath, Path)
        assert function.lineno is not None
        lines = _code(function.filepath).splitlines()[function.lineno - 1 : function.endlineno]
        nodes = ast.walk(ast.parse(textwrap.dedent("\n".join(lines))))
        return {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }

    def _member(self, owner: griffe.Object, name: str) -> Found | None:
        key = (owner.path, name)
        if key in self._under_way:
            return None
        self._under_way.add(key)
        try:
            if isinstance(owner, griffe.Module):
                return self._of_module(owner, name)
            return self._of_class(owner, name) if isinstance(owner, griffe.Class) else None
        finally:
            self._under_way.remove(key)

    def _of_module(self, module: griffe.Module, name: str) -> Found | None:
        member = module.members.get(name)
        if member is not None:
            return self._followed(member)
        return self._module(f"{module.path}.{name}") or self._starred(module, name)

    def _of_class(self, owner: griffe.Class, name: str) -> Found | None:
        member = owner.members.get(name)
        if member is not None:
            return self._followed(member)
        for base in self._bases(owner):
            found = self._member(base, name)
            if found is not None:
                return found
        return self._set_later(owner, name)

    def _set_later(self, owner: griffe.Class, name: str) -> Found | None:
        """An attribute that methods other than __init__ set."""
        for method in owner.members.values():
            if isinstance(method, griffe.Function) and name in self.attributes_set_by(method):
                return griffe.Attribute(name, parent=owner)
        return None

    def _bases(self, owner: griffe.Class) -> Iterator[griffe.Object]:
        """Base classes that are the package's own."""
        for base in owner.bases:
            path = base if isinstance(base, str) else base.canonical_path
            found = self.find(path) if self._is_own(path) else None
            if isinstance(found, griffe.Object):
                yield found

    def _followed(self, member: Found) -> Found | None:
        if not isinstance(member, griffe.Alias):
            return member
        return self.find(member.target_path) if self._is_own(member.target_path) else member

    def _starred(self, module: griffe.Module, name: str) -> Found | None:
        """A name that `from module import *` brings."""
        for member in module.members.values():
            if not isinstance(member, griffe.Alias) or "/" not in member.name:
                continue
            file = self._file(member.target_path) if self._is_own(member.target_path) else None
            # Reading a file is cheap, parsing hundreds of them is not.
            if file is None or not any(word in _code(file) for word in (name, "import *")):
                continue
            source = self._module(member.target_path)
            found = None if source is None else self._member(source, name)
            if found is not None:
                return found
        return None

    def _is_own(self, path: str) -> bool:
        return path.partition(".")[0] == self._package

    def _module(self, path: str) -> griffe.Module | None:
        if path not in self._modules:
            self._modules[path] = self._read(path)
        return self._modules[path]

    def _read(self, path: str) -> griffe.Module | None:
        parent, _, name = path.rpartition(".")
        # Relative imports are resolved by the modules above.
        above = self._module(parent) if parent else None
        file = self._file(path)
        if file is not None:
            return griffe.visit(name, filepath=file, code=_code(file), parent=above)
        folder = self._folder.joinpath(*path.split("."))
        return griffe.Module(name, filepath=[folder], parent=above) if folder.is_dir() else None

    def _file(self, path: str) -> Path | None:
        place = self._folder.joinpath(*path.split("."))
        files = (place / "__init__.py", place.with_name(f"{place.name}.py"))
        return next((file for file in files if file.is_file()), None)


def _code(file: Path) -> str:
    return file.read_text(encoding="utf-8")
