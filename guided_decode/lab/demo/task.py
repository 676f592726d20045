"""What a demo asks, and who judges the answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from guided_decode import smol, tiny_tulu
from guided_decode.lab.intervals import mean_interval, wilson


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked, and who judges the answers.

    prompts: so many held-out user messages. render: the text that a policy continues. judge: of
    (message, response text). counted: the judge says 0 or 1, so that the mean is a share.
    max_new_tokens: of an answer. must_end: one that does not end within them earned nothing in the
    critic's training. title: of a section of the table, with its name for {}.
    """

    prompts: Callable[[int], list[str]]
    render: Callable[[str], str]
    judge: Callable[[str, str], float]
    counted: bool
    max_new_tokens: int
    must_end: bool
    title: str = "{} policy"

    @property
    def measure(self) -> str:
        """What the mean of the judgements is called."""
        return "accuracy" if self.counted else "reward"

    def interval(self, judgements: Sequence[float]) -> tuple[float, float]:
        """Of their mean, 95%."""
        if self.counted:
            return wilson(sum(one == 1.0 for one in judgements), len(judgements))
        return mean_interval(judgements)


def _is_correct(message: str, text: str) -> float:
    return float(tiny_tulu.is_correct(message, text))


SUMS = Task(tiny_tulu.held_out_prompts, tiny_tulu.render, _is_correct, True, 80, must_end=True)


def smol_task(name: str) -> Task:
    """One of smol's: a score of VADER, or the share of constraints that is kept."""
    own = smol.find_task(name)

    def prompts(n: int) -> list[str]:
        # Of every topic before a second of one.
        every = own.prompts("held-out")
        return [every[i] for start in range(4) for i in range(start, len(every), 4)][:n]

    return Task(prompts, smol.render, own.reward, False, 64, must_end=False, title="{}")
