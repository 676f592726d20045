"""What tests of `guided-decode search` share: runs of the command, and small settings."""

import json

import pytest
from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.cli.app import app

# Small enough for a test, and of more than one round.
SMALL = {
    "best-of-n": {"n": 3},
    "vote": {"n": 5},
    "weighted-vote": {"n": 4},
    "block": {"width": 2, "branches": 2, "block": 20, "trees": 2, "leave": True, "margin": 0.5},
    "cd": {"branches": 3, "block": 20},
    "vgs": {"width": 2, "block": 20},
    "dvts": {"trees": 2, "branches": 2, "stop": ("c1\n", "c0\n")},
    "chunk-beam": {"width": 2, "branches": 2, "block": 24},
    "value-beam": {"width": 2, "branches": 2, "margin": 0.4},
    "prune-and-refill": {"n": 3, "block": 16, "margin": 0.1},
    "cards": {
        "target": 0.9,
        "entropy": 0.5,
        "shortest": 2,
        "longest": 12,
        "alpha": 0.2,
        "beta": 0.1,
        "accept": "hard",
        "temperature": 0.9,
        "top_k": 20,
        "retries": 2,
    },
    "ppo-mcts": {
        "simulations": 4,
        "k": 3,
        "c_puct": 0.5,
        "sample": True,
        "anneal": False,
        "visit_temperature": 0.5,
        "prior_temperature": 2.0,
        "keep_subtree": True,
        "leaves": 2,
        "virtual_loss": 0.2,
    },
    "ppo-mcts-published": {"simulations": 3, "k": 2, "c_puct": 0.5, "look_past": False},
    "smc": {"particles": 3, "block": 20, "beta": 3.0, "threshold": 0.9, "choice": "best"},
}
PROMPTS = tiny_tulu.held_out_prompts(3)


def invoke(*args, stdin=None):
    return CliRunner().invoke(app, ["search", *map(str, args)], input=stdin)


def search(*args, stdin=None):
    result = invoke(*args, stdin=stdin)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def refused(*args, stdin=None):
    result = invoke(*args, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


_OFF = {"leave": "--stay", "anneal": "--no-anneal", "look_past": "--no-look-past"}


def options(settings):
    """Settings as they are typed."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words += [f"--{name.replace('_', '-')}" if value else _OFF[name]]
        elif isinstance(value, tuple):
            words += [word for one in value for word in (f"--{name}", one)]
        else:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def agree(one, other):
    """Whether two lines, or parts of them, are the same but for time and rounding."""
    if isinstance(one, dict):
        timed = [name for name in one if name != "seconds"]
        return one.keys() == other.keys() and all(agree(one[name], other[name]) for name in timed)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(agree, one, other))
    return one == (pytest.approx(other, abs=1e-4) if isinstance(one, float) else other)


def write_prompts(path):
    """The prompts as a file."""
    return write(path, [{"id": i, "prompt": text} for i, text in enumerate(PROMPTS)])
