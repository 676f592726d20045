"""What the processor did, on the server's /metrics and in a log line now and then.

The counters are the worker's, and are published a moment after a step. They reach /metrics through
prometheus_client's multiprocess directory: PROMETHEUS_MULTIPROC_DIR must be set before the server
starts.
"""

import atexit
import functools
import logging
import operator
import threading
import time
import weakref
from dataclasses import dataclass, fields
from typing import Any

from guided_decode.stats import ScorerStats

logger = logging.getLogger("guided_decode")

# Seconds from a step to its numbers on /metrics.
_DELAY = 0.1

_HELP = {
    "guided_rows": "rows handed to guidance",
    "draft_rows": "of these, rows behind drafted tokens (speculative decoding)",
    "steps": "steps of requests, each a forward of the policy for them; their first left out",
    "tokens": "tokens that these wrote: steps by tokens are forwards a token",
    "wasted_rows": "rows guided whose sample was dropped (prompts still being prefilled)",
    "unguided_rows": "rows that asked but whose tokens vLLM did not hand over",
    "clamps": "wishes of requests that were not granted in full",
    "pruned_siblings": "samples ended by their siblings",
    "abstained_rows": "requests ended because their value fell too low",
    "seconds": "seconds in the processor",
    "rows_scored": "rows whose candidates were scored",
    "rows_gated": "rows that the gate let pass",
    "prefix_tokens": "tokens of prefixes that went through the scorer",
    "candidate_tokens": "candidates that went through the scorer",
    "cache_hits": "tokens found in the scorer's cache",
    "evictions": "tokens dropped from the scorer's cache",
    "passthroughs": "rows that went on unguided: scoring failed, or no token was left",
    "forwards": "forwards of the scorer",
    "forward_seconds": "seconds in the scorer's forwards",
    "scorer_seconds": "seconds in the scorer",
}
_GAUGES = {
    "live_rows": "requests of the batch that asked for guidance or pruning",
    "groups": "groups of siblings with a live member",
}


@dataclass(slots=True)
class StepCounts:
    """What the processor counts itself; the rest is the scorer's."""

    guided_rows: int = 0
    draft_rows: int = 0
    steps: int = 0
    tokens: int = 0
    wasted_rows: int = 0
    unguided_rows: int = 0
    clamps: int = 0
    pruned_siblings: int = 0
    abstained_rows: int = 0
    seconds: float = 0.0


_COUNTED = tuple(field.name for field in fields(StepCounts))
_counted = operator.attrgetter(*_COUNTED)


class Metrics:
    """Publishes the counters of one engine's processor and its scorer."""

    def __init__(self, counts: StepCounts, scorer: ScorerStats, *, log_every: float) -> None:
        self._counts, self._scorer = counts, scorer
        self._log_every = log_every
        self._published = dict.fromkeys(_HELP, 0.0)
        self._logged = dict(self._published)
        self._logged_at = time.monotonic()
        self._collectors = _collectors()
        self._gauges: dict[str, float] = {}
        self._is_due = False
        self._lock = threading.Lock()
        # The last steps' timer ends with the process.
        atexit.register(_publish_last, weakref.ref(self))

    def publish_soon(self, **gauges: float) -> None:
        """`publish` within a tenth of a second, once for all steps until then: nobody reads more
        often than that, and it takes longer than a row of a step."""
        self._gauges = gauges
        if not self._is_due:
            self._is_due = True
            timer = threading.Timer(_DELAY, self._publish_due)
            timer.daemon = True
            try:
                timer.start()
            except RuntimeError:
                # No thread is to be had, near a process's end for example.
                self._publish_due()

    def _publish_due(self) -> None:
        with self._lock:
            # First: what a step notes from now on is published by another timer.
            self._is_due = False
            self._publish(self._gauges)

    def publish(self, **gauges: float) -> None:
        """Brings /metrics up to date, and logs once the interval is over."""
        with self._lock:
            self._publish(gauges)

    def _publish(self, gauges: dict[str, float]) -> None:
        now = self._numbers()
        for name, collector in self._collectors.items():
            if name in gauges:
                collector.set(gauges[name])
            elif name in now and now[name] > self._published[name]:
                collector.inc(now[name] - self._published[name])
        self._published = now
        if self._log_every and time.monotonic() - self._logged_at >= self._log_every:
            self._log(now)

    def _numbers(self) -> dict[str, float]:
        own = dict(zip(_COUNTED, _counted(self._counts), strict=True))
        scorer = self._scorer.as_dict()
        scorer["scorer_seconds"] = scorer.pop("seconds")
        return own | scorer

    def _log(self, now: dict[str, float]) -> None:
        new = {name: now[name] - self._logged[name] for name in now}
        self._logged, self._logged_at = now, time.monotonic()
        if not any(new[name] for name in ("guided_rows", "pruned_siblings", "abstained_rows")):
            return
        forwarded = new["prefix_tokens"] + new["candidate_tokens"]
        logger.info(
            "guided rows: %d (%d gated, %d wasted, %d passed through), scorer tokens: %d, cache "
            "hit rate: %.1f%%, evicted: %d, clamps: %d, pruned siblings: %d, abstained: %d, "
            "forwards a token: %.2f, seconds: %.2f (%.2f in the scorer)",
            new["guided_rows"], new["rows_gated"], new["wasted_rows"],
            new["passthroughs"] + new["unguided_rows"], forwarded,
            100 * new["cache_hits"] / max(1.0, new["cache_hits"] + forwarded),
            new["evictions"], new["clamps"], new["pruned_siblings"], new["abstained_rows"],
            new["steps"] / max(1.0, new["tokens"]), new["seconds"], new["scorer_seconds"],
        )  # fmt: skip


def _publish_last(metrics: "weakref.ref[Metrics]") -> None:
    own = metrics()
    if own is not None and own._is_due:
        own._publish_due()


@functools.cache
def _collectors() -> dict[str, Any]:
    """One collector a number, made once a process; none without prometheus_client."""
    try:
        from prometheus_client import Counter, Gauge
    except ImportError:
        return {}
    counters = {
        name: Counter(f"guided_decode_{name}", f"guided-decode: {text}")
        for name, text in _HELP.items()
    }
    gauges = {
        name: Gauge(f"guided_decode_{name}", f"guided-decode: {text}", multiprocess_mode="livesum")
        for name, text in _GAUGES.items()
    }
    return counters | gauges
