"""Libraries as real machines have them, in a folder that comes before the installed ones."""

from __future__ import annotations

from pathlib import Path

# What torchvision raises that was built for another torch.
MISMATCH = 'raise RuntimeError("operator torchvision::nms does not exist")'

_START = """
import importlib.abc, socket, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())

class NoNetwork(socket.socket):
    def connect(self, address):
        raise OSError(101, "Network is unreachable")
    connect_ex = connect

def nowhere(*given, **named):
    raise socket.gaierror(-3, "Temporary failure in name resolution")

socket.socket, socket.getaddrinfo = NoNetwork, nowhere
"""


def library(folder: Path, name: str, code: str, version: str = "0.24.1") -> None:
    """A package that is installed there, and runs `code` where it is imported."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code + "\n")
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def without(folder: Path, *hidden: str) -> None:
    """In each Python that starts with this folder on its path there is no network, and these
    libraries are not there."""
    (folder / "sitecustomize.py").write_text(_START.format(hidden=hidden))
