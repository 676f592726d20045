"""Plain and guided decoding of one prompt: their texts, values, and what guidance cost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from guided_decode.cli.decoding import Decoded, decode, ids_of, terminal_ids
from guided_decode.cli.side_by_side import ValuedText, side_by_side
from guided_decode.cli.terminal import console
from guided_decode.cli.token_texts import token_texts
from guided_decode.cli.token_values import rounded, token_values

if TYPE_CHECKING:
    from guided_decode.cli.decoding import Setup
    from guided_decode.cli.prompts_in import Prompt


def compare(setup: Setup, given: Prompt, *, as_json: bool) -> None:
    """Decodes the prompt without and with guidance, from one seed, and prints both."""
    prompt = ids_of(setup, given.messages)
    plain = decode(setup.policy, prompt, setup.sampling)
    guided = decode(setup.policy, prompt, setup.sampling, setup.scorer, setup.config)
    pairs = [
        tuple(_valued(setup, prompt, way.responses[i]) for way in (plain, guided))
        for i in range(setup.sampling.num_samples)
    ]
    if as_json:
        for i, values in enumerate(pairs):
            _print_json(given, i, (plain, guided), values)
        return
    out = console()
    for values in pairs:
        columns = list(zip(("plain", "guided"), values, strict=True))
        out.print("", *side_by_side(columns), "", sep="\n")
    out.print(_figures(plain, guided, pairs))


def _valued(setup: Setup, prompt: list[int], response: list[int]) -> ValuedText:
    ends = terminal_ids(setup.policy.model)
    values = token_values(setup.scorer, prompt, response, ends)
    texts = token_texts(setup.policy.tokenizer, response)
    return ValuedText(texts, values, summed=setup.scorer.terminal == "included")


def _figures(plain: Decoded, guided: Decoded, pairs: list[tuple[ValuedText, ...]]) -> Table:
    """What each way of decoding forwarded and took, and where its values end."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("policy tokens", "scorer tokens", "seconds", "value at the end", "ended"):
        table.add_column(title, justify="right")
    for i, (title, way) in enumerate((("plain", plain), ("guided", guided))):
        ends = [pair[i].last for pair in pairs if pair[i].last is not None]
        table.add_row(
            title,
            f"{way.policy_tokens:,}",
            f"{way.scorer_tokens:,}",
            f"{way.seconds:.2f}",
            ", ".join(f"{end:.2f}" for end in ends),
            f"{sum(way.finished)} of {len(way.finished)}",
        )
    return table


def _print_json(
    given: Prompt, sample: int, ways: tuple[Decoded, Decoded], values: tuple[ValuedText, ...]
) -> None:
    line: dict[str, Any] = {**given.fields(), "sample": sample}
    for name, way, valued in zip(("plain", "guided"), ways, values, strict=True):
        line[name] = {
            "text": way.texts[sample],
            "tokens": valued.pieces,
            "values": [rounded(value) for value in valued.values],
            "finished": way.finished[sample],
            "cost": way.cost(),
        }
    print(json.dumps(line, ensure_ascii=False), flush=True)
