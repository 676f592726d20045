"""`--tp-plan auto`: commands under torchrun, whose other ranks follow the first."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from guided_decode import PrefixHandle, load_scorer, tiny_tulu
from guided_decode.cli import checkpoints
from guided_decode.cli.app import app
from guided_decode.cli.errors import Refusal
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.forward.ranks import ShardError
from tests import models
from tests.cli.test_score import chats, read, write
from tests.forward.test_shards import environment, free_port, torchrun
from tests.serving import process

pytestmark = pytest.mark.timeout(900)
CLI = ("-m", "guided_decode")


@pytest.mark.slow
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
    # Where nothing is left to score nobody waits for a scorer.
    idle = torchrun(*CLI, "score", str(source), str(sharded), *plan, timeout=200)
    assert idle.returncode == 0, idle.stdout + idle.stderr


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


SERVED = ("--kind", "verl-critic", "--device", "cpu", "--tp-plan", "auto")
PREFIXES, CANDIDATES = [[5, 6, 7], [8]], torch.tensor([[3, 4], [9, -1]])


def check_served(address, path):
    """What is served there are the scores of one process, along a response that grows."""
    remote, local = load_scorer(address, "verl-critic"), load_scorer(path, "verl-critic")
    rows = [PrefixHandle(row) for row in PREFIXES]
    for token in (5, 6, 7):
        got, wanted = (scorer.score(rows, CANDIDATES) for scorer in (remote, local))
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5, equal_nan=True)
        for row in rows:
            row.append(token)
    remote.close()


def processes_below(pid):
    """The processes that a process has started and that still run."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_two_shards_are_served_as_one_process_serves_until_torchrun_is_ended(number):
    """Ctrl-C reaches torchrun alone, which sends it on: its ranks have sessions of their own."""
    path = models.saved("llama", "token")
    under = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
             "--master-port", free_port(), *CLI, "scorer"]  # fmt: skip
    with process.started(path, *SERVED, command=under) as server:
        ranks = processes_below(server.process.pid)
        try:
            check_served(server.address, path)
            assert len(ranks) == 2
        finally:
            server.end(number)
            said = server.process.stderr.read()
        # torchrun says what ended it, in a traceback of its own; its ranks say nothing.
        assert said.count("Traceback") == 1, said
        assert said.rstrip().endswith(f"got signal: {int(number)}"), said
        assert "rank 1" not in said
    assert not [one for one in ranks if Path(f"/proc/{one}").exists()]


def test_the_ranks_of_a_server_end_with_its_leader_and_in_order():
    """As torchrun starts and ends them, with the exit codes that it does not tell."""
    path, port = models.saved("llama", "token"), free_port()
    told = [
        environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port) for rank in "01"
    ]  # fmt: skip
    follower = subprocess.Popen(
        [*process.COMMAND, path, *SERVED], env=told[1], stderr=subprocess.PIPE, text=True
    )
    try:
        with process.started(path, *SERVED, told=told[0]) as leader:
            check_served(leader.address, path)
            follower.send_signal(signal.SIGTERM)
            check_served(leader.address, path)
            assert leader.end(signal.SIGTERM) == 0
            assert leader.process.stderr.read() == ""
        _, said = follower.communicate(timeout=60)
        assert (follower.returncode, said) == (0, "")
    finally:
        follower.kill()


@pytest.mark.parametrize("command", ["score", "generate", "scorer"])
def test_without_torchrun_a_plan_is_refused_in_one_line(tmp_path, monkeypatch, command):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    source = write(tmp_path / "chats.jsonl", chats(1))
    given = {"score": [source, tmp_path / "out.jsonl"], "generate": ["--file", source],
             "scorer": ["--listen", "tcp://127.0.0.1:0"]}[command]  # fmt: skip
    result = CliRunner().invoke(app, [command, *map(str, given), "--tp-plan", "auto"])
    assert result.exit_code == 2
    said = result.stderr.strip()
    assert "\n" not in said
    assert said.startswith("error: --tp-plan auto was given to a process that torchrun did not")
    assert said.endswith("run torchrun --nproc-per-node SHARDS with the same script or command")
