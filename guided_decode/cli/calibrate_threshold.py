"""`guided-decode calibrate --abstain` and `--margin`: a threshold from rollouts with rewards."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guided_decode.checkpoints.registry import find
from guided_decode.cli.calibrate_report import settings_of, write_file
from guided_decode.cli.chats import format_of
from guided_decode.cli.checkpoints import known_as, load_policy, open_scorer
from guided_decode.cli.errors import Refusal
from guided_decode.cli.guidance_options import CalibratedOptions, chosen_for
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.remote_options import RemoteOptions
from guided_decode.cli.report_files import bar
from guided_decode.cli.rollout_ids import RolloutReader
from guided_decode.cli.rollout_rows import RolloutRow, read_rollout_rows
from guided_decode.cli.search_engines import ends_of
from guided_decode.cli.threshold_options import ThresholdOptions
from guided_decode.cli.threshold_report import Group, ThresholdReport, guidance_in_words
from guided_decode.guidance.config import GuidanceConfig

if TYPE_CHECKING:
    from torch import Tensor

    from guided_decode.critics.rollout import Rollout
    from guided_decode.scorer import Scorer


@dataclass(frozen=True, slots=True)
class Models:
    """What the command was told of its models, as the options of `calibrate`."""

    names: tuple[str, str]
    device: str | None
    scorer_device: str | None
    dtype: str
    reading: ScorerOptions
    remote: RemoteOptions


def calibrate_threshold(
    models: Models,
    asked: ThresholdOptions,
    guidance: CalibratedOptions,
    held_out: Path | None,
    output: Path | None,
    *,
    raw: bool,
    prompt_format: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Finds the threshold, prints what it does, and writes the settings.

    Raises Refusal, ValueError: files without rewards, too few good responses for alpha, or a scorer
    without values of prefixes.
    """
    names, reading = models.names, models.reading
    _config(asked, guidance, names[1])
    assert asked.rollouts is not None
    files = [_rows(asked.rollouts), [] if held_out is None else _rows(held_out)]
    own = reading.adapter if reading.head is not None and names[0] == names[1] else None
    trusts = reading.trust_remote_code
    policy = load_policy(names[0], models.device, models.dtype, adapter=own,
                         trust_remote_code=trusts)  # fmt: skip
    terminals = ends_of(names[0], policy.tokenizer, trust_remote_code=trusts)
    reader = RolloutReader(
        policy.tokenizer, format_of(prompt_format, find(names[0])), raw, terminals,
        int(policy.model.config.get_text_config().vocab_size),
    )  # fmt: skip
    critic = open_scorer(names[1], reading, device=models.scorer_device or models.device,
                         dtype=models.dtype, policy=policy, remote=models.remote)  # fmt: skip
    config = _config(asked, guidance, known_as(critic, names[1]))
    used, others = ([reader.rollout(row) for row in rows] for rows in files)
    finder = _Finder(asked, config, policy.model, critic, terminals)
    report = finder.found(used, others, seed)
    found = {asked.named: report.threshold.value}
    if asked.abstain:
        found["abstain_after"] = asked.abstain_after
    settings = settings_of(names, reading, models.remote, models.dtype, config.changed(**found))
    settings["guidance"] = {"beta": config.beta, **settings["guidance"]}
    if output is not None:
        write_file(output, report.head(), settings)
    print(json.dumps(report.as_dict(settings), indent=2) if as_json else report.text())
    if output is not None:
        print(f"settings for --config: {output}", file=sys.stderr)


def _config(asked: ThresholdOptions, guidance: CalibratedOptions, scorer: str) -> GuidanceConfig:
    """The guidance beside which the threshold is found. Raises Refusal: it has no use for it."""
    if asked.abstain:
        # Rollouts are plain samples unless something is said of the guidance that wrote them.
        if guidance == CalibratedOptions():
            return GuidanceConfig(beta=0.0, tail="keep")
        return guidance.over(chosen_for(scorer, guidance.rule))
    chosen = chosen_for(scorer, "prune")
    if chosen.rule != "prune":
        chosen = GuidanceConfig(rule="prune", margin=0.0)
    config = guidance.over(chosen)
    if config.rule != "prune":
        raise Refusal("--margin is of --rule prune, and this guidance reweights: drop --preset and "
                      "--rule")  # fmt: skip
    if config.kl_coef:
        raise Refusal(f"--kl-coef {config.kl_coef:g} came with --margin, which compares values "
                      "alone: drop it")  # fmt: skip
    return config


