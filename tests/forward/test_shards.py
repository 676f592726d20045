"""Scorers that are sharded over two processes (gloo), as torchrun starts them."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from guided_decode import load_scorer
from tests import ROOT, models

# Processes that start on a machine that is busy take their time.
pytestmark = pytest.mark.timeout(900)

TOLERANCE = 1e-5
RANKS = 2


def environment(**own):
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | own


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(*command, timeout=800, **own):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS),
         "--master-port", free_port(), *command],
        env=environment(**own), cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def read(folder):
    """What each rank wrote, by rank."""
    files = [folder / f"rank{rank}.json" for rank in range(RANKS)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def ran(folder, *scenarios, timeout=800, **own):
    command = ("-m", "tests.forward.shard_worker", str(folder), *scenarios)
    ended = torchrun(*command, timeout=timeout, **own)
    results = read(folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for said in results:
        for name, facts in said.items():
            assert "error" not in facts, f"{name}: {facts['error']}"
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """One run of all scenarios, which takes seconds; starting the processes takes longer."""
    return ran(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def leader(ranks):
    return ranks[0]


@pytest.fixture(scope="module")
def follower(ranks):
    return ranks[1]


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2"])
def test_scores_of_two_shards_are_those_of_one_rank(leader, follower, arch):
    facts = leader["critics"][arch]
    assert facts["differs"] < TOLERANCE
    # The tree is one, and each token is forwarded once.
    assert facts["tokens"][0] == facts["tokens"][1]
    assert facts["ridden"] == [21, 0]
    halves, wholes = facts["kv_heads"]
    assert [2 * heads for heads in halves] == wholes
    assert follower["critics"][arch] == {"ended": True}


def test_sliding_windows_and_forwards_in_parts(leader):
    assert leader["windows"]["differs"] < TOLERANCE


def test_rows_that_ride_on_two_shards_until_there_is_no_room(leader):
    facts = leader["little_room"]
    assert facts["differs"] < TOLERANCE
    assert 0 < facts["ridden"][0] < 21


def test_attention_by_segment_tables_as_on_a_gpu(leader):
    assert leader["fused"]["differs"] < TOLERANCE
    assert leader["fused"]["ridden"] == [21, 0]


def test_an_implicit_reward_shards_both_models(leader):
    facts = leader["pairs"]
    assert facts["differs"] < TOLERANCE
    assert facts["tokens"][0] == facts["tokens"][1]


def test_reward_model_and_reference_are_sharded_beside_their_critic(leader):
    facts = leader["companions"]
    assert facts["differs"] < TOLERANCE
    assert facts["kv_heads"] == [1, 1]


def test_random_schedules_that_evict_equal_brute_force(leader):
    assert leader["fuzz"]["ran"] == 24
    assert leader["fuzz"]["evicted"] > 500
    assert leader["fuzz"]["ridden"] > 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_random_schedules(tmp_path):
    (facts, _) = ran(tmp_path, "fuzz", timeout=3000, SHARD_SCHEDULES="200")
    assert facts["fuzz"]["ran"] == 200
    assert facts["fuzz"]["evicted"] > 4000
    assert facts["fuzz"]["refused"] < 800


FAILURES = [
    ("follower, attention", "ShardError: the call ended on all ranks because it failed on rank 1"),
    ("follower, first", "ShardError: the call ended on all ranks because it failed on rank 1"),
    ("follower, norm", "ShardError: the call ended on all ranks because it failed on rank 1"),
    ("follower, pair", "ShardError: the call ended on all ranks because it failed on rank 1"),
    ("follower, head", "ShardError: the call ended on all ranks because it failed on rank 1"),
    ("leader, attention", "RuntimeError"),
]


@pytest.mark.parametrize(("where", "begins"), FAILURES)
def test_an_exception_on_one_rank_ends_the_call_and_the_next_one_works(leader, where, begins):
    facts = leader["failures"][where]
    assert facts["said"].startswith(begins)
    assert facts["said"].endswith("this layer is broken")
    for values in facts["next"]:
        assert values == [pytest.approx(row, abs=TOLERANCE) for row in facts["expected"]]


def test_an_exception_on_all_ranks_is_the_leaders_own(leader):
    facts = leader["failure_on_both"]
    assert facts["said"] == "RuntimeError: this layer is broken"
    expected = leader["models_in_memory"]["expected"]
    assert facts["next"] == [pytest.approx(row, abs=TOLERANCE) for row in expected]


def test_what_fails_before_the_forward_ends_the_call_only(leader):
    facts = leader["failure_before_the_forward"]
    assert "rank 1: MemoryError: no room for tables" in facts["said"]
    expected = leader["models_in_memory"]["expected"]
    assert facts["next"] == [pytest.approx(row, abs=TOLERANCE) for row in expected]


def test_what_was_written_to_tables_that_were_given_up_reaches_no_follower(leader):
    facts = leader["tables_that_are_given_up"]
    assert facts["got"] == [pytest.approx(row, abs=TOLERANCE) for row in facts["expected"]]


def test_close_ends_the_followers_and_the_scorer(leader, follower):
    said = leader["closing"]["said"]
    assert said.startswith("ShardError: the sharded scorer is closed (close() was called)")
    assert "sharded over 2 processes cannot be copied" in leader["closing"]["copied"]
    assert follower["closing"]["again"] is None


@pytest.mark.parametrize("how", ["forgetting", "ending"])
def test_followers_end_without_a_close(follower, how):
    assert follower[how] == {"said": ""}


def test_a_follower_says_that_it_scores_nothing(follower):
    assert follower["closing"]["before"] == (
        "AttributeError: rank 1 of 2 has no 'score': it follows the scorer of rank 0, which alone "
        "scores; call follow() where is_leader is False"
    )
    assert follower["closing"]["repr"] == "Follower(rank 1 of 2)"


def test_a_sharded_model_in_memory_is_led_or_called_alike(leader, follower):
    facts = leader["models_in_memory"]
    expected = [pytest.approx(row, abs=TOLERANCE) for row in facts["expected"]]
    assert facts["led"] == expected
    assert facts["alike"] == follower["models_in_memory"]["alike"] == expected
    assert facts["dtype"].startswith("ValueError: dtype=bfloat16 came with a LlamaForToken")


def test_weights_that_change_on_all_ranks_are_followed(leader):
    facts = leader["weights_that_change"]
    assert facts["after"] == [pytest.approx(row, abs=TOLERANCE) for row in facts["expected"]]
    assert facts["after"] != [pytest.approx(row, abs=0.1) for row in facts["before"]]


def test_weights_that_change_on_one_rank_are_refused_each_time(leader):
    for said in leader["weights_that_change"]["alone"]:
        assert "changed on rank 0 and not here: change them on every rank" in said


REFUSALS = {
    "heads": "has 3 attention heads, which 2 processes cannot share evenly: run torchrun with "
    "--nproc-per-node of 3 processes",
    "vocabulary": "has a vocabulary of 101 tokens, which the output layer of 2 processes",
    "other options": "cache_tokens is 64 on rank 0, 65 on rank 1",
    "whole": "in memory, whose weights are whole: expected a name or folder",
    "head": 'tp_plan="auto" came with head, which it does not go with',
    "plan": "tp_plan='colwise': expected \"auto\"",
    "device": "device='meta' came with tp_plan=\"auto\": expected none",
    "no plan": "is a gpt2, for which transformers has no tensor-parallel plan",
    "tokenizer of both": "nowhere cannot be read",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_sharded_is_refused_on_all_ranks(leader, follower, what):
    assert REFUSALS[what] in leader["refusals"][what]
    assert leader["refusals"][what] == follower["refusals"][what]


def test_a_tokenizer_that_one_rank_lacks_is_missing_on_all(leader, follower):
    own, other = (said["refusals"]["tokenizer of one"] for said in (follower, leader))
    assert own.startswith("ValueError: the tokenizer of ")
    assert other == f"ShardError: the call ended on all ranks because it failed on rank 1: {own}"


def test_what_one_rank_cannot_load_no_rank_loads(leader, follower):
    own, other = (said["refusals"]["one of them"] for said in (leader, follower))
    assert own.startswith("ValueError: ")
    assert "expected a folder with a config.json" in own
    assert other == f"ShardError: the call ended on all ranks because it failed on rank 0: {own}"


def test_without_torchrun_a_plan_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="was given to a process that torchrun did not start"):
        load_scorer(models.saved("llama", "token"), "verl-critic", tp_plan="auto")


def test_one_process_of_torchruns_has_the_whole_scorer(monkeypatch):
    told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in (told | {"MASTER_PORT": free_port()}).items():
        monkeypatch.setenv(name, str(value))
    path = models.saved("llama", "token")
    try:
        scorer = load_scorer(path, "verl-critic", tp_plan="auto", device="cpu")
    finally:
        torch.distributed.destroy_process_group()
    assert scorer.is_leader
    asked = ([[5, 6]], torch.tensor([[3]]))
    assert scorer.score(*asked).values.equal(load_scorer(path, "verl-critic").score(*asked).values)


def test_any_scorer_is_a_leader_that_can_be_closed():
    with load_scorer(models.tiny("llama", "token"), "verl-critic") as scorer:
        assert scorer.is_leader
        before = scorer.score([[5, 6]], torch.tensor([[3]])).values
    assert scorer.score([[5, 6]], torch.tensor([[3]])).values.equal(before)


@pytest.fixture(scope="module")
def deaths(tmp_path_factory):
    """Pairs of processes in which one dies, side by side: torchrun would end the other one."""
    folders, running = {}, []
    for name in ("leader_dies", "follower_dies", "served_follower_dies"):
        folders[name], port = tmp_path_factory.mktemp(name), free_port()
        for rank in range(RANKS):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port}
            command = [sys.executable, "-m", "tests.forward.shard_worker", str(folders[name]), name]
            told = environment(MASTER_ADDR="127.0.0.1", **{k: str(v) for k, v in own.items()})
            running.append(
                subprocess.Popen(
                    command,
                    env=told,
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    said = [process.communicate(timeout=800)[0] for process in running]
    return {
        name: (read(folder), [process.returncode for process in running[2 * at : 2 * at + 2]],
               "".join(said[2 * at : 2 * at + 2]))
        for at, (name, folder) in enumerate(folders.items())
    }  # fmt: skip


def test_a_follower_ends_when_its_leader_is_killed(deaths):
    (_, follower), codes, said = deaths["leader_dies"]
    assert codes[0] == -9, said
    assert follower["leader_dies"]["said"] == "ShardError: rank 0, the leader, is gone", said


def test_a_follower_that_is_killed_closes_the_scorer_in_words(deaths):
    (leader, _), codes, said = deaths["follower_dies"]
    assert codes == [0, -9], said
    first, second = leader["follower_dies"]["said"]
    assert first == "ShardError: a rank is gone, or did not answer in time"
    assert second.startswith("ShardError: the sharded scorer is closed (a rank is gone")
    assert leader["follower_dies"]["seconds"] < 60


def test_a_server_whose_scorer_lost_a_rank_tells_its_clients_and_ends(deaths):
    (leader, _), codes, said = deaths["served_follower_dies"]
    assert codes == [0, -9], said
    facts = leader["served_follower_dies"]
    assert facts["ended"] == "ShardError: a rank is gone, or did not answer in time", said
    assert facts["closed"] == "a rank is gone, or did not answer in time"
    (asked,) = facts["asked"]
    assert asked.startswith("ScorerServerError: "), said
    assert "a rank is gone, or did not answer in time" in asked
