"""Connecting to vLLM pooling servers: what they serve is proved, how it is read is looked up."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from transformers import PreTrainedTokenizerBase

from guided_decode.checkpoints.described import Described, describe
from guided_decode.checkpoints.families import BosRule
from guided_decode.checkpoints.loading_options import Tokenizer, read_tokenizer
from guided_decode.checkpoints.tokenizer_match import check_rows, check_tokenizers
from guided_decode.scorer import TerminalRule
from guided_decode.scoring.transforms import Transform
from guided_decode.search.http import Endpoints
from guided_decode.search.http_failures import Retry
from guided_decode.search.pooling_judge import PoolingJudge
from guided_decode.search.pooling_probe import find_model, probe
from guided_decode.search.pooling_wire import Served
from guided_decode.search.requests import JudgeOfTexts

_PROBE = "Which is larger, 9.11 or 9.9? The first has more digits, but 9.9 is larger."
_PROBE_TOKENS = 24
_USUAL = Retry()


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
