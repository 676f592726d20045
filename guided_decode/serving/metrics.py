"""A scorer server's counters for Prometheus."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guided_decode.serving.server import ScorerServer

PREFIX = "guided_decode_scorer_server_"
_COUNTERS = {
    "requests": "requests about rows",
    "rows": "rows that were answered with scores",
    "rounds": "rounds of scoring, each of all that waited",
    "rows_asked_again": "rows whose tokens the server did not know",
    "failed": "requests that the scorer refused or failed at",
    "busy": "requests that were refused because too much waited",
    "malformed": "messages that were none",
    "bytes_received": "bytes of messages that came",
    "bytes_sent": "bytes of messages that were sent",
    "seconds": "seconds in the scorer",
    "sessions_evicted": "prefixes that had to go for others",
    "sessions_expired": "prefixes that were not used for too long",
    "keys_refused": "connections that were refused: with another key, with none, or of no client",
    "scorer_prefix_tokens": "tokens of prefixes that went through the scorer",
    "scorer_candidate_tokens": "candidates that went through the scorer",
    "scorer_cache_hits": "tokens found in the scorer's cache",
    "scorer_evictions": "tokens dropped from the scorer's cache",
    "scorer_forwards": "forwards of the scorer",
    "scorer_forward_seconds": "seconds in the scorer's forwards",
}
_GAUGES = {
    "sessions": "prefixes whose tokens are kept",
    "session_tokens": "tokens of all of them together",
    "clients": "clients that have one",
    "waiting_tokens": "new tokens and candidates of requests that wait",
}


class _Collector:
    """Reads the counters when it is asked."""

    def __init__(self, server: "ScorerServer") -> None:
        self._server = server

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        now = self._server.counters()
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, text, value=now[name])
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(PREFIX + name, text, value=now[name])


def start(server: "ScorerServer", host: str, port: int) -> None:
    """Answers Prometheus on a thread of its own until the process ends.

    Raises ValueError: the address cannot be listened on.
    """
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(_Collector(server))  # type: ignore[arg-type]
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise ValueError(
            f"metrics_port={port} of {host} cannot be listened on ({error.strerror}): pass another"
        ) from None
