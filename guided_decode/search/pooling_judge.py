"""A judge on vLLM pooling servers: a critic or reward model that they serve as it is."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from types import TracebackType
from typing import Self

import torch
from transformers import PreTrainedTokenizerBase

from guided_decode.checkpoints.described import Described, describe
from guided_decode.checkpoints.families import BosRule
from guided_decode.checkpoints.loading_options import Tokenizer, read_tokenizer
from guided_decode.checkpoints.tokenizer_match import check_rows, check_tokenizers
from guided_decode.scorer import TerminalRule
from guided_decode.scoring.transforms import Transform
from guided_decode.search.http import Endpoints
from guided_decode.search.http_failures import Retry
from guided_decode.search.judges import is_ended
from guided_decode.search.pooling_probe import Probed, find_model, probe
from guided_decode.search.pooling_wire import PATH, Served, body_of, read_outputs
from guided_decode.search.requests import Judged, JudgeOfTexts, Tokens
from guided_decode.stats import ScorerStats

_PROBE = "Which is larger, 9.11 or 9.9? The first has more digits, but 9.9 is larger."
_PROBE_TOKENS = 24
_USUAL = Retry()


class PoolingJudge:
    """What a critic or reward model on pooling servers says of a response so far.

    The values are those of `ScorerJudge` with the same checkpoint: V at the last token of an
    unfinished response, and of a finished one what its end is worth by the family's terminal rule.
    A server recomputes a text at each call of token_classify, so this is for pieces of responses,
    not for single tokens; with classify it reads what its prefix cache has. See `connect_judge`.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        described: Described,
        served: Served,
        probed: Probed,
        *,
        terminals: Collection[int] = (),
        reward: JudgeOfTexts | None = None,
    ) -> None:
        """
        Args:
            endpoints: the servers. described: how their model is read. served: its name there.
            probed: what they were found to do.
            terminals: token ids that end a response, beside the model's own EOS.
            reward: what judges finished responses under the "reward" terminal rule.

        Raises ValueError: the rule is "reward" and there is no such judge.
        """
        if described.family.terminal == "reward" and reward is None:
            raise ValueError(
                'terminal="reward" was given without a reward model: pass reward=, a judge of '
                "finished responses"
            )
        self.endpoints = endpoints
        self.described = described
        self.served = served
        self.task = probed.task
        self.reward = reward
        self.stats = ScorerStats()
        own = () if described.eos_token_id is None else (described.eos_token_id,)
        self._terminals = frozenset({*terminals, *own})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.served.name!r} at {', '.join(self.endpoints.urls)})"

    @property
    def read_as(self) -> dict[str, str]:
        """From what its values follow, beside the weights that the servers have."""
        known = self.described
        return {
            "model": self.served.name,
            "checkpoint": known.name,
            "kind": known.family.kind,
            "bos": known.family.bos,
            "terminal": known.family.terminal,
            "transform": str(known.transform),
        }

    def add_terminals(self, terminals: Collection[int]) -> None:
        """More token ids that end a response: those of a policy that was not known yet."""
        self._terminals |= frozenset(terminals)

    def judge(self, texts: Sequence[Judged]) -> list[float]:
        """As `requests.JudgeOfTexts.judge`.

        Raises:
            ValueError: a text that is longer than the servers take, or a token that the model does
                not have. EndpointError: no server answers as it should.
        """
        begun = time.perf_counter()
        asked = [self._asked(text) for text in texts]
        distinct = list(dict.fromkeys(ids for ids in asked if ids is not None))
        known = dict(zip(distinct, self._values(distinct), strict=True))
        finals = iter(self._finals([t for t, ids in zip(texts, asked, strict=True) if ids is None]))
        values = [next(finals) if ids is None else known[ids] for ids in asked]
        self.stats.add(
            rows_scored=len(texts),
            forwards=len(distinct),
            prefix_tokens=sum(map(len, distinct)),
            seconds=time.perf_counter() - begun,
        )
        return values

    def close(self) -> None:
        """Ends its connections."""
        self.endpoints.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _asked(self, text: Judged) -> Tokens | None:
        """The token ids whose last one is read; None: the reward model judges it."""
        ids, rule = text.prompt + text.response, self.described.family.terminal
        if is_ended(text, self._terminals):
            if rule == "reward":
                return None
            # As `score_candidates`: before the end, or at the model's own EOS.
            own = self.described.eos_token_id
            last = () if rule == "baseline" else ids[-1:] if own is None else (own,)
            ids = ids[:-1] + last
        if len(ids) > 1 and ids[0] == self.described.skip_token:
            ids = ids[1:]
        return ids

    def _values(self, texts: Sequence[Tokens]) -> list[float]:
        for ids in texts:
            self._check(ids)
        bodies = [body_of(self.served.name, ids, self.task) for ids in texts]
        outputs = self.endpoints.post_all(PATH, bodies, self._read)
        if not outputs:
            return []
        values: list[float] = self.described.transform(torch.tensor(outputs)).tolist()
        return values

    def _read(self, answer: object, body: object) -> list[float]:
        last = read_outputs(answer, body)[-1]  # type: ignore[arg-type]
        if len(last) != self.described.labels:
            raise ValueError(f"{len(last)} outputs a token: expected {self.described.labels}")
        return last

    def _finals(self, texts: Sequence[Judged]) -> list[float]:
        if not texts:
            return []
        assert self.reward is not None
        return self.reward.judge(texts)

    def _check(self, ids: Tokens) -> None:
        if not ids:
            raise ValueError("a text is empty: expected at least one token id")
        odd = next((each for each in ids if not 0 <= each < self.described.vocab_size), None)
        if odd is not None:
            raise ValueError(
                f"token {odd} is outside the vocabulary of {self.described.name}, which has "
                f"{self.described.vocab_size}: expected ids of its tokenizer"
            )
        most = self.served.max_tokens
        if most is not None and len(ids) > most:
            raise ValueError(
                f"a text has {len(ids)} tokens, and the servers of {self.served.name} take {most}: "
                "shorten it, or start them with a longer --max-model-len"
            )


