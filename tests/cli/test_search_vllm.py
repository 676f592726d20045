"""`guided-decode search --engine vllm` on a real engine."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests import PATIENCE
from tests.cli.search_runs import agree, search, write_prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(900),
]
SMALL_ENGINE = {"enforce_eager": True, "max_model_len": 160, "max_num_seqs": 16,
                "max_num_batched_tokens": 20000}  # fmt: skip


def test_without_chance_vllm_writes_what_the_local_generator_does(tmp_path):
    prompts = write_prompts(tmp_path / "in.jsonl")
    words = ["--method", "cd", "--branches", 2, "--block", 16, "--temperature", 0,
             "--max-new-tokens", 40, "--dtype", "float32", prompts]  # fmt: skip
    engine = ["--engine", "vllm", "--engine-args", json.dumps(SMALL_ENGINE)]
    command = [sys.executable, "-m", "guided_decode.cli", "search", *map(str, words), *engine]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    # Nothing but lines on stdout, whatever vLLM has to say.
    there = [json.loads(line) for line in ended.stdout.splitlines()]
    here = search(*words)
    for line in (*there, *here):
        line.pop("run")
        for candidate in line["candidates"]:
            candidate["log_prob"] = round(candidate["log_prob"], 2)
    assert agree(there, here)
