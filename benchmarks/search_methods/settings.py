"""The settings that are tried: on the validation prompts all of them, on the held-out the chosen.

Whatever samples does so at temperature 1 without truncation. Each method has about as many settings
as it has knobs that matter here.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PLAIN, GREEDY, BEST_OF_N = "plain", "greedy", "best-of-n"
# A line of a worked answer has 10 to 12 tokens.
LINE = {"block": 16, "stop": ["\n"]}


@dataclass(frozen=True)
class Setting:
    """A method of the table with its settings.

    runs: the search method's published name; "guide", for guidance of single tokens; "generate",
    for the policy alone. given: by name, as `Method.begin`, `GuidanceConfig` take them.
    """

    method: str
    runs: str
    given: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The same for the same setting, in every process."""
        return f"{self.method} {json.dumps(self.given, sort_keys=True)}"

    def __str__(self) -> str:
        return ", ".join(f"{name} {_written(value)}" for name, value in self.given.items())


def tried() -> list[Setting]:
    """All settings, the methods in the table's order."""
    made = [
        Setting(GREEDY, "generate", {"sample": False}),
        Setting(PLAIN, "generate", {"sample": True}),
        *(Setting(BEST_OF_N, "best-of-n", {"n": n}) for n in (2, 3, 4, 6, 8, 16)),
        *(Setting("vote", "vote", {"n": n}) for n in (3, 5, 9)),
        *(Setting("weighted vote", "weighted-vote", {"n": n}) for n in (2, 4, 8)),
        *_reweight(),
        *_prune(),
    ]
    for width, branches in ((1, 2), (1, 4), (2, 2), (4, 2)):
        shape = {"width": width, "branches": branches}
        made.append(Setting("value beam", "value-beam", shape))
    shapes = [({"block": 6}, 1, 4), ({"block": 6}, 1, 8), (LINE, 1, 2), (LINE, 1, 4), (LINE, 1, 8),
              (LINE, 2, 2)]  # fmt: skip
    for piece, width, branches in shapes:
        given = {"width": width, "branches": branches} | piece
        made.append(Setting("blockwise", "block", given))
    for n, margin in ((2, 0.1), (4, 0.1), (4, 0.3), (8, 0.1), (8, 0.3)):
        given = {"n": n, "block": 12, "margin": margin}
        made.append(Setting("refill", "prune-and-refill", given))
    for particles, beta in ((2, 20.0), (4, 5.0), (4, 20.0), (8, 5.0), (8, 20.0)):
        given = {"particles": particles, "block": 12, "beta": beta, "choice": "best"}
        made.append(Setting("SMC", "smc", given))
    return [*made, *_trees()]


def _reweight() -> Iterator[Setting]:
    for beta, k, gate in itertools.product((4.0, 10.0), (2, 4), (None, 0.9)):
        yield Setting("reweight", "guide", _without_none(beta=beta, top_k=k, gate=gate))


def _prune() -> Iterator[Setting]:
    for margin, mass, gate in itertools.product((0.02, 0.1), (0.9, 0.99), (None, 0.9)):
        given = _without_none(rule="prune", margin=margin, top_k=4, top_p=mass, gate=gate)
        yield Setting("prune", "guide", given)


def _trees() -> Iterator[Setting]:
    for simulations, c_puct in itertools.product((4, 8), (1.0, 2.0)):
        given = {"simulations": simulations, "k": 4, "c_puct": c_puct}
        yield Setting("MCTS", "ppo-mcts", given)
    # As it was published.
    yield Setting("MCTS", "ppo-mcts", {"simulations": 10, "k": 10, "c_puct": 8.0})


def _without_none(**given: Any) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _written(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(json.dumps(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