def _rows(source: Path) -> list[RolloutRow]:
    rows = read_rollout_rows(source)
    if not rows[0].answered or rows[0].reward is None:
        raise Refusal(f"{rows[0].where}: no {'reward' if rows[0].answered else 'response'}: "
                      "expected rollouts with response and reward")  # fmt: skip
    return rows


@dataclass(frozen=True, slots=True)
class _Finder:
    asked: ThresholdOptions
    config: GuidanceConfig
    policy: Any
    critic: Scorer
    terminals: Collection[int]

    def found(
        self, used: Sequence[Rollout], others: Sequence[Rollout], seed: int
    ) -> ThresholdReport:
        from guided_decode.lab.calibration.conformal import (
            lower_threshold,
            one_a_prompt,
            upper_threshold,
        )
        from guided_decode.lab.calibration.trajectories import lowest
        from guided_decode.lab.report_card.measures import threshold_of

        asked = self.asked
        assert asked.alpha is not None
        bar_at = asked.good_above
        if bar_at is None:
            bar_at = threshold_of([each.reward for each in used])
        drawn = [used[i] for i in one_a_prompt(used, seed % 2**63)]
        good = [each.reward > bar_at for each in drawn]
        along = self._along(drawn)
        of_good = [each for each, is_good in zip(along, good, strict=True) if is_good]
        if asked.abstain:
            after = asked.abstain_after
            threshold = lower_threshold([lowest(each, after) for each in of_good], asked.alpha)
        else:
            threshold = upper_threshold([float(each.max()) for each in of_good], asked.alpha)
        self._check_finite(threshold.value)
        of_bad = [each for each, is_good in zip(along, good, strict=True) if not is_good]
        groups = [Group(False, False, self._share(of_bad, threshold.value))]
        groups += self._held_out(others, bar_at, threshold.value)
        prompts = len({each.prompt for each in used})
        return ThresholdReport(
            asked.named, asked.alpha, threshold, asked.abstain_after, len(used), prompts,
            len(of_bad), bar_at, groups, guidance_in_words(self.config) if asked.abstain else None,
        )  # fmt: skip

    def _along(self, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """V before each token, or how far each lies below the best candidate."""
        from guided_decode.critics.values import values_along
        from guided_decode.lab.calibration.trajectories import prune_gaps

        with bar("scoring") as progress:
            task = progress.add_task("rollouts", total=len(rollouts))
            if self.asked.abstain:
                return values_along(
                    self.critic, rollouts, at_end=False,
                    done=lambda n: progress.update(task, completed=n),
                )  # fmt: skip
            found = []
            for each in rollouts:
                found += prune_gaps(self.policy, self.critic, [each], self.config, self.terminals)
                progress.advance(task)
            return found

    def _share(self, along: Sequence[Tensor], threshold: float) -> Any:
        from guided_decode.lab.calibration.trajectories import ended, pruned

        if self.asked.abstain:
            return ended(along, threshold, self.asked.abstain_after)
        return pruned(along, threshold)

    def _held_out(
        self, others: Sequence[Rollout], good_above: float, threshold: float
    ) -> list[Group]:
        if not others:
            return []
        along, groups = self._along(others), []
        for is_good in (True, False):
            own = [a for a, each in zip(along, others, strict=True)
                   if (each.reward > good_above) is is_good]  # fmt: skip
            groups.append(Group(is_good, True, self._share(own, threshold)))
        return groups

    def _check_finite(self, threshold: float) -> None:
        if threshold in (float("inf"), float("-inf")):
            raise Refusal(
                f"--abstain-after {self.asked.abstain_after}: so many good responses are shorter "
                "that no value is read of them: expected fewer tokens"
                if self.asked.abstain
                else f"more than alpha of the good responses have a token that is none of the "
                f"{self.config.top_k} candidates, which no margin lets be: expected more of them "
                "(--top-k, --top-p), --tail keep, or rollouts of this guidance"
            )
