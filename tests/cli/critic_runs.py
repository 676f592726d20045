"""What tests of `train-critic` and `report-card` share: files of rollouts, and runs."""

import json

from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.cli.app import app

POLICY = ["--policy", "tiny-tulu-sft"]
# Seconds, not minutes: what is learnt is not looked at.
SHORT = ["--epochs", "1", "--batch-size", "8", "--lr", "1e-3"]


def invoke(command, *args, stdin=None):
    return CliRunner().invoke(app, [command, *map(str, args)], input=stdin)


def done(command, *args):
    result = invoke(command, *args)
    assert result.exit_code == 0, result.output
    return result


def refused(command, *args, stdin=None):
    """What is said in the one line of a refusal."""
    result = invoke(command, *args, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def rollouts(count=16):
    """Lines with messages as text and with token ids; half of the answers drop a carry."""
    lines = []
    for i, message in enumerate(tiny_tulu.training_prompts(count, seed=1)):
        a, b = tiny_tulu.operands(message)
        answer = tiny_tulu.worked_answer(a, b if i % 2 else b - 1)
        lines.append({"id": i, "prompt": message, "response": answer, "reward": i % 2})
    return lines


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