def connect_judge(
    urls: str | Iterable[str],
    checkpoint: str | None = None,
    kind: str = "auto",
    *,
    model: str | None = None,
    bos: BosRule | None = None,
    terminal: TerminalRule | None = None,
    transform: str | Transform | None = None,
    rope_theta: float | None = None,
    reward: JudgeOfTexts | None = None,
    policy_tokenizer: Tokenizer | None = None,
    terminals: Collection[int] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
    api_key: str | None = None,
    timeout: float = 120.0,
    concurrency: int = 32,
    retry: Retry = _USUAL,
) -> PoolingJudge:
    """A judge on vLLM servers that were started with `--runner pooling`; asks each of them first.

    Args:
        urls: http://HOST:PORT; several servers of the same model share the load.
        checkpoint: the model's registered name, Hub id or path; of it the config and tokenizer are
            read, which say how its values are. None: what the servers say that they loaded.
        kind, bos, terminal, transform, revision, trust_remote_code: as of `load_scorer`.
        model: its name at the servers; None: the first one's first.
        rope_theta: what the servers were started with, where the config's is known to be wrong.
        reward: what judges finished responses; implies terminal="reward".
        policy_tokenizer: the policy's, or its path: refused where its ids are not the model's.
        terminals: token ids that end a response, beside the model's own EOS.
        api_key: sent as a bearer token; see `http_access.api_key_of`.
        timeout, concurrency, retry: as of `http.Endpoints`.

    Raises:
        ValueError: the checkpoint cannot be read, or not as a pooling server serves it; another
            tokenizer.
        EndpointError: a server does not answer, serves another model or task, or its values are
            not what they have to be.
    """
    endpoints = Endpoints(
        urls, api_key=api_key, timeout=timeout, concurrency=concurrency, retry=retry
    )
    try:
        served = find_model(endpoints, model)
        described = describe(
            _name_of(checkpoint, served, endpoints), kind, bos=bos, transform=transform,
            terminal="reward" if reward is not None else terminal, rope_theta=rope_theta,
            revision=revision, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        _check_tokenizer(described, read_tokenizer(policy_tokenizer))
        probed = probe(endpoints, served.name, _probe_ids(described))
        if probed.labels != described.labels:
            raise ValueError(
                f"{served.name} gives {probed.labels} outputs a token at {endpoints.urls[0]}, and "
                f"{described.name} has {described.labels} labels: expected the checkpoint that is "
                "served; pass checkpoint="
            )
        return PoolingJudge(
            endpoints, described, served, probed, terminals=terminals, reward=reward
        )
    except BaseException:
        endpoints.close()
        raise


def _name_of(checkpoint: str | None, served: Served, endpoints: Endpoints) -> str:
    name = checkpoint or served.root
    if not name:
        raise ValueError(
            f"{endpoints.urls[0]} does not say what it loaded as {served.name}: pass checkpoint=, "
            "the model's name or folder, whose config and tokenizer are read here"
        )
    return name


def _check_tokenizer(described: Described, policy: PreTrainedTokenizerBase | None) -> None:
    if policy is None:
        return
    if described.tokenizer is None:
        check_rows(policy, described.vocab_size, described.name)
        return
    check_tokenizers(policy, described.tokenizer)


def _probe_ids(described: Described) -> list[int]:
    """A text of the model's; of one without a tokenizer any ids."""
    if described.tokenizer is not None:
        ids: list[int] = described.tokenizer.encode(_PROBE, add_special_tokens=False)
        if len(set(ids)) > 3:
            return ids[:_PROBE_TOKENS]
    special = {described.bos_token_id, described.eos_token_id}
    ids = [i for i in range(min(described.vocab_size, 10 * _PROBE_TOKENS)) if i not in special]
    return ids[-_PROBE_TOKENS:]
