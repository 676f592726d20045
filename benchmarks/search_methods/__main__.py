"""Decoding methods on tiny-tulu's held-out prompts at equal total tokens.

    python -m benchmarks.search_methods                        # both policies, 1,000 prompts
    python -m benchmarks.search_methods --policies sft --prompts 250
    python -m benchmarks.search_methods --table                # of what was run so far

Every setting runs on the validation prompts; for each budget each method's best one that fits
then runs on the held-out prompts. Runs are kept in RECORDS, and a second call goes on with them.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from rich.console import Console

from benchmarks.quality import flops_a_token
from benchmarks.report import environment
from benchmarks.search_methods.choice import COUNTINGS, RUNGS, choose
from benchmarks.search_methods.decoding import Family
from benchmarks.search_methods.records import Batch, Records
from benchmarks.search_methods.settings import PLAIN, Setting, tried
from benchmarks.search_methods.table import Flops, write
from guided_decode import tiny_tulu

SEED = 13


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # the counts and draws are the same with more; the rounding is not
    transformers.utils.logging.disable_progress_bar()
    records = Records(arguments.records)
    if not arguments.table:
        for policy in arguments.policies:
            run(policy, records, arguments)
    # What makes the figures; --table only writes them down.
    words = [word for word in sys.argv[1:] if word != "--table"]
    command = " ".join(["python -m benchmarks.search_methods", *words])
    about = environment(command, {"policies": arguments.policies, "critic": "value"})
    about |= {"seed": SEED, "validation": arguments.validation}
    write(records, {policy: flops(Family(policy)) for policy in arguments.policies}, about,
          arguments.out)  # fmt: skip
    console = Console()
    console.print(f"written: {arguments.out}/search_methods.json and .md", soft_wrap=True)
    return 0


def flops(family: Family) -> Flops:
    return Flops(flops_a_token(family.model), flops_a_token(family.critic.model.model))


def parse_arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search_methods", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--policies", nargs="+", default=["sft", "ppo"], choices=["sft", "ppo"])
    parser.add_argument("--prompts", type=int, default=tiny_tulu.HELD_OUT, help="held-out prompts")
    parser.add_argument("--validation", type=int, default=150, help="validation prompts")
    parser.add_argument("--batch", type=int, default=200, help="prompts side by side")
    parser.add_argument("--records", type=Path, default=Path("out/search_methods.jsonl"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder")
    return parser.parse_args()


def run(policy: str, records: Records, arguments: argparse.Namespace) -> None:
    """What is missing: all settings on the validation prompts, then the chosen ones."""
    family, console = Family(policy), Console()
    for setting in tried():
        batch = Batch(policy, "validation", setting.key, 0, arguments.validation)
        measure(family, setting, batch, records, console)
    # All settings on the first batch, then on the next: whenever it ends, they have had the same.
    for first in range(0, arguments.prompts, arguments.batch):
        count = min(arguments.batch, arguments.prompts - first)
        for setting in chosen(policy, records, arguments.validation):
            batch = Batch(policy, "held-out", setting.key, first, count)
            measure(family, setting, batch, records, console)


def measure(
    family: Family, setting: Setting, batch: Batch, records: Records, console: Console
) -> None:
    if batch in records:
        return
    held_out = batch.prompts == "held-out"
    prompts = tiny_tulu.held_out_prompts if held_out else tiny_tulu.validation_prompts
    messages = prompts(batch.first + batch.count)[batch.first :]
    measured = family.measure(setting, messages, batch.first, SEED)
    records.add(batch, measured)
    tokens = {"drawn": measured.drawn, "forwarded": measured.forwarded}
    costs = [
        f"{(each + measured.scorer) / batch.count:.0f} {name}" for name, each in tokens.items()
    ]
    where = f"{batch.policy} {batch.prompts} {batch.first}: {setting.method} ({setting})"
    accuracy = sum(measured.right) / batch.count
    said = f"{where}: {accuracy:.3f}, tokens {', '.join(costs)}, {measured.seconds:.0f} s"
    console.print(said, soft_wrap=True, highlight=False)


def chosen(policy: str, records: Records, validation: int) -> Iterator[Setting]:
    """Every setting that some budget of some counting takes, and plain ones."""
    totals = records.totals(policy, "validation", validation)
    plain = next(totals[each.key] for each in tried() if each.method == PLAIN)
    keys = {
        setting.key
        for counting in COUNTINGS
        for rung in RUNGS
        for setting in choose(tried(), totals, plain, rung, counting).values()
    }
    yield from (each for each in tried() if each.key in keys)


if __name__ == "__main__":
    sys.exit(main())
