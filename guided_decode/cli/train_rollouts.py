"""From prompts to rollouts with rewards, each stage in a file that a killed run goes on with."""

from __future__ import annotations

from pathlib import Path

from guided_decode.cli.rollout_judges import JudgingJob
from guided_decode.cli.rollout_rows import RolloutRow, read_rollout_rows
from guided_decode.cli.rollout_sampling import SamplingJob, draws_of
from guided_decode.cli.run_identity import digest, fingerprint, run_identity
from guided_decode.cli.score_run import score_rest
from guided_decode.cli.scored_file import ScoredFile
from guided_decode.cli.train_models import TrainModels
from guided_decode.cli.train_options import DrawOptions, RewardOptions

SAMPLES, ROLLOUTS = "samples.jsonl", "rollouts.jsonl"
# Rows that a judge gets at a time.
_JUDGED = 16


def with_responses(
    rows: list[RolloutRow],
    models: TrainModels,
    draw: DrawOptions,
    seed: int,
    folder: Path,
    *,
    overwrite: bool,
) -> list[RolloutRow]:
    """The rows themselves where they have responses; else what the policy writes to each.

    Raises Refusal: a prompt that cannot be continued, by its line; the folder has others' samples.
    """
    if rows[0].answered:
        return rows
    settings = {
        "policy": fingerprint(models.policy),
        "format": models.text_format,
        "raw": models.raw,
        "sampling": draw.sampling(),
        "max_tokens": draw.max_new_tokens,
        "seed": seed,
        **models.drawn_by(),
    }
    run, draws = run_identity({}, settings, None), draws_of(rows, draw.samples)
    path = folder / SAMPLES
    with ScoredFile(path, [one.key for one in draws], run, overwrite=overwrite) as file:
        if file.done < len(draws):
            with models.generator() as generator:
                job = SamplingJob(
                    generator, models.reader(), draw.sampling(), draw.max_new_tokens, seed, run
                )
                file.begin()
                score_rest(job, draws, file, draw.draw_batch, doing="drawing",
                           done_so="responses are drawn")  # fmt: skip
    return read_rollout_rows(path)


def with_rewards(
    rows: list[RolloutRow],
    models: TrainModels,
    rewards: RewardOptions,
    folder: Path,
    *,
    overwrite: bool,
) -> list[RolloutRow]:
    """The rows themselves where they have rewards; else with what the judge says.

    Raises Refusal: a response that gets no number, with its prompt; the folder has others' rewards.
    """
    if rows[0].reward is not None:
        return rows
    run = digest(["rewards", models.judge_identity(rewards)])
    path = folder / ROLLOUTS
    with ScoredFile(path, [row.key for row in rows], run, overwrite=overwrite) as file:
        if file.done < len(rows):
            job = JudgingJob(models.judge(rewards), models.reader(), run)
            file.begin()
            score_rest(job, rows, file, _JUDGED, doing="judging", done_so="responses are judged")
    return read_rollout_rows(path)
