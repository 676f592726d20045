"""The engines' own tests once more on Model Runner V2, in a process that was started for it."""

import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.integrations.vllm import v2_on_cpu, vllm_parts

HERE = "tests/integrations/vllm"
is_chosen = pytest.mark.skipif(
    not v2_on_cpu.IS_CHOSEN, reason="needs Model Runner V2: the tests below start it"
)
starts_it = pytest.mark.skipif(v2_on_cpu.IS_CHOSEN, reason="this is the runner's own process")


@is_chosen
def test_the_engine_runs_on_model_runner_v2():
    with vllm_parts.engine(vllm_parts.scorer_config()) as llm:
        (module,) = llm.collective_rpc(
            lambda worker: type(worker.model_runner).__mro__[1].__module__
        )
    assert module == "vllm.v1.worker.gpu.model_runner"


@is_chosen
def test_what_a_users_processor_forbids_is_never_a_candidate():
    own = ["tests.integrations.vllm.whitelist_v2:Whitelist", vllm_parts.FLAG]
    with vllm_parts.engine(vllm_parts.scorer_config(), logits_processors=own) as llm:
        lists = ("40,41,42", "")
        asked = [
            vllm_parts.params(4, {"only": only, "guide": 1, "guide_top_k": 4}, ignore_eos=True)
            for only in lists
        ]
        some, none = vllm_parts.generate(llm, [[5, 6, 7]] * 2, asked)
        counts = llm.collective_rpc(vllm_parts.report)[0]
    assert set(some) <= {40, 41, 42}
    # vLLM samples a row without a token all the same: it is said and counted.
    assert none == [0, 0, 0, 0]
    assert counts["passthroughs"] == 4


def run(*tests: str) -> None:
    """pytest on these files' tests, in a process whose engines are V2's."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "--timeout", "1500", "-rf", *tests],
        cwd=ROOT,
        env={**os.environ, **v2_on_cpu.ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:]
    assert " passed" in run.stdout


@starts_it
@pytest.mark.timeout(900)
def test_32_mixed_requests_at_once_on_v2():
    run(f"{HERE}/test_engine.py::test_a_mixed_batch", f"{HERE}/test_runner_v2.py")


@starts_it
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_else_on_v2():
    files = ("test_engine", "test_engine_under_pressure", "test_gpu", "test_combinations")
    run(*(f"{HERE}/{file}.py" for file in files))


@starts_it
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_guidance_by_the_policys_own_trunk_on_v2():
    run(f"{HERE}/test_own_trunk.py", f"{HERE}/test_own_trunk_under_pressure.py")
