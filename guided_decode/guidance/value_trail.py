"""V along rows while they are decoded: what the value gate and abstention read, once a prefix."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from guided_decode.guidance import failed_rows
from guided_decode.guidance.config import GuidanceConfig, OnError
from guided_decode.guidance.failed_rows import is_device_error
from guided_decode.prefix import PrefixHandle, as_ints
from guided_decode.scorer import Prefix, Scorer, Scores


class ValueTrail:
    """V of the last prefixes of one row that was read, so that nothing is asked for twice.

    A cache and nothing else: what is not in it is asked of the scorer again. A handle whose history
    was rewritten is another row's.

    prompt_length: tokens of the row's prefixes that are the prompt's.
    listens: whether the row's advantages are kept as well, for whoever shows them.
    advantages: Q(s,a) − V(s) by token id, of the last prefix of which candidates were scored; 0 for
        terminals that are exempt.
    asked: whether the scorer took the row in its last step, so that what the trail lacks then is
        not to be had.
    """

    __slots__ = ("_known", "_version", "advantages", "asked", "listens", "prompt_length")

    def __init__(self, prompt_length: int, *, listens: bool = False) -> None:
        self.prompt_length = prompt_length
        self.listens = listens
        self.advantages: dict[int, float] = {}
        self.asked = False
        self._version = -1
        # By length; the last two.
        self._known: dict[int, float] = {}

    def at(self, prefix: Prefix, length: int) -> float | None:
        """V of the prefix's first `length` tokens; None where it was not read."""
        if not isinstance(prefix, PrefixHandle) or prefix.version != self._version:
            return None
        return self._known.get(length)

    def add(self, prefix: Prefix, length: int, value: float) -> None:
        """Remembers V of the prefix's first `length` tokens."""
        if not isinstance(prefix, PrefixHandle) or not math.isfinite(value):
            return
        if prefix.version != self._version:
            self._known, self._version = {}, prefix.version
        self._known[length] = value
        self._known = {n: v for n, v in self._known.items() if n >= max(self._known) - 1}

    def begin_step(self) -> None:
        """Nothing was scored of the row's prefix yet."""
        self.advantages, self.asked = {}, False

    def response(self, prefix: Prefix) -> int:
        """Tokens of the response so far."""
        return len(prefix) - self.prompt_length


def check_has_values(scorer: Scorer, config: GuidanceConfig) -> None:
    """Raises ValueError: settings that read V(prefix), with a scorer that has none."""
    if scorer.terminal != "included":
        return
    given = {"abstain": config.abstain}
    if config.has_value_gate:
        given |= {"value_gate": config.value_gate, "value_gate_fall": config.value_gate_fall}
    named = [f"{name}={value:g}" for name, value in given.items() if value is not None]
    if named:
        raise ValueError(
            f"{' and '.join(named)} came with {type(scorer).__name__}, which values tokens or "
            "steps and no prefixes: expected a critic or a reward model"
        )


def read_values(
    scorer: Scorer,
    prefixes: Sequence[Prefix],
    trails: Sequence[ValueTrail],
    on_error: OnError = "raise",
) -> list[float]:
    """V of each row's prefix, from its trail, else from the scorer, without candidates.

    With on_error="passthrough" NaN where a row is refused or its value is no finite number, or all
    where the scorer fails; who reads them counts them.

    Raises as `Scorer.score`, and ValueError of NaN or infinity, with on_error="raise".
    """
    lengths = [len(prefix) for prefix in prefixes]
    return _read(scorer, prefixes, prefixes, lengths, trails, on_error)


def open_rows(
    scorer: Scorer,
    prefixes: Sequence[Prefix],
    configs: Sequence[GuidanceConfig],
    rows: Sequence[int],
    trails: Sequence[ValueTrail] | None,
    on_error: OnError = "raise",
) -> list[int]:
    """Those of the rows whose value gate is open, or that have none; the others are counted.

    One whose value cannot be read stays: its scoring then fails as it would without a gate.

    Args:
        prefixes, configs, trails: of all rows. Without trails each prefix is looked up whole.

    Raises:
        ValueError: value_gate_fall without trails, which know where responses begin; as
            `read_values`.
    """
    objects = {id(configs[i]): configs[i] for i in rows}
    gates = {key for key, config in objects.items() if config.has_value_gate}
    if not gates:
        return list(rows)
    gated = [i for i in rows if id(configs[i]) in gates]
    own = _own_trails(prefixes, configs, gated, trails)
    read = [prefixes[i] for i in gated]
    now = dict(zip(gated, read_values(scorer, read, own, on_error), strict=True))
    before = dict.fromkeys(gated, math.nan)
    falls = [
        at
        for at, i in enumerate(gated)
        if configs[i].value_gate_fall is not None and own[at].response(prefixes[i]) > 0
    ]
    # A row whose value now is no number is counted where its scoring fails.
    found = _read_before(scorer, [read[at] for at in falls], [own[at] for at in falls], on_error)
    before |= {gated[at]: value for at, value in zip(falls, found, strict=True)}
    shut = {i for i in gated if not (math.isnan(now[i]) or configs[i].is_open(now[i], before[i]))}
    scorer.stats.add(rows_gated=len(shut))
    return [i for i in rows if i not in shut]


