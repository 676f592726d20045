"""Which config guides which row: one for all, one a prompt, or one a row."""

from collections.abc import Sequence

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.guidance.rule import Configs, distinct, per_row


def row_configs(
    config: Configs, rows: int, prompts: int, *, beams: int = 1
) -> Sequence[GuidanceConfig]:
    """The config of each row of `generate`, where a prompt's rows stand together.

    A prompt has several rows by num_return_sequences, which may differ, or by num_beams, which are
    compared with each other and so share one config.

    Raises ValueError: a number of configs that is neither that of the prompts nor of the rows.
    """
    if isinstance(config, GuidanceConfig) or (len(config) == rows and beams == 1):
        return per_row(config, rows)
    if len(config) != prompts:
        one_a_row = f", or one a row ({rows})" if beams == 1 and rows != prompts else ""
        raise ValueError(
            f"{len(config)} configs came for {prompts} prompts with {rows // prompts} rows each: "
            f"pass one config, one a prompt ({prompts}){one_a_row}"
        )
    return [each for each in config for _ in range(rows // prompts)]


def all_configs(config: Configs) -> set[GuidanceConfig]:
    """The different configs among them."""
    return distinct([config] if isinstance(config, GuidanceConfig) else config)
