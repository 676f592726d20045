"""What `test_shards` runs under torchrun: scenarios, in order, on two ranks.

Each rank writes what each scenario gave to a file of its own; the tests read both.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import transformers as tf
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from guided_decode import PrefixHandle, load_scorer
from guided_decode.cache import prefix_cache
from guided_decode.checkpoints.tensor_parallel import join_ranks
from guided_decode.forward.ranks import ShardError
from guided_decode.scoring.remote import RemoteScorer
from guided_decode.serving import ScorerServer
from tests import models
from tests.cache import test_properties as schedules

RANK = int(os.environ["RANK"])
FOLDER = Path(sys.argv[1])
EVEN_VOCAB = 102
# Longer together than what an order says at once.
PREFIXES = models.prompts([3, 20, 1, 470, 330])
CANDIDATES = torch.tensor([[5, 6, 7], [8, 9, -1], [5, 5, 6], [3, 4, 5], [-1, -1, -1]])


def path(name: str) -> str:
    return str(FOLDER / name)


def sharded(name: str = "llama", kind: str = "verl-critic", **options):
    return load_scorer(path(name), kind, tp_plan="auto", **options)


def steps_of(scorer) -> list:
    """Values and baselines of prefixes that begin, grow, fork and come back."""
    answers, rows = [], [list(row) for row in PREFIXES]
    for step in range(4):
        values, baseline = scorer.score(rows, CANDIDATES)
        answers.append([values.nan_to_num(-99.0).tolist(), baseline.tolist()])
        rows[0] += [5, 9 + step]
        rows[1] += [8]
        rows[2] = [*rows[0][:-1], 11]
        if step == 2:
            rows[3] = rows[3][:40]
    return answers


def decoded(scorer) -> list:
    """The same of handles that go on by their candidates, as an engine's rows do, with a step of
    many candidates between. Of a critic they ride."""
    answers, handles = [], [PrefixHandle(row[:20]) for row in (PREFIXES[i] for i in (1, 3, 4))]
    for step in range(9):
        chosen = torch.arange(5 + step, 5 + step + (12 if step == 5 else 3))
        values, baseline = scorer.score(handles, chosen.repeat(len(handles), 1))
        answers.append([values.tolist(), baseline.tolist()])
        for i, handle in enumerate(handles):
            handle.append(5 + step + i)
    return answers


def packed(scorer):
    """The models of a rank."""
    return list(scorer._packed_models()) if scorer.is_leader else scorer._shards.models


def equals_one_rank(
    name: str,
    kind: str = "verl-critic",
    *,
    fused: bool = False,
    asked=(steps_of, decoded),
    **options,
) -> dict:
    with sharded(name, kind, **options) as scorer:
        for model in packed(scorer):
            model.fused = fused
        if not scorer.is_leader:
            scorer.follow()
            return {"ended": True}
        got = [answer for each in asked for answer in each(scorer)]
        tokens = scorer.stats.tokens
        ridden = scorer.cache.ridden
        cached = [len(k[0]) for k in scorer.cache.pool.keys]
    alone = load_scorer(path(name), kind, **options)
    alone.cache.rides = False
    expected = [answer for each in asked for answer in each(alone)]
    differs = max(
        (torch.tensor(a) - torch.tensor(b)).abs().max().item()
        for one, other in zip(got, expected, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    return {
        "differs": differs,
        "tokens": [tokens, alone.stats.tokens],
        "ridden": [ridden, alone.cache.ridden],
        "kv_heads": [cached, [len(k[0]) for k in alone.cache.pool.keys]],
        "repr": repr(scorer),
    }


def values_of(scorer) -> list:
    return scorer.score(PREFIXES[:2], CANDIDATES[:2]).values.nan_to_num(-99.0).tolist()


@contextlib.contextmanager
def failing(layer, on: int, times: int = 1):
    """A module whose next forwards fail on one rank, in the middle of the model's."""
    own, left = layer.forward, times

    def forward(*args, **kwargs):
        nonlocal left
        if on == RANK and left:
            left -= 1
            raise RuntimeError("this layer is broken")
        return own(*args, **kwargs)

    layer.forward = forward
    try:
        yield
    finally:
        layer.forward = own


