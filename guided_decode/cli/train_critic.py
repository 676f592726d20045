"""`guided-decode train-critic`: a critic of the user's own policy, from rollouts and rewards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from guided_decode.checkpoints.registry import find
from guided_decode.cli import model_options as models
from guided_decode.cli import row_options
from guided_decode.cli.chats import format_of
from guided_decode.cli.checkpoints import NOT_REMOTE, location
from guided_decode.cli.engine_options import EngineOptions
from guided_decode.cli.errors import Refusal
from guided_decode.cli.judge_options import JudgeOptions
from guided_decode.cli.remote_options import RemoteOptions
from guided_decode.cli.rollout_rows import read_rollout_rows
from guided_decode.cli.train_models import TrainModels
from guided_decode.cli.train_options import DrawOptions, RewardOptions, TrainOptions
from guided_decode.cli.train_rollouts import with_responses, with_rewards
from guided_decode.cli.train_run import TrainRun, alone_in

Source = Annotated[
    Path,
    typer.Argument(metavar="INPUT", help="JSONL: rollouts (prompt or messages, response or token "
                   "ids, reward), or prompts alone; - is stdin"),
]  # fmt: skip
PolicyName = Annotated[
    str, typer.Option("--policy", help="whose responses are valued: folder, registered name or Hub "
                      "id", rich_help_panel="Models")]  # fmt: skip
Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="gets the critic; kept, and gone on with")
]
Raw = Annotated[bool, typer.Option("--raw", help="prompts are text as it is, not chats")]
Seed = Annotated[int, typer.Option(min=0, max=2**62, help="of draws, splits and training")]
Dtype = Annotated[
    str,
    typer.Option(help="of the weights in training", metavar="float32|bfloat16|float16|auto",
                 rich_help_panel="Models"),
]  # fmt: skip
Overwrite = Annotated[bool, typer.Option("--overwrite", help="begin again instead of going on")]
_DRAW, _REWARDS, _TRAIN = DrawOptions(), RewardOptions(), TrainOptions()
_AS_IT_IS, _LOCAL, _AS_HERE = models.ScorerOptions(), EngineOptions(), JudgeOptions()


def train_critic(
    source: Source,
    policy: PolicyName,
    out: Out,
    rewards: RewardOptions = _REWARDS,
    draw: DrawOptions = _DRAW,
    training: TrainOptions = _TRAIN,
    seed: Seed = 0,
    raw: Raw = False,
    prompt_format: row_options.PromptFormat = None,
    overwrite: Overwrite = False,
    device: models.Device = None,
    dtype: Dtype = "float32",
    engine: EngineOptions = _LOCAL,
    reading: models.ScorerOptions = _AS_IT_IS,
    remote: RemoteOptions = NOT_REMOTE,
    judging: JudgeOptions = _AS_HERE,
) -> None:
    """Train a critic of a policy: from rollouts with rewards, or from prompts and a judge.

    DIR is then a scorer, load_scorer("DIR"), with a report card of prompts that were held out. Run
    again, it goes on where it stopped, to the same weights.
    """
    config = training.config(seed)
    if not 0.0 < training.held_out < 1.0:
        raise Refusal(f"--held-out {training.held_out}: expected a share of the prompts between 0 "
                      "and 1")  # fmt: skip
    draw.sampling()
    location(policy)
    engine.check(policy, None)
    if raw and prompt_format is not None:
        raise Refusal(f"--raw takes text as it is, so --prompt-format {prompt_format} has nothing "
                      "to say: drop one of them")  # fmt: skip
    rows = read_rollout_rows(source)
    rewards.check(rewarded=rows[0].reward is not None, target=config.target)
    asked = TrainModels(
        policy, device, dtype, format_of(prompt_format, find(policy)), raw, engine, reading, remote,
        judging,
    )  # fmt: skip
    asked.check_judging(rewards)
    with alone_in(out):
        rows = with_responses(rows, asked, draw, seed, out, overwrite=overwrite)
        rows = with_rewards(rows, asked, rewards, out, overwrite=overwrite)
        reader = asked.reader()
        rollouts = [reader.rollout(row) for row in rows]
        run = TrainRun(
            asked, config, rewards, training.held_out, rows, rollouts, out, training.save_every
        )
        if not run.is_done(overwrite=overwrite):
            run.train()
        run.finish()
        print(f"{out} has the critic; --scorer {out} guides by it", file=sys.stderr)
