"""`guided-decode doctor`: what works, what does not, in words, whatever is broken."""

import json
import os
import subprocess
import sys

import pytest

from guided_decode import GuidanceConfig
from guided_decode.cli.doctor import brute_force, isolated, versions
from guided_decode.cli.doctor.finding import Finding, Status, as_text, works
from guided_decode.cli.doctor.libraries import root_of
from tests import PATIENCE, ROOT, models, oracle
from tests.cli.broken_libraries import MISMATCH, library, without


def doctor(folder, *options):
    """Exit code, and what was printed, in a Python that finds the folder's libraries first."""
    ended = subprocess.run(
        [sys.executable, "-m", "guided_decode.cli", "doctor", "--time-limit", str(PATIENCE),
         *options],
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}, cwd=folder,
        capture_output=True, text=True, timeout=2 * PATIENCE,
    )  # fmt: skip
    assert ended.stderr == ""
    return ended.returncode, ended.stdout


def checks(printed):
    return {each["check"]: each for each in json.loads(printed)["checks"]}


def test_a_broken_torchvision_without_vllm_and_without_network(tmp_path):
    library(tmp_path, "torchvision", MISMATCH)
    without(tmp_path, "vllm")
    code, printed = doctor(tmp_path)
    assert code == 1
    lines = printed.splitlines()
    (said,) = [i for i, line in enumerate(lines) if line.startswith("torchvision ")]
    torch = versions.installed("torch")
    assert lines[said].endswith(
        "warning  0.24.1 cannot be imported (RuntimeError: operator torchvision::nms does not "
        f"exist): it is built for another torch than {torch}, and transformers, which imports it, "
        "fails with it"
    )
    assert "-> pip uninstall torchvision (nothing here needs it)" in lines[said + 1]
    assert "transformers   FAILURE  5." in printed
    assert "mend torchvision first" in printed
    assert "generate       skipped  not looked at: transformers cannot load a model" in printed
    assert lines[-1] == "guidance does not work here: see transformers"


@pytest.mark.slow
def test_without_vllm_and_without_network_guidance_works_in_transformers(tmp_path):
    without(tmp_path, "vllm")
    code, printed = doctor(tmp_path, "--json")
    found = checks(printed)
    assert code == 0, printed
    assert json.loads(printed)["works"]
    assert found["generate"]["said"].endswith("transformers on cpu: Answer: 10211")
    assert found["vLLM"]["status"] == "absent"
    assert "pip install 'guided-decode[vllm]'" in found["vLLM"]["advice"]
    assert "(supported: >=2.11)" in found["torch"]["said"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV"),
        ("import os; print('bad CPU'); os._exit(7)", "exit code 7: ...bad CPU"),
    ],
)
def test_a_torch_that_cannot_be_imported_ends_nothing_but_its_own_check(tmp_path, code, said):
    library(tmp_path, "torch", code, version="2.13.0")
    ended, printed = doctor(tmp_path, "--json")
    found = checks(printed)
    assert ended == 1
    assert found["torch"]["status"] == "failure"
    assert said in found["torch"]["said"]
    assert found["transformers"]["said"] == "not looked at: torch cannot be imported"
    assert found["Python"]["status"] == "ok"


@pytest.mark.slow
def test_a_broken_vllm_is_a_failure_until_it_is_left_out(tmp_path):
    library(tmp_path, "vllm", "raise ImportError('undefined symbol: _ZN3c10')", version="0.32.0")
    # Not what this is about.
    without(tmp_path, "triton")
    code, printed = doctor(tmp_path, "--json")
    found = checks(printed)
    assert code == 1
    assert "(ImportError: undefined symbol: _ZN3c10)" in found["vLLM"]["said"]
    assert found["vLLM"]["advice"].endswith("leave it out: --no-vllm")
    assert found["vLLM engine"]["status"] == "skipped"
    assert found["generate"]["status"] == "ok"
    code, printed = doctor(tmp_path, "--json", "--no-vllm")
    assert code == 0
    assert "vLLM" not in checks(printed)


@pytest.mark.slow
def test_an_engine_of_vllm_is_held_to_brute_force(tmp_path):
    pytest.importorskip("vllm")
    code, printed = doctor(tmp_path, "--json")
    assert code == 0, printed
    engine = checks(printed)["vLLM engine"]
    assert engine["status"] == "ok"
    assert engine["said"].startswith("53 guided tokens equal brute force, vLLM ")


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    library(tmp_path, "torch", "import time; time.sleep(10 * 3600)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    found = isolated.run(2.0, "torch", "torch")
    assert found.status == Status.FAILURE
    assert found.said == "the check took longer than 2 s"


def test_a_version_outside_the_range_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setattr(versions, "range_of", lambda name: "<6,>=5.16")
    inside = versions.against_range("transformers", "transformers", "5.19.0", "5.19.0")
    assert (inside.status, inside.said) == (Status.OK, "5.19.0 (supported: <6,>=5.16)")
    outside = versions.against_range("transformers", "transformers", "4.57.1", "4.57.1")
    assert outside.status == Status.WARNING
    assert outside.said == "4.57.1 is not in the supported range, <6,>=5.16"
    assert outside.advice == 'pip install "transformers<6,>=5.16"'


def test_its_brute_force_is_the_tests():
    policy, critic = models.tiny("llama", "lm", seed=1), models.tiny("llama", "token")
    config = GuidanceConfig(beta=2.0, top_k=4)
    for prompt in models.prompts([5, 12]):
        guided = oracle.Oracle(oracle.Values(critic), "baseline")
        tokens, gaps = guided.greedy(oracle.LogProbs(policy), prompt, config, [models.EOS], 8)
        found = brute_force.greedy(policy, critic, prompt, beta=2.0, top_k=4, end=models.EOS,
                                   max_new_tokens=8)  # fmt: skip
        assert [each.token for each in found] == tokens
        assert [each.gap for each in found] == pytest.approx(gaps, abs=1e-4)
        assert brute_force.difference(tokens, found) is None
        wrong = [*tokens[:3], 99, *tokens[4:]]
        assert brute_force.difference(wrong, found).startswith("token 3 is 99, where brute force")
        assert brute_force.difference(tokens[:-1], found).startswith(
            f"{len(tokens) - 1} tokens, where"
        )
        tied = [each._replace(gap=1e-6) if i == 3 else each for i, each in enumerate(found)]
        assert brute_force.difference(wrong, tied) is None


def test_words_and_exit_follow_from_the_findings():
    fine = Finding("torch", Status.OK, "2.13.0")
    warned = Finding("GPU", Status.WARNING, "torch finds none", "look at nvidia-smi")
    assert works([fine, warned])
    assert as_text([fine, warned]).splitlines() == [
        "torch  ok       2.13.0",
        "GPU    warning  torch finds none",
        "                -> look at nvidia-smi",
        "",
        "guidance works here",
    ]
    assert not works([fine, warned.changed(status=Status.FAILURE)])


def imported():
    try:
        raise RuntimeError("operator torchvision::nms\n  does not exist")
    except RuntimeError as error:
        raise ModuleNotFoundError("Could not import module 'LlamaForCausalLM'") from error


def test_the_innermost_error_is_told():
    with pytest.raises(ModuleNotFoundError) as caught:
        imported()
    assert root_of(caught.value) == "RuntimeError: operator torchvision::nms does not exist"