def said(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fails_in(
    on: int, where: str, name: str = "llama", kind: str = "verl-critic", **options
) -> dict:
    """An exception of one rank, in the middle of a forward: the call and the next one."""
    with sharded(name, kind, **options) as scorer:
        trunk = packed(scorer)[0].model.base_model
        layer = {"attention": trunk.layers[1].self_attn, "first": trunk.embed_tokens,
                 "norm": trunk.norm}[where]  # fmt: skip
        if not scorer.is_leader:
            with failing(layer, on):
                scorer.follow()
            return {}
        with failing(layer, on):
            error = said(lambda: values_of(scorer))
        got, again = values_of(scorer), values_of(scorer)
    return {"said": error, "next": [got, again], "expected": values_of(
        load_scorer(path(name), kind, **options))}  # fmt: skip


SCENARIOS, LAST = {}, {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def last(function):
    """A scenario that a rank does not survive: it runs alone."""
    LAST[function.__name__] = function
    return function


@scenario
def critics():
    return {arch: equals_one_rank(arch) for arch in ("llama", "mistral", "qwen2")}


@scenario
def windows():
    return equals_one_rank("qwen2-sliding", max_forward_tokens=16)


@scenario
def little_room():
    """Rows that ride have none in the step of many candidates, and the tree writes their last
    tokens anew."""
    return equals_one_rank("llama", asked=(decoded,), cache_tokens=84)


@scenario
def fused():
    """Attention as on a GPU, by the kernel's reference."""
    return equals_one_rank("mistral", fused=True)


@scenario
def pairs():
    return equals_one_rank("lm", "implicit", reference=path("lm-start"))


@scenario
def companions():
    options = {"reward": path("reward"), "reference": path("lm")}
    with sharded("llama-even", **options) as scorer:
        if not scorer.is_leader:
            scorer.follow()
            return {}
        alone = load_scorer(path("llama-even"), "verl-critic", **options)
        gaps = [
            (one.reward.score(PREFIXES, CANDIDATES).baseline
             - other.reward.score(PREFIXES, CANDIDATES).baseline).abs().max().item()
            + (one.reference.log_probs(PREFIXES, CANDIDATES)
               - other.reference.log_probs(PREFIXES, CANDIDATES)).nan_to_num(0.0).abs().max().item()
            for one, other in [(scorer, alone)]
        ]  # fmt: skip
        sizes = [one.cache.pool.keys[0].shape[1] for one in (scorer.reward, scorer.reference)]
    return {"differs": max(gaps), "kv_heads": sizes}


@scenario
def fuzz():
    """Random schedules, most of which evict, against brute force."""
    many = int(os.environ.get("SHARD_SCHEDULES", "24"))
    ran, evicted, refused, ridden = 0, 0, 0, 0
    for at, cache_tokens in enumerate((20, 30, 45, 70)):
        with sharded("llama", cache_tokens=cache_tokens, max_forward_tokens=(7, 64)[at % 2]) as one:
            if not one.is_leader:
                one.follow()
                continue
            for seed in range(many // 4):
                requests = schedules.run(one, schedules.Critic("llama"), 100 * at + seed, 12)
                refused += requests.refused
                ran += 1
            evicted += one.stats.evictions
            ridden += one.cache.ridden
    return {"ran": ran, "evicted": evicted, "refused": refused, "ridden": ridden}


@scenario
def failures():
    return {
        "follower, attention": fails_in(1, "attention"),
        "leader, attention": fails_in(0, "attention"),
        "follower, first": fails_in(1, "first"),
        "follower, norm": fails_in(1, "norm"),
        "follower, pair": fails_in(1, "attention", "lm", "implicit", reference=path("lm-start")),
        "follower, head": fails_in(1, "norm", "lm", "implicit", reference=path("lm-start")),
    }


@scenario
def failure_on_both():
    with sharded() as scorer:
        with failing(packed(scorer)[0].model.layers[0].mlp, RANK):
            if not scorer.is_leader:
                scorer.follow()
                return {}
            error = said(lambda: values_of(scorer))
        return {"said": error, "next": values_of(scorer)}


@scenario
def failure_before_the_forward():
    with sharded() as scorer:
        if not scorer.is_leader:
            tables = packed(scorer)[0].cache.tables
            own = type(tables).write

            def write(self, pieces):
                type(tables).write = own
                raise MemoryError("no room for tables")

            type(tables).write = write
            scorer.follow()
            return {}
        error = said(lambda: values_of(scorer))
        return {"said": error, "next": values_of(scorer)}


@scenario
def tables_that_are_given_up():
    """They start again with fewer rows, after a call that wrote to others and forwarded nothing."""
    own, prefix_cache._SMALL_TABLES = prefix_cache._SMALL_TABLES, 4 * 64 * 16
    try:
        with sharded(cache_tokens=64) as scorer:
            if not scorer.is_leader:
                scorer.follow()
                return {}
            held, rows = scorer.cache.tables, [PrefixHandle([5, 6, 7])]
            while scorer.cache.tables is held:
                scorer.score(rows[-1:], CANDIDATES[:1])
                rows.append(PrefixHandle([5, 6, 7]))
            got = scorer.score([[9, 8, 7]], CANDIDATES[:1]).values.tolist()
    finally:
        prefix_cache._SMALL_TABLES = own
    alone = load_scorer(path("llama"), "verl-critic")
    return {"got": got, "expected": alone.score([[9, 8, 7]], CANDIDATES[:1]).values.tolist()}


@scenario
def forgetting():
    """Nobody calls close(), and the last reference goes."""
    scorer = sharded()
    if not scorer.is_leader:
        return {"said": said(scorer.follow)}
    values_of(scorer)
    del scorer
    gc.collect()
    return {}


@scenario
def closing():
    scorer = sharded()
    if not scorer.is_leader:
        before = said(lambda: scorer.score([[5]], CANDIDATES[:1]))
        scorer.follow()
        return {"before": before, "again": scorer.follow(), "repr": repr(scorer)}
    values_of(scorer)
    copied = said(lambda: copy.deepcopy(scorer))
    scorer.close()
    scorer.close()
    return {"copied": copied, "said": said(lambda: values_of(scorer))}


def in_memory(name="llama"):
    return tf.LlamaForTokenClassification.from_pretrained(
        path(name), distributed_config=DistributedConfig(tp_plan="auto"), dtype=torch.float32
    )


@scenario
def models_in_memory():
    model = in_memory()
    alike = values_of(load_scorer(model, "verl-critic"))
    with load_scorer(model, "verl-critic", tp_plan="auto") as scorer:
        if not scorer.is_leader:
            scorer.follow()
            return {"alike": alike}
        led = values_of(scorer)
        dtype = said(lambda: load_scorer(model, "verl-critic", dtype=torch.bfloat16))
    return {"alike": alike, "led": led, "dtype": dtype,
            "expected": values_of(load_scorer(path("llama"), "verl-critic"))}  # fmt: skip


def doubled(model):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(2)


@scenario
def weights_that_change():
    """On both ranks they are followed; on one alone the call ends in words."""
    model = in_memory()
    with load_scorer(model, "verl-critic", tp_plan="auto") as scorer:
        if not scorer.is_leader:
            own = scorer._serve

            def serve(order):
                own(order)
                scorer._serve = own
                doubled(model)

            scorer._serve = serve
            scorer.follow()
            return {}
        before = values_of(scorer)
        doubled(model)
        after = values_of(scorer)
        doubled(model)
        alone = [said(lambda: values_of(scorer)) for _ in range(2)]
    whole = tf.LlamaForTokenClassification.from_pretrained(path("llama"), dtype=torch.float32)
    doubled(whole)
    return {"before": before, "after": after, "alone": alone,
            "expected": values_of(load_scorer(whole, "verl-critic"))}  # fmt: skip


@scenario
def refusals():
    whole = models.tiny("llama", "token")
    return {
        "heads": said(lambda: sharded("three-heads")),
        "vocabulary": said(lambda: sharded("odd-lm", "implicit", reference=path("odd-lm"))),
        "one of them": said(
            lambda: load_scorer(path("llama" if RANK else "nothing"), "verl-critic", tp_plan="auto")
        ),
        "other options": said(lambda: sharded(cache_tokens=64 + RANK)),
        "tokenizer of both": said(lambda: sharded(policy_tokenizer=path("nowhere"))),
        "tokenizer of one": said(
            lambda: sharded(policy_tokenizer=path("nowhere") if RANK else None)
        ),
        "whole": said(lambda: load_scorer(whole, "verl-critic", tp_plan="auto")),
        "head": said(lambda: load_scorer(path("lm"), head="x", tp_plan="auto")),
        "plan": said(lambda: load_scorer(path("llama"), "verl-critic", tp_plan="colwise")),
        "device": said(lambda: sharded(device="meta")),
        "no plan": said(lambda: sharded("gpt2", "reward-model")),
    }


KEPT = []


@scenario
def ending():
    """The last one: the leader's script ends, and nobody has called close()."""
    scorer = sharded()
    if not scorer.is_leader:
        return {"said": said(scorer.follow)}
    KEPT.append(scorer)
    values_of(scorer)
    return {}


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@last
def leader_dies():
    scorer = sharded()
    if scorer.is_leader:
        values_of(scorer)
        dies()
    begun = time.perf_counter()
    error = said(scorer.follow)
    return {"said": error, "seconds": time.perf_counter() - begun}


@last
def follower_dies():
    scorer = sharded()
    if not scorer.is_leader:
        trunk = packed(scorer)[0].model
        trunk.layers[1].self_attn.forward = lambda *args, **kwargs: dies()
        scorer.follow()
    begun = time.perf_counter()
    errors = [said(lambda: values_of(scorer)) for _ in range(2)]
    return {"said": errors, "seconds": time.perf_counter() - begun}


@last
def served_follower_dies():
    """The leader serves its scorer, which cannot go on without the other rank."""
    scorer = sharded()
    if not scorer.is_leader:
        trunk = packed(scorer)[0].model
        trunk.layers[1].self_attn.forward = lambda *args, **kwargs: dies()
        scorer.follow()
    asked = []
    with ScorerServer(scorer, "tcp://127.0.0.1:0") as server:
        ask = threading.Thread(
            target=lambda: asked.append(said(lambda: values_of(RemoteScorer(server.address))))
        )
        ask.start()
        ended = said(server.serve)
    ask.join()
    return {"asked": asked, "ended": ended, "closed": scorer.closed}


def save_models() -> None:
    three = {"num_attention_heads": 3, "num_key_value_heads": 3}
    tiny = {
        "llama": ("llama", "token", {}),
        "llama-even": ("llama", "token", {"vocab_size": EVEN_VOCAB}),
        "mistral": ("mistral", "token", {}),
        "qwen2": ("qwen2", "token", {}),
        "qwen2-sliding": ("qwen2-sliding", "token", {}),
        "three-heads": ("llama", "token", three),
        "odd-lm": ("llama", "lm", {}),
        "lm": ("llama", "lm", {"vocab_size": EVEN_VOCAB}),
        "lm-start": ("llama", "lm", {"vocab_size": EVEN_VOCAB, "seed": 7}),
        "reward": ("mistral", "sequence", {"vocab_size": EVEN_VOCAB}),
    }
    for name, (arch, head, options) in tiny.items():
        models.tiny(arch, head, **options).save_pretrained(path(name))
    config = tf.GPT2Config(
        vocab_size=101, n_embd=48, n_layer=2, n_head=4, num_labels=1, pad_token_id=0
    )
    tf.GPT2ForSequenceClassification(config).save_pretrained(path("gpt2"))


def main() -> None:
    # A rank that waits for ever says where.
    faulthandler.dump_traceback_later(2900, exit=True)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    join_ranks()
    if RANK == 0:
        save_models()
    torch.distributed.barrier()
    results = {}
    for name in sys.argv[2:] or SCENARIOS:
        begun = time.perf_counter()
        try:
            results[name] = (SCENARIOS | LAST)[name]()
        except (Exception, ShardError):
            results[name] = {"error": traceback.format_exc()}
        print(f"rank {RANK}: {name} {time.perf_counter() - begun:.1f} s", flush=True)
        (FOLDER / f"rank{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with torch.no_grad():
        main()
