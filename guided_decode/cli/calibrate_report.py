"""What `calibrate` says, and the settings that it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guided_decode.cli.config_file import GUIDANCE, MODELS
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.remote_options import RemoteOptions
from guided_decode.guidance.config import GuidanceConfig

if TYPE_CHECKING:
    from guided_decode.lab.calibration.solving import Calibrated
    from guided_decode.lab.calibration.states import Measured, Spread

Settings = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Result:
    """A target's beta, and what it measures on held-out prompts, where there are some."""

    calibrated: Calibrated
    held_out: Measured | None


@dataclass(frozen=True, slots=True)
class Report:
    """prompts, held_out: how many. spread: of advantages where the policy goes by itself."""

    prompts: int
    held_out: int
    spread: Spread
    results: Sequence[Result]


def settings_of(
    names: tuple[str, str],
    reading: ScorerOptions,
    remote: RemoteOptions,
    dtype: str,
    config: GuidanceConfig,
) -> Settings:
    """The settings but beta, as a file of `--config` has them."""
    models = {"policy": names[0], "scorer": names[1], **reading.given(), **remote.given()}
    if dtype != "auto":
        models["dtype"] = dtype
    guidance = {name: each for name, each in asdict(config).items() if each is not None}
    # As it is typed: 0 is the whole vocabulary.
    guidance["top_k"] = config.top_k or 0
    guidance.pop("beta")
    return {MODELS: models, GUIDANCE: guidance}


def as_text(report: Report, config: GuidanceConfig) -> str:
    """Spread, and a line for each target."""
    own, cut = report.spread, f"k {config.top_k or 'all'}"
    cut += f", top-p {config.top_p:g}" if config.top_p < 1 else ""
    cut += f", gate {config.gate:g}" if config.gate is not None else ""
    lines = [
        f"{report.prompts} prompts at temperature 1, {cut}, tail {config.tail}",
        f"advantages of a token's candidates: standard deviation {own.deviation:.3g} under the "
        f"policy; from best to worst {own.median:.3g} (median), {own.most:.3g} (99%); the best is "
        f"not the policy's likeliest at {own.decisive:.0%} of tokens",
        "",
        "KL/token      beta  measured           95%  rounds"
        + ("  held out           95%" if report.held_out else ""),
    ]
    for each in report.results:
        found = each.calibrated
        line = f"{found.target:<8g}  {found.beta:>8.4g}  {_measured(found.measured)}"
        line += f"  {found.rounds:>6}"
        lines.append(line + (f"  {_measured(each.held_out)}" if each.held_out else ""))
    return "\n".join(lines)


def _measured(given: Measured) -> str:
    low, high = given.interval
    return f"{given.kl:>8.4g}  {f'{low:.3g}–{high:.3g}':>12}"


def as_dict(report: Report, settings: Settings) -> dict[str, Any]:
    """The figures by name, for JSON."""
    return {
        "prompts": report.prompts,
        "held_out_prompts": report.held_out,
        "spread": asdict(report.spread),
        "settings": settings,
        "results": [
            {
                "target_kl": each.calibrated.target,
                "beta": each.calibrated.beta,
                "kl": each.calibrated.measured.kl,
                "kl_error": each.calibrated.measured.error,
                "rounds": each.calibrated.rounds,
                "tokens": each.calibrated.tokens,
                "settled": each.calibrated.settled,
                "held_out_kl": None if each.held_out is None else each.held_out.kl,
                "held_out_kl_error": None if each.held_out is None else each.held_out.error,
            }
            for each in report.results
        ],
    }


def write_settings(file: Path, settings: Settings, report: Report) -> None:
    """Writes the settings with the one beta of the report, as `--config` takes them.

    Raises OSError: it cannot be written.
    """
    (result,) = report.results
    found = result.calibrated
    head = [
        f"# guided-decode calibrate, on {report.prompts} prompts: this beta diverges by "
        f"{found.measured.kl:.4g} nats a token",
        f"# from the policy at temperature 1 (asked for {found.target:g}; its standard error is "
        f"{found.measured.error:.2g}).",
    ]
    guidance: Mapping[str, Any] = {"beta": float(f"{found.beta:.6g}"), **settings[GUIDANCE]}
    write_file(file, head, {**settings, GUIDANCE: dict(guidance)})


def write_file(file: Path, head: Sequence[str], settings: Settings) -> None:
    """Writes settings as `--config` takes them, below lines of comment. Raises OSError."""
    import yaml

    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    file.write_text("\n".join([*head, text]), encoding="utf-8")
