"""`guided-decode report-card`: what a critic is worth, by rollouts that it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guided_decode.checkpoints.registry import find
from guided_decode.cli import model_options as models
from guided_decode.cli import row_options
from guided_decode.cli.chats import format_of
from guided_decode.cli.checkpoints import (
    NOT_REMOTE,
    follow_if_not_leading,
    load_policy,
    open_scorer,
    pair,
)
from guided_decode.cli.errors import Refusal
from guided_decode.cli.remote_options import RemoteOptions, refuse_placement
from guided_decode.cli.report_files import read_values, write_card
from guided_decode.cli.rollout_ids import RolloutReader
from guided_decode.cli.rollout_rows import read_rollout_rows
from guided_decode.cli.search_engines import ends_of
from guided_decode.lab.report_card.card import BUDGETS, POSITIONS

_PANEL = "Guidance that is looked at"
Name = Annotated[
    str, typer.Argument(metavar="SCORER", help="a critic or reward model: folder, registered "
                        "name, Hub id, or a scorer server's address")]  # fmt: skip
Rollouts = Annotated[
    Path, typer.Option("--rollouts", metavar="FILE", help="JSONL: prompt or messages, response or "
                       "token ids, reward; none of the critic's training; - is stdin")]  # fmt: skip
Output = Annotated[
    Path, typer.Option("--output", metavar="DIR", help="gets report_card.json, .md and .png")
]
Plot = Annotated[bool, typer.Option(help="a picture, too")]
Raw = Annotated[bool, typer.Option("--raw", help="prompts are text as it is, not chats")]
TopK = Annotated[int, typer.Option(min=1, help="candidates of a position", rich_help_panel=_PANEL)]
Keep = Annotated[
    str, typer.Option("--tail", metavar="mask|keep", help="tokens outside the candidates",
                      rich_help_panel=_PANEL)]  # fmt: skip
Budget = Annotated[
    list[float] | None,
    typer.Option("--budget", help="nats of KL a token, for which a beta is found; may be repeated "
                 f"\\[{', '.join(f'{each:g}' for each in BUDGETS)}]", rich_help_panel=_PANEL),
]  # fmt: skip
Count = Annotated[
    int, typer.Option("--positions", min=1, help="of the responses, drawn evenly, for advantages "
                      "and KL", rich_help_panel=_PANEL)]  # fmt: skip
_AS_IT_IS = models.ScorerOptions()


def report_card(
    scorer: Name,
    rollouts: Rollouts,
    output: Output = Path("report_card"),
    policy: models.Policy = None,
    device: models.Device = None,
    scorer_device: models.ScorerDevice = None,
    dtype: models.Dtype = "auto",
    reading: models.ScorerOptions = _AS_IT_IS,
    remote: RemoteOptions = NOT_REMOTE,
    raw: Raw = False,
    prompt_format: row_options.PromptFormat = None,
    top_k: TopK = 16,
    tail: Keep = "mask",
    budget: Budget = None,
    positions: Count = POSITIONS,
    seed: row_options.Seed = 0,
    plot: Plot = True,
) -> None:
    """Measure a critic: rank by position, calibration, Bellman residual, advantages, beta by KL.

    Printed as Markdown, and written with JSON and a picture.
    """
    from guided_decode.guidance.config import GuidanceConfig
    from guided_decode.lab.demo.plot import require_matplotlib
    from guided_decode.lab.report_card.card import Guided, make_card

    if plot:
        require_matplotlib()
    config = GuidanceConfig(beta=0.0, top_k=top_k, tail=tail)  # type: ignore[arg-type]
    names = pair(policy, scorer, head=reading.head)
    refuse_placement(scorer, scorer_device=scorer_device)
    follow_if_not_leading(scorer, reading, dtype)
    rows = read_rollout_rows(rollouts)
    if not rows[0].answered or rows[0].reward is None:
        raise Refusal(f"{rows[0].where}: no {'reward' if rows[0].answered else 'response'}: "
                      "expected rollouts with response and reward")  # fmt: skip
    own = reading.adapter if reading.head is not None and names[0] == names[1] else None
    loaded = load_policy(
        names[0], device, dtype, adapter=own, trust_remote_code=reading.trust_remote_code
    )
    terminals = ends_of(names[0], loaded.tokenizer, trust_remote_code=reading.trust_remote_code)
    reader = RolloutReader(
        loaded.tokenizer, format_of(prompt_format, find(names[0])), raw, terminals,
        int(loaded.model.config.get_text_config().vocab_size),
    )  # fmt: skip
    read = [reader.rollout(row) for row in rows]
    critic = open_scorer(
        scorer, reading, device=scorer_device or device, dtype=dtype, policy=loaded, remote=remote
    )
    guided = Guided(
        loaded.model, terminals, config, tuple(budget or BUDGETS), positions, seed % 2**63
    )
    card = make_card(
        read_values(critic, read), read, scorer=scorer, policy=names[0], scored_by=critic,
        guided=guided,
    )  # fmt: skip
    write_card(card, output, plot=plot)
    print(card.markdown(), end="")
