"""`--tp-plan auto`: commands under torchrun, whose other ranks follow the first."""

import json
import os
import signal

import pytest
from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.cli import checkpoints
from guided_decode.cli.app import app
from guided_decode.cli.errors import Refusal
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.forward.ranks import ShardError
from tests.cli.test_score import chats, read, write
from tests.forward.test_shards import torchrun

pytestmark = pytest.mark.timeout(900)
CLI = ("-m", "guided_decode.cli")


def test_a_file_is_scored_by_two_shards_as_by_one_process(tmp_path):
    source = write(tmp_path / "chats.jsonl", chats(3))
    whole, sharded = tmp_path / "whole.jsonl", tmp_path / "sharded.jsonl"
    plan = ("--tp-plan", "auto", "--device", "cpu")
    ended = torchrun(*CLI, "score", str(source), str(sharded), *plan)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr.count("3 chats are scored") == 1
    alone = CliRunner().invoke(app, ["score", str(source), str(whole), "--device", "cpu"])
    assert alone.exit_code == 0, alone.output
    ours, theirs = read(sharded), read(whole)
    assert [line["score"] for line in ours] == pytest.approx(
        [line["score"] for line in theirs], abs=1e-5
    )
    # One process goes on where two left off.
    again = CliRunner().invoke(app, ["score", str(source), str(sharded), "--device", "cpu"])
    assert again.exit_code == 0, again.output
    assert read(sharded) == ours


@pytest.mark.slow
def test_a_policy_is_guided_by_a_sharded_scorer(tmp_path):
    (prompt,) = tiny_tulu.held_out_prompts(1)
    asked = ("generate", "--prompt", prompt, "--json", "--device", "cpu", "--max-new-tokens", "40")
    ended = torchrun(*CLI, *asked, "--tp-plan", "auto")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    alone = CliRunner().invoke(app, [*asked])
    assert alone.exit_code == 0, alone.output
    texts = [json.loads(said.splitlines()[-1])["text"] for said in (ended.stdout, alone.stdout)]
    assert texts[0] == texts[1]


def test_a_follower_leaves_signals_to_its_leader(monkeypatch):
    """torchrun hands SIGTERM on to all ranks; the leader still needs the others to finish."""

    class Follower:
        def follow(self):
            for one in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), one)
            raise ShardError("rank 0, the leader, is gone")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(checkpoints, "open_scorer", lambda *args, **options: Follower())
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Refusal, match="rank 0, the leader, is gone"):
        checkpoints.follow_if_not_leading("x", ScorerOptions(tp_plan="auto"), "auto")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("command", ["score", "generate"])
def test_without_torchrun_a_plan_is_refused_in_one_line(tmp_path, monkeypatch, command):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    source = write(tmp_path / "chats.jsonl", chats(1))
    given = [source, tmp_path / "out.jsonl"] if command == "score" else ["--file", source]
    result = CliRunner().invoke(app, [command, *map(str, given), "--tp-plan", "auto"])
    assert result.exit_code == 2
    said = result.stderr.strip()
    assert "\n" not in said
    assert said.startswith("error: --tp-plan auto was given to a process that torchrun did not")
    assert said.endswith("run torchrun --nproc-per-node SHARDS with the same script or command")
