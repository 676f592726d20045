"""A policy on servers: continuations and next tokens over HTTP."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from guided_decode.search.draws import Draws, checked
from guided_decode.search.engine_stats import EngineStats
from guided_decode.search.http import Body, Endpoints, Read
from guided_decode.search.http_failures import RequestRefused, Retry
from guided_decode.search.likeliest import likeliest_of
from guided_decode.search.policy_text import PolicyText
from guided_decode.search.requests import Continuation, NextTokens, Sampling, Tokens
from guided_decode.search.servers.completions import read_continuation, top_log_probs
from guided_decode.search.servers.dialect import PATH, Served, draw_body, next_body
from guided_decode.search.servers.probe import probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
_WHOLE = -1
# Servers decode long continuations, and many at a time.
TIMEOUT = 600.0
CONCURRENCY = 64
_USUAL = Retry()


class ServerGenerator(PolicyText):
    """A policy that servers decode: vLLM's, or another whose answers are exact.

    Each continuation is a request of its own with a seed of its own, so that what comes does not
    depend on what else is asked, on which server, or on how often it had to be asked; as far as the
    server computes the same logits in every batch. Servers share prefixes by caches of their own.
    """

    def __init__(self, endpoints: Endpoints, served: Served) -> None:
        """
        Args:
            endpoints: the servers; `close` closes them.
            served: what they can do: see `connect_generator`, which asks them.
        """
        super().__init__(served.tokenizer, served.ends)
        self.served = served
        # Of all that the servers were asked, also what they can do.
        self.stats = EngineStats()
        self._endpoints = endpoints
        self._count()

    def extend(
        self,
        prefixes: Sequence[Sequence[int]],
        n: Sequence[int],
        *,
        max_tokens: Sequence[int],
        sampling: Sequence[Sampling],
        seeds: Sequence[int],
    ) -> list[list[Continuation]]:
        """As `requests.Generator.extend`.

        Raises ValueError: an empty prefix, one that leaves no room for a token, or what a server
        refuses or cannot answer exactly. EndpointError: a request has no answer after all tries.
        """
        draws = Draws.of(prefixes, n, max_tokens, sampling, seeds)
        bodies = [draw_body(self.served, draw) for draw in draws.each]
        # Bodies may be equal, and do not say all of a draw: each is looked up as the object it is.
        draw_of = {id(body): draw for body, draw in zip(bodies, draws.each, strict=True)}
        answers = self._post(
            bodies, lambda answer, body: read_continuation(answer, draw_of[id(body)], self.served)
        )
        self.stats.add(
            prompt_tokens=sum(len(draw.prefix) for draw in draws.each),
            generated_tokens=sum(len(answer.tokens) for answer in answers),
        )
        return draws.answered(answers)

    def next_tokens(
        self,
        prefixes: Sequence[Sequence[int]],
        k: Sequence[int],
        *,
        temperatures: Sequence[float],
        references: Sequence[bool],
        entropies: Sequence[bool] | None = None,
    ) -> list[NextTokens]:
        """As `requests.TokenGenerator.next_tokens`.

        A temperature other than 1 and an entropy follow from the whole distribution, which a server
        tells where it was started so (vLLM: --max-logprobs -1).

        Raises ValueError: as `extend`; a reference is wanted; a server does not tell enough.
        """
        if any(references):
            raise ValueError(
                "a KL term needs the reference's log-probabilities, which servers do not have: run "
                "the policy on this machine, load_generator(..., reference=)"
            )
        rows = [checked(prefix, row) for row, prefix in enumerate(prefixes)]
        wanted = [False] * len(rows) if entropies is None else entropies
        asked = [
            _WHOLE if heat != 1.0 or entropy else most
            for most, heat, entropy in zip(k, temperatures, wanted, strict=True)
        ]
        found = self._likeliest(rows, asked)
        self.stats.add(prompt_tokens=sum(map(len, rows)), generated_tokens=len(rows))
        return [
            likeliest_of(log_probs, most, heat, self.eos_token_ids, whole=how_many == _WHOLE)
            for log_probs, most, heat, how_many in zip(found, k, temperatures, asked, strict=True)
        ]

    def _likeliest(self, rows: Sequence[Tokens], k: Sequence[int]) -> list[dict[int, float]]:
        bodies = [next_body(self.served, row, most) for row, most in zip(rows, k, strict=True)]
        try:
            return self._post(bodies, lambda answer, body: top_log_probs(answer, self.served))
        except RequestRefused as error:
            # Of why a server refuses, only its own words say something.
            if error.status is None or "logprobs" not in str(error):
                raise
            needed = "-1: this method needs whole distributions" if _WHOLE in k else str(max(k))
            raise RequestRefused(
                f"{error}; start vLLM with --max-logprobs {needed}", error.status
            ) from error

    def _post(self, bodies: Sequence[Body], read: Read[T]) -> list[T]:
        try:
            return self._endpoints.post_all(PATH, bodies, read)
        finally:
            self._count()

    def _count(self) -> None:
        self.stats.requests = sum(self._endpoints.attempts.values())
        self.stats.retries = self._endpoints.retries

    def close(self) -> None:
        """Ends the connections."""
        self._endpoints.close()


def connect_generator(
    urls: str | Iterable[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    model: str | None = None,
    eos_token_ids: Collection[int] | None = None,
    api_key: str | None = None,
    timeout: float = TIMEOUT,
    concurrency: int = CONCURRENCY,
    retry: Retry = _USUAL,
) -> ServerGenerator:
    """A policy that servers decode, once they have shown that they are exact.

    Each is asked for its models, for a continuation with token ids and log-probabilities, for the
    tokens of a text, and for log-probabilities at two temperatures; several servers have to agree.

    Args:
        urls: http://HOST:PORT; several servers of the same model share the load.
        tokenizer: the served model's; it reads stop strings, and text where there are no ids.
        model: its name on the servers; None: the only one that they have.
        eos_token_ids: what ends a response; None: the tokenizer's own.
        api_key: sent as a bearer token; see `http_access.api_key_of`.
        timeout, concurrency, retry: as of `http.Endpoints`.

    Raises ValueError: no URL; nothing ends a response; another model or tokenizer is served; a
    server is not exact. EndpointError: one does not answer.
    """
    if eos_token_ids is None:
        own = tokenizer.eos_token_id
        eos_token_ids = () if own is None else (own,)
    if not eos_token_ids:
        raise ValueError("the tokenizer names no end-of-sequence token: pass eos_token_ids=, the "
                         "ids that end a response")  # fmt: skip
    endpoints = Endpoints(
        urls, api_key=api_key, timeout=timeout, concurrency=concurrency, retry=retry
    )
    try:
        served = probe(endpoints, tokenizer=tokenizer, ends=frozenset(eos_token_ids), model=model)
    except BaseException:
        endpoints.close()
        raise
    return ServerGenerator(endpoints, served)
