"""Two vLLM engines beside each other, one with the processor: on a CPU, or on one GPU."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.vllm_plan import (
    TOKENS,
    Plan,
    arguments,
    guided_arguments,
    head_file,
    policy_folder,
    scorer_folder,
    trunk_arguments,
)

# Tokens whose log-probabilities tell how near a tie a choice was.
_TIED = 20


@dataclass
class Timing:
    """One turn of a way: seconds, tokens, and the gaps between an unguided request's tokens.

    gated: the share of its guided rows that their gate let pass.
    """

    seconds: float
    tokens: int
    gaps: list[float]
    host_microseconds: float | None = None
    gated: float | None = None
    preemptions: int | None = None


@dataclass
class Answers:
    """What came of a turn: each request's tokens; where asked for, each token's alternatives."""

    timing: Timing
    tokens: list[list[int]]
    logprobs: list[Sequence[Any]] = field(default_factory=list)

    def top_probabilities(self) -> list[float]:
        """Of each token's place, what the likeliest token there had."""
        return [
            math.exp(max(each.logprob for each in tied.values()))
            for request in self.logprobs
            for tied in request
        ]

    def lead(self, request: int, at: int, token: int) -> float:
        """By how many nats the token taken there was ahead of this one."""
        tied = self.logprobs[request][at]
        if token not in tied:
            return math.inf
        return float(tied[self.tokens[request][at]].logprob - tied[token].logprob)


class Engines:
    """The plain engine, the one with the processor, and maybe one that guides by its own trunk."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        if not plan.gpu:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(plan.kv_gib)
        elif not has_v2_processors():
            # Else the plain engine alone would be on Model Runner V2.
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        from vllm import LLM

        common = arguments(plan, policy_folder(plan, folder))
        self.plain = LLM(**common)
        self.guided = LLM(**common, **guided_arguments(plan, scorer_folder(plan, folder)))
        self.trunk = LLM(**common, **trunk_arguments(head_file(folder))) if plan.trunk else None
        self.plan = plan
        self._number = count()

    def close(self) -> None:
        for llm in filter(None, (self.plain, self.guided, self.trunk)):
            llm.llm_engine.engine_core.shutdown()

    def facts(self) -> dict[str, dict[str, Any]]:
        """How each engine runs, as vLLM settled it: ratios are sound where both run alike."""
        found = {"plain": _facts(self.plain), "with the processor": _facts(self.guided)}
        return found | ({} if self.trunk is None else {"by its own trunk": _facts(self.trunk)})

    def guide(
        self,
        prompts: list[list[int]],
        asked: Sequence[dict[str, Any] | None],
        *,
        by_trunk: bool = False,
    ) -> tuple[Answers, int]:
        """A turn of an engine with the processor, and its rows that asked in vain."""
        llm = self.trunk if by_trunk else self.guided
        before = self._counts(llm)
        answers = self._drive(llm, prompts, asked)
        after = self._counts(llm)
        new = {name: after[name] - before[name] for name in after}
        if new["guided_rows"]:
            spent = new["seconds"] - new["forward_seconds"]
            answers.timing.host_microseconds = 1e6 * spent / new["guided_rows"]
            answers.timing.gated = new["rows_gated"] / new["guided_rows"]
        asks = any(extra is not None for extra in asked)
        return answers, int(new["in_vain"] + (asks and not new["guided_rows"]))

    def answer(self, prompts: list[list[int]], *, logprobs: bool = False) -> Answers:
        """A turn of the plain engine."""
        return self._drive(self.plain, prompts, [None] * len(prompts), logprobs)

    def _counts(self, llm: Any) -> dict[str, float]:
        return next(one for one in llm.collective_rpc(read_counts) if one is not None)

    def _drive(
        self,
        llm: Any,
        prompts: list[list[int]],
        asked: Sequence[dict[str, Any] | None],
        logprobs: bool = False,
    ) -> Answers:
        """All requests at once, stepped to their end; gaps are the unguided requests'."""
        from vllm import SamplingParams

        engine, index = llm.llm_engine, {}
        outputs: list[Any] = [None] * len(prompts)
        seen: list[float | None] = [None] * len(prompts)
        gaps: list[float] = []
        preempted = preemptions(llm)
        # The engine's process begins with the first request that it gets.
        begun = time.perf_counter()
        for i, (prompt, extra) in enumerate(zip(prompts, asked, strict=True)):
            sampling = SamplingParams(
                temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False,
                extra_args=extra, logprobs=_TIED if logprobs else None,
            )  # fmt: skip
            name = str(next(self._number))
            engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
            index[name] = i
        while engine.has_unfinished_requests():
            found = engine.step()
            now = time.perf_counter()
            for output in found:
                i = index[output.request_id]
                outputs[i] = output.outputs[0]
                last, seen[i] = seen[i], now
                if last is not None and asked[i] is None:
                    gaps.append(now - last)
        seconds = time.perf_counter() - begun
        tokens = [list(output.token_ids) for output in outputs]
        timing = Timing(seconds, sum(map(len, tokens)), gaps)
        if preempted is not None:
            timing.preemptions = (preemptions(llm) or 0) - preempted
        return Answers(timing, tokens, [o.logprobs for o in outputs] if logprobs else [])


def preemptions(llm: Any) -> int | None:
    """vLLM's own count since the engine's start; None where it keeps no statistics.

    `LLM.get_metrics` would read the registry, in which the second engine replaced the first.
    """
    manager = getattr(llm.llm_engine, "logger_manager", None)
    for logger in getattr(manager, "stat_loggers", ()):
        counters = getattr(logger, "counter_num_preempted_reqs", None)
        if counters is not None:
            samples = (s for each in counters.values() for m in each.collect() for s in m.samples)
            return int(sum(s.value for s in samples if s.name.endswith("_total")))
    return None


def read_counts(worker: Any) -> dict[str, float] | None:
    """The processor's counters, read in the worker."""
    runner = worker.model_runner
    # Model Runner V2 keeps them with its sampler.
    batch = getattr(runner, "input_batch", None)
    processors = runner.sampler.logits_processors if batch is None else batch.logitsprocs.all
    for processor in processors:
        engine = getattr(processor, "engine", None)
        if engine is not None and engine.scorer is not None:
            stats = engine.scorer.stats
            return {
                "guided_rows": engine.counts.guided_rows,
                "in_vain": engine.counts.unguided_rows + stats.passthroughs,
                "seconds": engine.counts.seconds,
                "forward_seconds": stats.forward_seconds,
                "rows_gated": stats.rows_gated,
            }
    return None


def has_v2_processors() -> bool:
    """Whether Model Runner V2 of this vLLM runs custom processors, which it does from 0.32 on."""
    try:
        return find_spec("vllm.v1.worker.gpu.sample.logits_processor") is not None
    except ImportError:
        return False


def _facts(llm: Any) -> dict[str, Any]:
    config = llm.llm_engine.vllm_config
    return {
        "model_runner": "V2" if getattr(config, "use_v2_model_runner", False) else "V1",
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "cuda_graphs": not config.model_config.enforce_eager,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "kv_cache_tokens": _pool_tokens(config.cache_config),
    }


def _pool_tokens(cache: Any) -> int | None:
    blocks = cache.num_gpu_blocks_override
    return None if blocks is None else (blocks - 1) * cache.block_size
