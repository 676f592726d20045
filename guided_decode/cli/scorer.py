"""`guided-decode scorer`: a scorer for policies in other processes and on other machines."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guided_decode.cli import model_options as models
from guided_decode.cli.checkpoints import (
    DEFAULT_SCORER,
    follow_if_not_leading,
    location,
    open_scorer,
)
from guided_decode.cli.errors import Refusal, one_line, report
from guided_decode.cli.scorer_limits import ScorerLimits
from guided_decode.scoring.remote.address import DEFAULT, is_address
from guided_decode.scoring.remote.libraries import require_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from guided_decode.scoring.remote.keys import ServerKeys
    from guided_decode.serving import ScorerServer

FAILED = 1
_PANEL = "Server"
Model = Annotated[
    str | None,
    typer.Argument(help="folder, GGUF file, registered name or Hub id \\[tiny-tulu-value]"),
]
Listen = Annotated[str, typer.Option(help="tcp://HOST:PORT or ipc://PATH", rich_help_panel=_PANEL)]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="the server's keys: only clients with theirs are answered",
                 rich_help_panel=_PANEL),
]  # fmt: skip
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="listen without keys where other machines reach it",
                 rich_help_panel=_PANEL),
]  # fmt: skip
NewKey = Annotated[
    Path | None,
    typer.Option(help="make keys, FILE for --key-file and FILE.client for clients, and end",
                 metavar="FILE", rich_help_panel=_PANEL),
]  # fmt: skip
MetricsPort = Annotated[
    int | None,
    typer.Option(min=1, max=65535, help="of Prometheus metrics", rich_help_panel=_PANEL),
]
MetricsHost = Annotated[str, typer.Option(help="address of them", rich_help_panel=_PANEL)]

_AS_IT_IS, _USUAL = models.ScorerOptions(), ScorerLimits()


def scorer(
    model: Model = None,
    device: models.Device = None,
    dtype: models.Dtype = "auto",
    reading: models.ScorerOptions = _AS_IT_IS,
    listen: Listen = DEFAULT,
    key_file: KeyFile = None,
    insecure: Insecure = False,
    new_key: NewKey = None,
    limits: ScorerLimits = _USUAL,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
) -> None:
    """Serve a scorer: load_scorer("tcp://HOST:PORT") is then one, as is --scorer tcp://HOST:PORT."""
    of_metrics = {} if metrics_port is None else {"prometheus_client": "prometheus-client"}
    require_libraries(**of_metrics)
    if new_key is not None:
        _make_keys(new_key)
        return
    name = model or DEFAULT_SCORER
    if is_address(name):
        raise Refusal(f"{name} is where a scorer server listens: expected the model that is served")
    follow_if_not_leading(name, reading, dtype)
    from guided_decode.scoring.remote.keys import ServerKeys
    from guided_decode.serving.security import require_free

    own = limits.limits()
    keys = None if key_file is None else ServerKeys.read(key_file)
    require_free(listen, keys, insecure=insecure)
    loaded: Any = open_scorer(name, reading, device=device, dtype=dtype)
    loaded.freeze()
    kind, tokenizer = _read_of(name, reading)
    from guided_decode.serving import ScorerServer

    # The end of the block ends the other ranks of a sharded scorer.
    with loaded, ScorerServer(loaded, listen, keys=keys, insecure=insecure, limits=own, kind=kind,
                              tokenizer=tokenizer) as server:  # fmt: skip
        if metrics_port is not None:
            from guided_decode.serving.metrics import start

            start(server, metrics_host, metrics_port)
        with _until_signalled(server):
            typer.echo(_greeting(name, server.address, keys))
            _serve(server)


def _serve(server: ScorerServer) -> None:
    from guided_decode.guidance.step import is_device_error

    try:
        server.serve()
    except Exception as error:
        what = "device failed" if is_device_error(error) else "processes are not all there"
        report(f"the scorer's {what}, so nothing can be scored any more: {one_line(error)}")
        raise typer.Exit(FAILED) from error


def _make_keys(path: Path) -> None:
    from guided_decode.scoring.remote.keys import write_keys

    server, clients = write_keys(path)
    typer.echo(f"{server} is for guided-decode scorer --key-file, {clients} for its clients "
               "(key_file=): keep both secret")  # fmt: skip


def _read_of(
    name: str, reading: models.ScorerOptions
) -> tuple[str, PreTrainedTokenizerBase | None]:
    """The family and the tokenizer of a scorer that was loaded, for its clients to compare."""
    from guided_decode.checkpoints.adapted import Adapted
    from guided_decode.checkpoints.head_beside import with_head_beside
    from guided_decode.checkpoints.kinds import choose_family
    from guided_decode.checkpoints.source import open_source
    from guided_decode.checkpoints.tokenizer_files import load_tokenizer
    from guided_decode.checkpoints.trunk_policy import with_own_policy
    from guided_decode.scoring.trunk_head import KIND as TRUNK_HEAD

    where = location(name) if Path(name).exists() else name
    where, own_head = with_own_policy(where, reading.kind or "auto", reading.head)
    source = open_source(
        where if reading.adapter is None else Adapted(where, reading.adapter),
        revision=reading.revision,
        allow_pickle=reading.allow_pickle,
        trust_remote_code=reading.trust_remote_code,
        gguf_file=reading.gguf_file,
    )
    source, kind, head = with_head_beside(
        source, reading.kind or "auto", own_head, allow_pickle=reading.allow_pickle
    )
    found = choose_family(source, kind if head is None else TRUNK_HEAD)
    return found.kind, load_tokenizer(source)


@contextlib.contextmanager
def _until_signalled(server: ScorerServer) -> Iterator[None]:
    """The first SIGINT or SIGTERM lets the server answer what is in work; the next one ends it."""
    before: dict[int, Any] = {}

    def end(number: int, frame: FrameType | None) -> None:
        for one, handler in before.items():
            signal.signal(one, handler)
        server.stop()

    for own in (signal.SIGINT, signal.SIGTERM):
        before[own] = signal.signal(own, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _greeting(name: str, address: str, keys: ServerKeys | None) -> str:
    where = address.replace("tcp://0.0.0.0:", "tcp://HOST:").replace("tcp://[::]:", "tcp://HOST:")
    key = "" if keys is None else ", key_file=FILE.client"
    flag = "" if keys is None else " --key-file FILE.client"
    return f"{name} is served at {address}: load_scorer({where!r}{key}), or --scorer {where}{flag}"
