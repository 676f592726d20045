"""tiny-tulu in a real engine on a GPU, on each of vLLM's model runners; on a CPU on V2."""

from __future__ import annotations

import pytest
import torch

from guided_decode import tiny_tulu
from tests.integrations.vllm import v2_on_cpu, vllm_parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not torch.cuda.is_available() and not v2_on_cpu.IS_CHOSEN, reason="needs a CUDA device"
    ),
]
ON_GPU = not v2_on_cpu.IS_CHOSEN
DTYPE = "bfloat16" if ON_GPU else "float32"
PROMPTS = tiny_tulu.held_out_prompts(64 if ON_GPU else 12)
NEW = 100


def has_v2() -> bool:
    try:
        import vllm.v1.worker.gpu.sample.logits_processor as package
    except ImportError:
        return False
    return hasattr(package, "build_custom_logits_processors")


def answers(llm, extra: list[dict | None]) -> tuple[list[str], list[list[int]]]:
    sampling = [vllm_parts.params(NEW, own, detokenize=True) for own in extra]
    outputs = llm.generate([tiny_tulu.render(p) for p in PROMPTS], sampling, use_tqdm=False)
    return [o.outputs[0].text for o in outputs], [list(o.outputs[0].token_ids) for o in outputs]


def accuracy(texts: list[str]) -> float:
    right = [tiny_tulu.is_correct(p, text) for p, text in zip(PROMPTS, texts, strict=True)]
    return sum(right) / len(right)


@pytest.mark.parametrize("runner", ["v1", "v2"] if ON_GPU else ["v2"])
def test_guided_and_plain_requests(runner, monkeypatch):
    if runner == "v2" and not has_v2():
        pytest.skip("needs vLLM 0.32 or newer: this one has no Model Runner V2 processors")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1" if runner == "v2" else "0")
    common = {
        "model": str(tiny_tulu.model_path("sft")),
        "skip_tokenizer_init": False,
        "dtype": DTYPE,
        "max_model_len": 256,
        "enforce_eager": not ON_GPU,
        "gpu_memory_utilization": 0.3,
    }
    nothing: list[dict | None] = [None] * len(PROMPTS)
    with vllm_parts.engine(None, **common) as llm:
        _, plain = answers(llm, nothing)
    config = {
        "guided_decode": {
            "scorer": str(tiny_tulu.model_path("value")),
            "dtype": DTYPE,
            "beta": 10.0,
            "top_k": 4,
            "log_every": 0,
        }
    }
    half = [{"guide": 1} if i % 2 else None for i in range(len(PROMPTS))]
    with vllm_parts.engine(config, **common) as llm:
        _, unused = answers(llm, nothing)
        texts, _ = answers(llm, [{"guide": 1}] * len(PROMPTS))
        _, mixed = answers(llm, half)
    assert unused == plain
    assert [mixed[i] for i in range(0, len(PROMPTS), 2)] == plain[::2]
    assert accuracy(texts) >= 0.9
