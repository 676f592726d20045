"""`guided-decode ablate` of a policy on servers: several units under way, the same files."""

import signal
import threading
from dataclasses import replace

import pytest

from guided_decode import load_scorer, tiny_tulu
from guided_decode.cli.ablate.cells import cells_of
from guided_decode.cli.ablate.models import Group
from guided_decode.cli.ablate.prompts import read_prompts
from guided_decode.cli.ablate.reading import read_ablation
from guided_decode.lab.ablate.grid import Unit
from guided_decode.search import load_generator
from tests import PATIENCE
from tests.cli.ablations import (
    ablate,
    ablation,
    final_files,
    lines,
    of,
    refused,
    start,
    units,
    write,
)
from tests.search.recordings import Live
from tests.search.servers.completion_server import Bad, CompletionServer
from tests.serving.served import served

METHODS = [{"method": "best-of-n", "n": 2}, {"method": "plain", "temperature": 0, "name": "g"}]


@pytest.fixture(scope="module")
def servers():
    local = load_generator(tiny_tulu.model_path("sft"))
    with (
        CompletionServer(Live(local), local._tokenizer).running() as first,
        CompletionServer(Live(local), local._tokenizer).running() as second,
    ):
        yield first, second


def config(path, servers, **changed):
    policy = {"model": "tiny-tulu-sft", "endpoint": [server.url for server in servers],
              "endpoint_retries": 0, "endpoint_timeout": PATIENCE}  # fmt: skip
    given = {"methods": METHODS, "block": 1, "max_new_tokens": 12, "seeds": [0], **changed}
    few = {"embedded": "tiny-tulu", "limit": 3}
    return write(path, ablation(policies={"served": policy}, prompts=few, **given))


def test_units_under_way_at_once_are_the_same_units(servers, tmp_path):
    file = config(tmp_path / "small.yaml", servers)
    ablate(file, "--output", tmp_path / "one", "--no-plots")
    ablate(file, "--output", tmp_path / "many", "--parallel", 4, "--no-plots")
    assert final_files(tmp_path / "one") == final_files(tmp_path / "many")
    assert min(len(server.asked()) for server in servers) > 2
    for line in of(tmp_path / "many", "plain"):
        # One draw at temperature 1 is the policy itself.
        assert (line["kl"], line["scorer"]) == (0.0, None)
    for line in of(tmp_path / "many", "g"):
        assert line["kl"] == -line["log_prob"]
    assert len(lines(tmp_path / "many")) == 3 * 3


def test_a_unit_takes_no_answer_of_another_that_is_under_way(tmp_path):
    given = ablation(methods=["best-of-n"], block=2, max_new_tokens=2)
    read, problems = read_ablation(write(tmp_path / "small.yaml", given))
    cells, rows = cells_of(read, problems), read_prompts(read.prompts)[:2]
    cell = next(each for each in cells if each.setting.method == "best-of-n")
    with Group([cell], False).loaded() as answers:
        first, second = (Unit(cell.setting, seed, 0, 2, str(seed)) for seed in (0, 1))
        own = answers.answer(cell, second, rows)["answers"]
        # The first prompt of the first unit is answered, and its second one is not.
        job = replace(answers.job, plan=replace(cell.plan, seed=first.seed))
        (lines,) = job.lines(rows[:1])
        answers.job.ahead.put(rows[0], {**lines[0], "response": "of another seed"})
        assert answers.answer(cell, second, rows)["answers"] == own


@pytest.mark.slow
def test_units_of_several_prompts_under_way_at_once_keep_their_own_answers(servers, tmp_path):
    file = config(tmp_path / "small.yaml", servers, block=3, seeds=[0, 1, 2])
    ablate(file, "--output", tmp_path / "one", "--no-plots")
    ablate(file, "--output", tmp_path / "many", "--parallel", 7, "--no-plots")
    assert final_files(tmp_path / "one") == final_files(tmp_path / "many")


@pytest.mark.slow
def test_what_was_finished_stays_when_a_server_dies(servers, tmp_path):
    file = config(tmp_path / "small.yaml", servers, methods=METHODS[:1], parallel=2)
    first, second = servers
    for server in servers:
        server.asked()
    first.behave = second.behave = lambda number, body: (
        Bad(status=400, text="gone") if number > 4 else None
    )
    first.restart() if hasattr(first, "restart") else None
    said = refused(file, "--output", tmp_path / "out", "--no-plots")
    assert "gone" in said
    before = units(tmp_path / "out")
    first.behave = second.behave = lambda number, body: None
    ablate(file, "--output", tmp_path / "out", "--no-plots")
    assert before.items() <= units(tmp_path / "out").items()
    assert len(lines(tmp_path / "out")) == 3 * 2


@pytest.mark.slow
def test_a_second_interrupt_leaves_the_units_under_way(servers, tmp_path):
    asked, release = threading.Semaphore(0), threading.Event()

    def hold(number, body):
        # Not what is asked to learn what the server can do.
        if body["max_tokens"] == 12:
            asked.release()
            assert release.wait(PATIENCE)
            return Bad(status=400, text="late")
        return None

    with pytest.MonkeyPatch.context() as patch:
        for server in servers:
            patch.setattr(server, "behave", hold)
        file = config(tmp_path / "small.yaml", servers, parallel=2)
        process = start(file, "--output", tmp_path / "out", "--no-plots")
        try:
            for _ in range(2):
                assert asked.acquire(timeout=PATIENCE)
            process.send_signal(signal.SIGINT)
            first = process.stderr.readline()
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
            release.set()
    assert first == (
        "interrupted: 2 units under way are finished first; Ctrl-C again leaves them\n"
    )
    assert process.returncode == 130
    assert said.startswith("interrupted: 0 of 9 units are done in ")


def test_a_dry_run_asks_no_server(tmp_path, servers):
    for server in servers:
        server.asked()
    file = config(tmp_path / "small.yaml", servers)
    plan = ablate(file, "--dry-run", "--output", tmp_path / "out").stdout
    assert "3 settings, 3 prompts, 9 units of at most 1 prompts; nothing was run" in plan
    assert not any(server.asked() for server in servers)


@pytest.mark.slow
def test_a_scorer_server_guides_to_the_same_responses(tmp_path):
    critic = load_scorer("tiny-tulu-value", policy_tokenizer=tiny_tulu.model_path("sft"))
    with served(critic) as server:
        methods = [{"method": "guide", "beta": 10, "top_k": 4}, {"method": "best-of-n", "n": 2}]
        both = {"here": "tiny-tulu-value", "there": {"model": server.address}}
        given = ablation(methods=methods, scorers=both, seeds=[0], max_new_tokens=20)
        file = write(tmp_path / "small.yaml", given)
        ablate(file, "--output", tmp_path / "out", "--no-plots")
    found = lines(tmp_path / "out")
    for name in ("guide", "best-of-n"):
        here, there = (
            [line for line in found if line["name"] == name and line["scorer"] == scorer]
            for scorer in ("here", "there")
        )
        assert [line["response"] for line in here] == [line["response"] for line in there]
        assert len(here) == 4
        # What was sent counts, where the server may have had it.
        assert all(line["cost"]["scorer_tokens"] > 0 for line in there)
