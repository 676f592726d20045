"""Whether a release of an engine still has what we touch of it; nothing of it is run.

    python -m scripts.host_surface                     # what is installed
    python -m scripts.host_surface vllm==0.33.0        # a release: its wheel alone is downloaded
    python -m scripts.host_surface ./some.whl ./some/unpacked/folder

Prints each name that is not as `integrations/*/surface.py` has it. Ends with 0 where everything
is there that we cannot do without, with 1 where it is not, and with 2 where nothing could be read.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from guided_decode.integrations.host_surface import Surface
from guided_decode.integrations.lm_eval import surface as lm_eval
from guided_decode.integrations.transformers import surface as transformers
from guided_decode.integrations.vllm import surface as vllm
from scripts.static_names import Sources
from scripts.surface_check import compare


class CannotBeHad(Exception):
    """A release that was asked for; the message is one line."""


@dataclass(frozen=True, slots=True)
class Release:
    """An engine's sources. version: None where nothing says it. folder: where its package lies."""

    surface: Surface
    distribution: str
    version: str | None
    folder: Path


SURFACES = (transformers.SURFACE, vllm.SURFACE, lm_eval.SURFACE)


def installed() -> list[Release]:
    """The engines of this environment."""
    return [release for surface in SURFACES for release in _installed(surface)]


def _installed(surface: Surface) -> Iterator[Release]:
    spec = find_spec(surface.package)
    if spec is None or not spec.submodule_search_locations:
        return
    folder = Path(spec.submodule_search_locations[0]).parent
    for distribution in surface.distributions:
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        yield Release(surface, distribution, version, folder)
        return


def asked_for(given: str, scratch: Path) -> list[Release]:
    """The releases that an argument names, unpacked into `scratch` where they come as a wheel.

    Raises CannotBeHad: and why.
    """
    if given.endswith(".whl"):
        return [_of_wheel(Path(given), scratch)]
    if os.sep in given or given in (os.curdir, os.pardir):
        return _of_folder(Path(given))
    return [_of_wheel(_download(given, scratch), scratch)]


def _of_folder(folder: Path) -> list[Release]:
    """The engines that lie in a folder, or whose package it is."""
    found, own = [], folder.resolve()
    for surface in SURFACES:
        place = own.parent if own.name == surface.package else own
        if (place / surface.package / "__init__.py").is_file():
            distribution, version = _version_beside(surface, place)
            found.append(Release(surface, distribution, version, place))
    if not found:
        packages = " or ".join(surface.package for surface in SURFACES)
        raise CannotBeHad(f"{folder}: expected a folder with an unpacked {packages}")
    return found


def _version_beside(surface: Surface, folder: Path) -> tuple[str, str | None]:
    for each in metadata.distributions(path=[str(folder)]):
        if canonicalize_name(each.name or "") in surface.distributions:
            return canonicalize_name(each.name), each.version
    return surface.package, None


def _of_wheel(wheel: Path, scratch: Path) -> Release:
    try:
        name, version, _, _ = parse_wheel_filename(wheel.name)
        surface = _surface_of(name)
        folder = Path(tempfile.mkdtemp(dir=scratch))
        with zipfile.ZipFile(wheel) as archive:
            own = [n for n in archive.namelist() if n.startswith(f"{surface.package}/")]
            archive.extractall(folder, [n for n in own if n.endswith(".py")])
    except (OSError, InvalidWheelFilename, zipfile.BadZipFile) as error:
        raise CannotBeHad(f"{wheel}: expected a wheel ({error})") from error
    return Release(surface, name, str(version), folder)


def _surface_of(distribution: str) -> Surface:
    known = {name: surface for surface in SURFACES for name in surface.distributions}
    if canonicalize_name(distribution) not in known:
        raise CannotBeHad(f"{distribution}: expected one of {', '.join(known)}")
    return known[canonicalize_name(distribution)]


def _download(given: str, scratch: Path) -> Path:
    try:
        _surface_of(Requirement(given).name)
    except InvalidRequirement:
        raise CannotBeHad(
            f"{given!r}: expected NAME==VERSION, a wheel, or the path of a folder, with a slash"
        ) from None
    folder = tempfile.mkdtemp(dir=scratch)
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, given]
    ended = subprocess.run(command, capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if ended.returncode or not wheels:
        reasons = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
        reason = (reasons or ended.stderr.splitlines() or ["no reason given"])[-1]
        raise CannotBeHad(f"{given} cannot be downloaded: {reason}")
    return wheels[0]


def judge(release: Release) -> bool:
    """Prints what differs, then the sum of it; returns whether the release holds.

    Raises CannotBeHad: its sources cannot be read.
    """
    surface = release.surface
    try:
        comparison = compare(surface, Sources(release.folder, surface.package), release.version)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise CannotBeHad(f"{release.distribution}: its sources cannot be read: {error}") from error
    for difference in comparison.differences:
        print(difference)
    print(
        f"{release.distribution} {release.version or '(version unknown)'}: {comparison.held} of "
        f"{comparison.names} names as they were read in {surface.read_in}"
    )
    return comparison.holds


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CannotBeHad(message)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises CannotBeHad: it cannot be read."""
    description = (__doc__ or "").partition("\n")[0]
    parser = _Parser(prog="python -m scripts.host_surface", description=description)
    parser.add_argument(
        "releases",
        nargs="*",
        metavar="RELEASE",
        help="NAME==VERSION, a wheel, or a folder; without any, what is installed",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    try:
        given = parse_arguments(arguments).releases
        with tempfile.TemporaryDirectory(prefix="host-surface-") as scratch:
            found = [release for each in given for release in asked_for(each, Path(scratch))]
            found = found if given else installed()
            if not found:
                raise CannotBeHad("neither vLLM nor transformers is installed: name a release")
            verdicts = [judge(release) for release in found]
            return 0 if all(verdicts) else 1
    except CannotBeHad as error:
        print(f"host_surface: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
