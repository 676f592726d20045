"""What tests of `guided-decode ablate` share: files of ablations, and runs of the command."""

import json
import os
import subprocess
import sys

import yaml
from typer.testing import CliRunner

from guided_decode.cli.ablate.report import CLOCKED
from guided_decode.cli.app import app

# Of every kind: single tokens, draws that share a prompt, blocks, a tree.
METHODS = [
    {"method": "plain"},
    {"method": "plain", "name": "greedy", "temperature": 0},
    {"method": "guide", "beta": [3, 10], "top_k": 4},
    {"method": "best-of-n", "n": 3},
    {"method": "cd", "branches": 2, "block": 16},
    {"method": "ppo-mcts", "simulations": 3, "k": 2, "c_puct": 1.0},
]


def ablation(**changed):
    """A small ablation of tiny-tulu, as its file says it."""
    return {
        "prompts": {"embedded": "tiny-tulu", "limit": 4},
        "reward": {"kind": "numeric"},
        "seeds": [0, 1],
        "max_new_tokens": 56,
        "block": 2,
        "policies": {"sft": "tiny-tulu-sft"},
        "scorers": {"critic": "tiny-tulu-value"},
        "methods": METHODS,
        **changed,
    }


def write(path, given):
    path.write_text(given if isinstance(given, str) else yaml.safe_dump(given, sort_keys=False))
    return path


def invoke(*words):
    return CliRunner().invoke(app, ["ablate", *map(str, words)])


def ablate(*words):
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result


def refused(*words):
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def lines(folder):
    return [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]


def of(folder, name, **settings):
    """The responses of a setting, by its name and settings."""
    return [
        line for line in lines(folder)
        if line["name"] == name and settings.items() <= line["settings"].items()
    ]  # fmt: skip


def final_files(folder):
    """The contents of all files that a run leaves, but for those with the clock's figures."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in (".lock", *CLOCKED)
    }


def units(folder):
    """The finished units, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "units").glob("*.json")}


def start(*words):
    """The command as a process of its own, of which nobody reads stdout."""
    return subprocess.Popen(
        [sys.executable, "-m", "guided_decode.cli", "ablate", *map(str, words)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
