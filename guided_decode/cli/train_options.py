"""The options of `train-critic`: what is drawn, who judges it, and how a critic is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, cast

import typer

from guided_decode.cli.errors import Refusal
from guided_decode.critics.config import LOSSES, MODES, TARGETS, CriticConfig
from guided_decode.search.requests import Sampling


def _option(panel: str, text: str, *names: str, **how: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **how)


_DRAWN, _JUDGED, _TRAINED = "Responses that are drawn", "Rewards", "Training"

Samples = Annotated[int, _option(_DRAWN, "of each prompt", min=1)]
Temperature = Annotated[float, _option(_DRAWN, "of the draws; 0 is greedy")]
TopP = Annotated[float, _option(_DRAWN, "probability mass of the draws")]
Longest = Annotated[int, _option(_DRAWN, "tokens of the longest response", min=1)]
DrawBatch = Annotated[int, _option(_DRAWN, "responses that are drawn at once", min=1)]


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """How responses are drawn, of prompts that come without."""

    samples: Samples = 4
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    max_new_tokens: Longest = 256
    draw_batch: DrawBatch = 64

    def sampling(self) -> Sampling:
        """The same for a generator. Raises ValueError: a number that has no meaning; Refusal:
        several greedy samples, which are one."""
        if self.samples > 1 and self.temperature == 0.0:
            raise Refusal(f"--samples {self.samples} at --temperature 0 are the same response: "
                          "pass --samples 1, or a temperature")  # fmt: skip
        return Sampling(self.temperature, self.top_p)


JudgeName = Annotated[
    str | None,
    _option(_JUDGED, "a function of prompt and response that returns a number",
            metavar="MODULE:FUNCTION"),
]  # fmt: skip
Answer = Annotated[
    str | None,
    _option(_JUDGED, "1 where the response's answer is that of the line's field answer, else 0",
            metavar="final|boxed|number|MODULE:FUNCTION"),
]  # fmt: skip
RewardModel = Annotated[
    str | None,
    _option(_JUDGED, "any scorer; the options of scorers say how it is read",
            metavar="NAME"),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class RewardOptions:
    """Who says what responses are worth, where the lines do not."""

    judge: JudgeName = None
    answer: Answer = None
    reward_model: RewardModel = None

    def given(self) -> list[str]:
        """The flags that were given."""
        named = {
            "--judge": self.judge,
            "--answer": self.answer,
            "--reward-model": self.reward_model,
        }
        return [flag for flag, value in named.items() if value is not None]

    def check(self, *, rewarded: bool, target: str) -> None:
        """Raises Refusal: none where one is needed, several, or one that would not be asked."""
        given = self.given()
        if target == "scores" and self.reward_model is None:
            raise Refusal(
                "--target scores are a reward model's of each prefix: pass --reward-model"
            )
        if len(given) > 1:
            raise Refusal(f"{' and '.join(given)} came together: expected one judge")
        if rewarded and given and target != "scores":
            raise Refusal(f"{given[0]} came with lines that have rewards: drop it, or the rewards")
        if not rewarded and not given:
            raise Refusal("the lines have no reward: pass --judge, --answer or --reward-model, or "
                          "lines with a field reward")  # fmt: skip


Mode = Annotated[
    str,
    _option(_TRAINED, "a copy of the policy, LoRA adapters on it, or a head on its hidden states",
            metavar="|".join(MODES)),
]  # fmt: skip
Target = Annotated[
    str,
    _option(_TRAINED, "of each prefix: the outcome, the λ-return of the critic's own values, or "
            "the reward model's score", metavar="|".join(TARGETS)),
]  # fmt: skip
LossName = Annotated[
    str,
    _option(_TRAINED, "squared error, or classes wrong, right and unfinished",
            metavar="|".join(LOSSES)),
]  # fmt: skip
Lam = Annotated[float, _option(_TRAINED, "λ of --target td")]
Epochs = Annotated[int | None, _option(_TRAINED, "passes over the rollouts \\[3; a head: 40]")]
BatchSize = Annotated[int | None, _option(_TRAINED, "rollouts a step \\[16; a head: 64]")]
Rate = Annotated[
    float | None, _option(_TRAINED, "learning rate \\[full 2e-5, LoRA 1e-4, head 4e-3]")
]
Decay = Annotated[float, _option(_TRAINED, "of weights, decoupled")]
Warmup = Annotated[float, _option(_TRAINED, "share of the steps in which the rate rises")]
HeldOut = Annotated[
    float, _option(_TRAINED, "share of the prompts that the report card is made of")
]
Validation = Annotated[float, _option(_TRAINED, "share of the other prompts that choose the epoch")]
Width = Annotated[int, _option(_TRAINED, "of a head's inner layer; 0 is a linear head", min=0)]
Rank = Annotated[int, _option(_TRAINED, "of LoRA's matrices", min=1)]
Alpha = Annotated[int, _option(_TRAINED, "LoRA's scale, over its rank", min=1)]
SaveEvery = Annotated[
    int, _option(_TRAINED, "steps between two states, of which a killed run loses one", min=1)
]


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a critic is trained."""

    mode: Mode = "full"
    target: Target = "outcome"
    loss: LossName = "squared"
    lam: Lam = 0.95
    epochs: Epochs = None
    batch_size: BatchSize = None
    lr: Rate = None
    weight_decay: Decay = 0.01
    warmup: Warmup = 0.03
    held_out: HeldOut = 0.1
    validation: Validation = 0.1
    width: Width = 256
    lora_rank: Rank = 16
    lora_alpha: Alpha = 32
    save_every: SaveEvery = 100

    def config(self, seed: int) -> CriticConfig:
        """The same for the library. Raises ValueError: a setting has no meaning."""
        return CriticConfig(
            mode=cast(Any, self.mode), target=cast(Any, self.target), loss=cast(Any, self.loss),
            lam=self.lam, epochs=self.epochs, batch_size=self.batch_size, lr=self.lr,
            weight_decay=self.weight_decay, warmup=self.warmup, validation=self.validation,
            width=self.width, lora_rank=self.lora_rank, lora_alpha=self.lora_alpha, seed=seed,
        ).settled()  # fmt: skip
