"""The decoding methods that the demo compares."""

from dataclasses import dataclass, replace

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.lab.demo.chosen import GATED, PRUNE, REWEIGHT

SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Method:
    """One way of decoding.

    name: in the table. curve: which line of the plot it is a point of, if any; label: its text
    there.
    sample: at temperature 1; else greedy. config: of guidance. best_of: samples a prompt, of
    which the critic's favourite is the answer. shown: whether it has a row in the table.
    """

    name: str
    curve: str
    label: str = ""
    sample: bool = True
    config: GuidanceConfig | None = None
    best_of: int = 1
    shown: bool = True


def best_of(n: int) -> Method:
    """The best of n samples by the critic."""
    name = f"best of {n} by critic"
    return Method(name, "best of n", label=f"n={n}", best_of=n, shown=n == SAMPLES)


def reweight(top_k: int | None) -> Method:
    """Guided sampling with so many candidates a step."""
    config = replace(REWEIGHT, top_k=top_k)
    chosen = top_k == REWEIGHT.top_k
    return Method("guided, reweight", "reweight", f"k={top_k}", config=config, shown=chosen)


METHODS = (
    Method("plain, greedy", "greedy", sample=False),
    Method("plain, sampled", "best of n", "n=1"),
    best_of(SAMPLES),
    Method("guided, greedy", "", sample=False, config=REWEIGHT),
    reweight(REWEIGHT.top_k),
    Method("guided, reweight, gated", "gated", config=GATED),
    Method("guided, prune", "prune", config=PRUNE),
)
# More points of the plot's lines. Those of best-of-n are samples that are there already.
FEWER_SAMPLES = (2, 4)
OTHER_WIDTHS = (2, 8)