def keep_scores(
    prefixes: Sequence[Prefix],
    trails: Sequence[ValueTrail],
    candidates: Tensor,  # [rows, k] int64
    scores: Scores,
    scored: Tensor,  # [rows, k] bool
    exempt: Tensor | None,  # [rows, k] bool
    rows: Sequence[int],
) -> None:
    """Notes what was scored of these rows in the trails that listen: one copy from the device."""
    listening = [i for i in rows if trails[i].listens]
    if not listening:
        return
    at = torch.tensor(listening).to(candidates.device)
    baseline = scores.baseline[at].double()
    advantage = (scores.values[at].double() - baseline[:, None]).masked_fill(~scored[at], math.nan)
    if exempt is not None:
        advantage = advantage.masked_fill(exempt[at], 0.0)
    every = torch.cat([candidates[at].double(), advantage, baseline[:, None]], -1).tolist()
    width = candidates.shape[1]
    for i, row in zip(listening, every, strict=True):
        pairs = zip(row[:width], row[width:-1], strict=True)
        trails[i].advantages = {int(a): v for a, v in pairs if a >= 0 and not math.isnan(v)}
        trails[i].add(prefixes[i], len(prefixes[i]), row[-1])


def _own_trails(
    prefixes: Sequence[Prefix],
    configs: Sequence[GuidanceConfig],
    rows: Sequence[int],
    trails: Sequence[ValueTrail] | None,
) -> list[ValueTrail]:
    if trails is not None:
        return [trails[i] for i in rows]
    for i in rows:
        if configs[i].value_gate_fall is not None:
            raise ValueError(
                f"value_gate_fall={configs[i].value_gate_fall:g} came without trails: the first "
                "token of a response has no value before it, and a prefix does not say where its "
                "response begins; pass trails=[ValueTrail(prompt_length), ...], one a row"
            )
    return [ValueTrail(len(prefixes[i])) for i in rows]


def _read_before(
    scorer: Scorer, prefixes: Sequence[Prefix], trails: Sequence[ValueTrail], on_error: OnError
) -> list[float]:
    """V of each row's prefix without its last token."""
    lengths = [len(prefix) - 1 for prefix in prefixes]
    asked: list[Prefix] = [
        prefix if trail.at(prefix, length) is not None else _first(prefix, length)
        for prefix, trail, length in zip(prefixes, trails, lengths, strict=True)
    ]
    # A scorer that knows the step's own prefixes alone has nothing to say of those before.
    can = [i for i, each in enumerate(asked) if each is prefixes[i] or not scorer.refusal(each, 0)]
    values = _read(
        scorer,
        [prefixes[i] for i in can],
        [asked[i] for i in can],
        [lengths[i] for i in can],
        [trails[i] for i in can],
        on_error,
    )
    unread = sum(map(math.isnan, values))
    if unread:
        failed_rows.count(scorer, unread, failed_rows.no_value(unread, len(values)))
    found = dict(zip(can, values, strict=True))
    return [found.get(i, math.nan) for i in range(len(asked))]


def _first(prefix: Prefix, length: int) -> Tensor:
    """The prefix's first tokens, int64 [length], as they lie there: a long one is not copied."""
    tokens = prefix.tokens if isinstance(prefix, PrefixHandle) else as_ints(prefix)
    return torch.from_numpy(tokens[:length])


def _read(
    scorer: Scorer,
    prefixes: Sequence[Prefix],
    asked: Sequence[Prefix],
    lengths: Sequence[int],
    trails: Sequence[ValueTrail],
    on_error: OnError,
) -> list[float]:
    """V of the first so many tokens of each prefix, which `asked` has as they go to the scorer."""
    values = [
        trail.at(prefix, length)
        for trail, prefix, length in zip(trails, prefixes, lengths, strict=True)
    ]
    missing = [i for i, value in enumerate(values) if value is None]
    if on_error == "passthrough":
        missing = [i for i in missing if scorer.refusal(asked[i], 0) is None]
    try:
        found = _ask(scorer, [asked[i] for i in missing])
    except Exception as error:
        if on_error == "raise" or is_device_error(error):
            raise
        missing, found = [], []
    for i, value in zip(missing, found, strict=True):
        values[i] = value
        trails[i].add(prefixes[i], lengths[i], value)
    strange = sum(not math.isfinite(value) for value in found)
    if strange and on_error == "raise":
        raise ValueError(failed_rows.no_value(strange, len(found)))
    return [math.nan if value is None or not math.isfinite(value) else value for value in values]


def _ask(scorer: Scorer, prefixes: Sequence[Prefix]) -> list[float]:
    if not prefixes:
        return []
    none = torch.empty(len(prefixes), 0, dtype=torch.int64)
    found: list[float] = scorer.score(prefixes, none).baseline.tolist()
    return found
