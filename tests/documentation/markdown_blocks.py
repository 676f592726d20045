"""The code of the Markdown files: fenced blocks with their marks, and inline code.

A mark is an HTML comment on the line before a fence, which no reader sees:

    <!-- run: needs network, gpu; continues -->

Its clauses, and the blocks that may have them:

    needs WHY, ...    the block is not run as it stands, because it takes one of NEEDS: a shell's
                      commands are checked and not run, Python runs with the stand-ins of that name
    continues [FILE]  Python: goes on after the Python block before it, or after FILE's last one
    extra NAME, ...   Python: takes these extras of the package, and what comes with them; blocks do
                      without the others, even where they are installed
    given NAME, ...   Python: names that are the reader's own; `stand_ins.GIVEN` makes them
    text              no language: a formula, or anything else that nobody runs
    prints NAME       no language: what a command prints; `outputs.OUTPUTS` compares it
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

NEEDS = {
    "network": "weights or packages that have to be downloaded",
    "gpu": "a GPU, or several",
    "minutes": "more than a minute, or it does not end by itself",
    "server": "a server of `guided-decode serve`, on its usual port",
    "names": "names in capitals, which the reader replaces",
}
PYTHON, SHELLS, NO_LANGUAGE = "python", ("sh", "bash"), ""
CLAUSES = {
    PYTHON: {"needs", "continues", "extra", "given"},
    NO_LANGUAGE: {"text", "prints"},
    "sh": {"needs"},
    "bash": {"needs"},
}

_FENCE = re.compile(r" *(?P<fence>`{3,}|~{3,})(?P<language>.*)")
_MARK = re.compile(r"<!-- run: (?P<clauses>.+) -->")
_LIKE_A_MARK = re.compile(r"<!--\s*run")
_INLINE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_OTHERS_FOLDERS = ("build", "dist", "out")
_HISTORY = "CHANGELOG.md"
_REPORTS = "benchmarks/results/"


# The clauses with their words.
Mark = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Block:
    """A fenced block. file: from the root; line: of its first line of code; mark: its clauses."""

    file: str
    line: int
    language: str
    code: str
    mark: Mark = ()

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    def has(self, clause: str) -> bool:
        return clause in dict(self.mark)

    def clause(self, clause: str) -> tuple[str, ...]:
        """The words of a clause; () where it has none, and where the mark lacks it."""
        return dict(self.mark).get(clause, ())


@dataclass(frozen=True)
class Inline:
    """A span of inline code, with its line."""

    file: str
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.code}"


def markdown_files(root: Path = ROOT) -> list[str]:
    """Every Markdown file of the repository but those that speak of the past: its history, and
    reports of benchmarks."""
    folders = [
        folder
        for folder in root.iterdir()
        if folder.is_dir()
        and not folder.name.startswith(".")
        and folder.name not in _OTHERS_FOLDERS
        and not (folder / "pyvenv.cfg").exists()
    ]
    paths = [*root.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]
    names = (path.relative_to(root).as_posix() for path in paths if path.name != _HISTORY)
    return sorted(name for name in names if not name.startswith(_REPORTS))


def read_blocks(file: str, text: str | None = None) -> list[Block]:
    """The blocks of a file, in order.

    Raises ValueError: a block that nothing here could run, or a mark that means nothing; names
    file and line.
    """
    lines = _text(file, text).splitlines()
    blocks: list[Block] = []
    for start, end in _fences(file, lines):
        before = lines[start - 1] if start else ""
        language = _FENCE.fullmatch(lines[start])["language"].strip()
        if language not in CLAUSES:
            raise ValueError(f"{file}:{start + 1}: a block in {language!r}: expected one of "
                             f"{', '.join(map(repr, CLAUSES))}")  # fmt: skip
        mark = _read_mark(f"{file}:{start}", before, language)
        code = "\n".join(lines[start + 1 : end]) + "\n"
        blocks.append(Block(file, start + 2, language, code, mark))
    return blocks


def read_inline(file: str, text: str | None = None) -> list[Inline]:
    """The inline code of a file, in order; a span that goes over a line's end is one line."""
    lines = _text(file, text).splitlines()
    for start, end in _fences(file, lines):
        lines[start : end + 1] = [""] * (end + 1 - start)
    prose = "\n".join(lines)
    return [
        Inline(file, prose.count("\n", 0, found.start()) + 1, " ".join(found[2].split()))
        for found in _INLINE.finditer(prose)
    ]


def _text(file: str, text: str | None) -> str:
    return (ROOT / file).read_text(encoding="utf-8") if text is None else text


def _fences(file: str, lines: list[str]) -> Iterator[tuple[int, int]]:
    """The indices of each block's fences. Raises ValueError for code outside them."""
    opened: tuple[int, str] | None = None
    for i, line in enumerate(lines):
        found = _FENCE.fullmatch(line)
        if opened is not None:
            if found and not found["language"].strip() and found["fence"].startswith(opened[1]):
                yield opened[0], i
                opened = None
        elif found:
            opened = i, found["fence"]
        elif line.startswith("    ") and not (i and lines[i - 1].strip()):
            raise ValueError(f"{file}:{i + 1}: an indented block: fence it")
        elif _LIKE_A_MARK.search(line) and not _FENCE.fullmatch("".join(lines[i + 1 : i + 2])):
            raise ValueError(f"{file}:{i + 1}: a mark that stands before no block: {line}")
    if opened is not None:
        raise ValueError(f"{file}:{opened[0] + 1}: a block without an end")


def _read_mark(where: str, line: str, language: str) -> Mark:
    mark = _MARK.fullmatch(line)
    if mark is None and _LIKE_A_MARK.search(line):
        raise ValueError(f"{where}: {line}: expected <!-- run: CLAUSE; CLAUSE -->")
    clauses = {}
    for clause in mark["clauses"].split("; ") if mark else ():
        word, _, rest = clause.partition(" ")
        if word not in CLAUSES[language]:
            raise ValueError(f"{where}: the clause {clause!r} before a block in {language!r}: "
                             f"expected one of {', '.join(sorted(CLAUSES[language]))}")  # fmt: skip
        clauses[word] = tuple(rest.split(", ")) if rest else ()
    unknown = set(clauses.get("needs", ())) - set(NEEDS)
    if unknown or clauses.get("needs") == ():
        raise ValueError(f"{where}: needs {', '.join(unknown)}: expected {', '.join(NEEDS)}")
    if language == NO_LANGUAGE and len(clauses) != 1:
        raise ValueError(f"{where}: a block without a language: name its language, or mark it as "
                         "text, or as what a command prints")  # fmt: skip
    return tuple(clauses.items())
