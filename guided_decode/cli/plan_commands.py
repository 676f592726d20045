"""The commands that start a way of a plan."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

from guided_decode.checkpoints.plan.placement import Placement, Plan
from guided_decode.checkpoints.plan.ways import SECOND_PROCESS, USABLE, Place, Way

PORT = 7070
# What the reader replaces.
HOST, KEYS = "SCORER_HOST", "scorer.key"
_PROMPT = "Why is the sky blue?"


@dataclass(frozen=True, slots=True)
class Command:
    """What is typed, and what for: "scorer", "generate" or "vllm". there: on the other machine."""

    role: str
    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    there: bool = False

    def __str__(self) -> str:
        before = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*before, shlex.join(self.words)])


def commands(plan: Plan, placement: Placement) -> list[Command]:
    """What starts the scorer where it is a server, then `generate` and vLLM's server with it; a
    search by steps with a process reward model."""
    way = placement.way
    if plan.kind == "process-reward":
        return [_search(plan, way)]
    served = way.place in (Place.TENSOR_PARALLEL, Place.SERVED)
    found = list(_scorer(plan, way)) if served else []
    # Of transformers' policies none is cut over GPUs.
    if way.policy_shards == 1:
        found.append(_generate(plan, way))
    found.append(_vllm(plan, placement))
    return found


def _scorer(plan: Plan, way: Way) -> Iterator[Command]:
    there = way.place is Place.SERVED
    words = ["scorer", plan.scorer_name, *_reading(plan, way)]
    words += ["--tp-plan", "auto"] if way.shards > 1 else []
    words += ["--dtype", "bfloat16"]
    if there:
        yield Command("scorer", ("guided-decode", "scorer", "--new-key", KEYS), there=True)
        words += ["--listen", f"tcp://0.0.0.0:{PORT}", "--key-file", KEYS]
    words += ["--cache-tokens", str(plan.work.cache_tokens)]
    environment = {} if there else _visible(_scorers_gpus(way))
    if way.shards == 1:
        yield Command("scorer", ("guided-decode", *words), environment, there)
        return
    torchrun = ("torchrun", "--nproc-per-node", str(way.shards), "-m", "guided_decode")
    yield Command("scorer", (*torchrun, *words), environment, there)


def _search(plan: Plan, way: Way) -> Command:
    """What judges steps, where tokens have no scores."""
    words = ["search", "--method", "dvts", "--policy", plan.policy_name, "--scorer"]
    words += [plan.scorer_name, *_reading(plan, way), "--dtype", "bfloat16"]
    if way.place is Place.OWN_GPU:
        words += ["--device", "cuda:0", "--scorer-device", "cuda:1"]
    return Command("generate", ("guided-decode", *words, "--prompt", _PROMPT))


def _generate(plan: Plan, way: Way) -> Command:
    work = plan.work
    words = ["guided-decode", "generate", "--policy", plan.policy_name, *_scorer_words(plan, way)]
    words += ["--dtype", "bfloat16", "--top-k", str(work.top_k)]
    if way.place is Place.OWN_GPU:
        words += ["--device", "cuda:0", "--scorer-device", "cuda:1"]
    if work.batch > 1:
        words += ["--num-samples", str(work.batch), "--temperature", "1"]
    words += ["--prompt", _PROMPT]
    return Command("generate", tuple(words), _visible(_policys_gpus(way)))


def _vllm(plan: Plan, placement: Placement) -> Command:
    way, work = placement.way, plan.work
    words = ["guided-decode", "serve", plan.policy_name]
    words += _scorer_words(plan, way, option="--scorer-quantization")
    words += ["--top-k", str(work.top_k), "--max-top-k", str(work.top_k)]
    if way.place in (Place.ONE_GPU, Place.OWN_GPU):
        words += ["--scorer-dtype", "bfloat16"]
    if way.place is Place.OWN_GPU:
        words += ["--scorer-device", f"cuda:{way.policy_shards}"]
    words += ["--dtype", "bfloat16", "--max-num-seqs", str(work.batch)]
    words += ["--max-model-len", str(work.length)]
    words += ["--gpu-memory-utilization", f"{_utilization(plan, placement):.2f}"]
    if way.policy_shards > 1:
        words += ["--tensor-parallel-size", str(way.policy_shards)]
    return Command("vllm", tuple(words), _visible(_policys_gpus(way)))


def _scorer_words(plan: Plan, way: Way, option: str = "--quantization") -> list[str]:
    """How a policy's command names its scorer: the model, or the server that has it."""
    if way.place is Place.SERVED:
        return ["--scorer", f"tcp://{HOST}:{PORT}", "--key-file", f"{KEYS}.client"]
    if way.place is Place.TENSOR_PARALLEL:
        return ["--scorer", f"tcp://127.0.0.1:{PORT}"]
    cache = ["--cache-tokens", str(plan.work.cache_tokens)]
    return ["--scorer", plan.scorer_name, *_reading(plan, way, option), *cache]


def _reading(plan: Plan, way: Way, option: str = "--quantization") -> list[str]:
    """What says how the scorer's model is read."""
    words = [] if plan.given_kind is None else ["--kind", plan.given_kind]
    words += [] if plan.given_reference is None else ["--reference", plan.given_reference]
    return words + ([option, way.form.name] if way.form.bits < 16 else [])


def _policys_gpus(way: Way) -> range | None:
    """The GPUs that the policy's process may see, where others are taken."""
    if way.place is not Place.TENSOR_PARALLEL:
        return None
    first = 0 if way.beside else way.shards
    return range(first, first + way.policy_shards)


def _scorers_gpus(way: Way) -> range | None:
    return None if way.beside and way.shards == way.total else range(way.shards)


def _visible(gpus: range | None) -> dict[str, str]:
    return {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}


def _utilization(plan: Plan, placement: Placement) -> float:
    """The share of its GPUs that vLLM may use: all that is usable, but for other processes."""
    shared = placement.way.place is Place.TENSOR_PARALLEL and placement.way.beside
    if not shared:
        return USABLE
    share = (placement.gpus[0].policy.total + SECOND_PROCESS) / plan.card.bytes
    return min(USABLE, math.ceil(100 * share) / 100)
