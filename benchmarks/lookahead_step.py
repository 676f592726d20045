"""Turns of plain and guided decoding over whatever package and benchmarks are on the path.

`lookahead_against` runs this file, by its path, over another checkout too.
"""

import json
import sys

import torch

from benchmarks.baselines import Models, Ours, Plain, Shape, Way
from guided_decode import GuidanceConfig


def ways_of(models: Models, batch: int, prefix: int, k: int) -> dict[str, Way]:
    """Both ways over the same random prompts, warmed up."""
    generator = torch.Generator().manual_seed(0)
    vocab = models.policy.config.vocab_size
    prompts = torch.randint(3, vocab, (batch, prefix), generator=generator)
    ways: dict[str, Way] = {
        "plain": Plain(models, prompts),
        "ours": Ours(models, prompts, GuidanceConfig(beta=1.0, top_k=k)),
    }
    for way in ways.values():
        way.seconds(2)
    return ways


@torch.no_grad()
def serve() -> None:
    """Answers each order, a line of JSON: a case with nothing, a turn with its seconds a token."""
    threads, slots = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    models = Models.random(Shape(), cache_tokens=slots)
    ways: dict[str, Way] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "batch" in order:
            models.packed.cache.clear()
            ways = ways_of(models, **order)
            found: dict[str, float] = {}
        else:
            found = {name: way.seconds(order["steps"]) for name, way in ways.items()}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    serve()
