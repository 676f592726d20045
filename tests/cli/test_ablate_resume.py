"""`guided-decode ablate` goes on where it was ended: by a kill, by Ctrl-C, by damage to a file."""

import random
import signal
import time

import pytest

from tests import PATIENCE
from tests.cli.ablations import (
    ablate,
    ablation,
    final_files,
    invoke,
    lines,
    start,
    units,
    write,
)

# One unit a prompt: many of them, each of a moment.
FEW = [{"method": "guide", "beta": 10, "top_k": 4}, {"method": "best-of-n", "n": [2, 3]}]


@pytest.fixture
def config(tmp_path):
    given = ablation(methods=FEW[1:], block=1, max_new_tokens=12)
    return write(tmp_path / "small.yaml", given)


def await_units(process, folder, count):
    """Waits until so many units are there, or the process has ended; whether it has."""
    deadline = time.monotonic() + PATIENCE
    while len(units(folder)) < count:
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            return True
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return False


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_uninterrupted_files(config, tmp_path):
    folder = tmp_path / "out"
    process = start(config, "--output", folder)
    assert not await_units(process, folder, 3)
    kill(process)
    before = units(folder)
    assert not (folder / "summary.json").exists()
    # A unit that was being written is no unit.
    half = folder / "units" / "half.json.1.guided-decode-tmp"
    half.write_text('{"answers": [')
    ablate(config, "--output", folder, "--no-plots")
    assert before.items() <= units(folder).items(), "a unit was computed twice"
    assert not half.exists()
    ablate(config, "--output", tmp_path / "whole", "--no-plots")
    assert final_files(folder) == final_files(tmp_path / "whole")
    assert set(units(folder)) == set(units(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_that_is_killed_ten_times_at_random_ends_in_the_uninterrupted_files(tmp_path):
    methods = [*FEW, {"method": "ppo-mcts", "simulations": 3, "k": 2, "sample": True}]
    config = write(
        tmp_path / "small.yaml",
        ablation(
            prompts={"embedded": "tiny-tulu", "limit": 8}, methods=methods, block=1,
            equal_cost={"budgets": [2, 4]},
        ),
    )  # fmt: skip
    folder, rng, killed = tmp_path / "out", random.Random(20), 0
    while killed < 10:
        before = units(folder)
        process = start(config, "--output", folder)
        # Some as they load, some in the middle of a unit, some after several.
        ended = await_units(process, folder, len(before) + rng.choice([0, 0, 1, 2, 3, 5]))
        assert not ended, "the run was over before it was killed ten times: make it longer"
        time.sleep(rng.uniform(0.0, 0.5))
        kill(process)
        killed += 1
        assert before.items() <= units(folder).items(), "a unit was computed twice"
    ablate(config, "--output", folder)
    ablate(config, "--output", tmp_path / "whole")
    assert final_files(folder) == final_files(tmp_path / "whole")


@pytest.mark.slow
def test_an_interrupted_run_says_how_far_it_is(config, tmp_path):
    folder = tmp_path / "out"
    process = start(config, "--output", folder)
    assert not await_units(process, folder, 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    done = len(units(folder))
    assert f"interrupted: {done} of 24 units are done in {folder}; the same command goes on" in said


def test_a_damaged_unit_is_computed_again(tmp_path):
    config = write(tmp_path / "small.yaml", ablation(methods=FEW[1:], max_new_tokens=8))
    folder = tmp_path / "out"
    ablate(config, "--output", folder, "--no-plots")
    files = final_files(folder)
    damaged = next((folder / "units").glob("*.json"))
    damaged.write_bytes(damaged.read_bytes()[:40])
    ablate(config, "--output", folder, "--no-plots")
    assert final_files(folder) == files
    assert damaged.stat().st_size > 40


@pytest.mark.slow
def test_what_fails_keeps_what_was_finished(tmp_path):
    methods = [{"method": "best-of-n", "n": [1, 2]}]
    text = 'def odd(prompt, response):\n    raise RuntimeError("no more")\n'
    (tmp_path / "failing_reward.py").write_text(text)
    given = ablation(methods=methods, max_new_tokens=20)
    given["reward"] = {"kind": "function", "function": "failing_reward:odd"}
    config, folder = write(tmp_path / "small.yaml", given), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        result = invoke(config, "--output", folder, "--no-plots")
    assert result.exit_code == 2
    said = "the reward of plain on sft: function failing_reward:odd raised RuntimeError (no more)"
    assert said in result.stderr
    before = units(folder)
    assert len(before) == 12
    given["reward"] = {"kind": "numeric"}
    ablate(write(config, given), "--output", folder, "--no-plots")
    assert units(folder) == before
    assert len(lines(folder)) == 24
