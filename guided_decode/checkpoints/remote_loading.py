"""`load_scorer` of an address: a scorer that is served elsewhere, held to what is known here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from guided_decode.checkpoints.tokenizer_match import Sides, check_rows, check_tokenizers
from guided_decode.scoring.remote.address import check_address, is_address
from guided_decode.scoring.remote.libraries import require_libraries
from guided_decode.scoring.transforms import Transform, parse_transform

if TYPE_CHECKING:
    from guided_decode.scoring.remote.scorer import RemoteScorer

KIND = "remote"
_ANY_KIND = ("auto", KIND)


def is_remote(model: object, kind: str, given: Mapping[str, object]) -> bool:
    """Whether a scorer is named by its server's address.

    given: key_file and timeout, which only an address takes.

    Raises ValueError: one of those, or kind="remote", came with another model.
    """
    if is_address(model):
        return True
    if kind == KIND:
        raise ValueError(
            f'kind="{KIND}" was given with {model!r:.80}: expected where a scorer server listens, '
            "tcp://HOST:PORT or ipc://PATH"
        )
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name}= was given with {model!r:.80}, which is no scorer server's address: "
                "expected tcp://HOST:PORT or ipc://PATH; drop it"
            )
    return False


def load_remote(
    address: str,
    kind: str,
    *,
    policy_tokenizer: PreTrainedTokenizerBase | None,
    key_file: str | Path | None,
    timeout: float | None,
    conventions: Mapping[str, Any],
    dtype: torch.dtype | None,
    of_server: Mapping[str, object],
) -> "RemoteScorer":
    """The scorer that a server serves.

    Args:
        address: tcp://HOST:PORT or ipc://PATH.
        kind: "auto", "remote", or the family that the server's scorer has to be of.
        policy_tokenizer: the policy's, with which the server's is compared.
        key_file: the clients' key file of a server that wants keys.
        timeout: seconds that an answer may take.
        conventions: bos, terminal and transform that the server's scorer has to have, or None.
        dtype: of its weights, where that matters.
        of_server: options of loading by their names; what is not None is the server's to be given.

    Raises:
        ValueError: an option that is the server's, or a scorer that is not as it has to be.
        ScorerServerError: no server answers. ImportError: a library of the extra is missing.
    """
    require_libraries()
    check_address(address, connects=True)
    _refuse_the_servers(address, of_server)
    from guided_decode.scoring.remote.keys import ClientKeys
    from guided_decode.scoring.remote.scorer import TIMEOUT_SECONDS, RemoteScorer

    scorer = RemoteScorer(
        address,
        keys=None if key_file is None else ClientKeys.read(key_file),
        timeout=TIMEOUT_SECONDS if timeout is None else timeout,
    )
    try:
        model = scorer.described.scorer
        named = None if dtype is None else str(dtype).removeprefix("torch.")
        wanted = {"kind": None if kind in _ANY_KIND else kind, "dtype": named, **conventions}
        for name, given in wanted.items():
            _check_convention(address, name, given, getattr(model, name))
        _check_tokenizer(scorer, policy_tokenizer)
    except BaseException:
        scorer.close()
        raise
    return scorer


def _refuse_the_servers(address: str, given: Mapping[str, object]) -> None:
    names = [f"{name}=" for name, value in given.items() if value not in (None, False)]
    if names:
        raise ValueError(
            f"{', '.join(names)} came with {address}, whose server loaded its scorer itself: give "
            f"{'it' if len(names) == 1 else 'them'} to guided-decode scorer, and drop "
            f"{'it' if len(names) == 1 else 'them'} here"
        )


def _check_convention(address: str, name: str, given: Any, served: str | None) -> None:
    """Raises ValueError: the server's scorer is read otherwise than is expected here."""
    if given is None:
        return
    if name == "transform":
        given = str(parse_transform(cast("str | Transform", given)))
    if given != served:
        what = "does not say which it has" if served is None else f"has {served!r}"
        raise ValueError(
            f"{name}={given!r} was given, but the scorer at {address} {what}: start its server "
            f"with {name}={given!r}, or drop it here"
        )


@dataclass(frozen=True, slots=True)
class _Added:
    special: bool


@dataclass(frozen=True, slots=True)
class _ServedTokenizer:
    """What `check_tokenizers` reads of a tokenizer."""

    vocabulary: dict[str, int]
    bos_token_id: int | None
    eos_token_id: int | None
    added_tokens_decoder: dict[int, _Added]

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def _check_tokenizer(scorer: "RemoteScorer", policy: PreTrainedTokenizerBase | None) -> None:
    """Raises ValueError: the server's scorer reads other token ids than the policy writes."""
    if policy is None:
        return
    tokens = scorer.tokenizer()
    if tokens is None:
        check_rows(policy, scorer.vocab_size, f"the scorer at {scorer.address}")
        return
    served = _ServedTokenizer(
        tokens.vocabulary,
        tokens.bos_token_id,
        tokens.eos_token_id,
        {index: _Added(special) for index, special in tokens.added.items()},
    )
    sides = Sides(reader=f"the scorer at {scorer.address}")
    check_tokenizers(policy, cast(PreTrainedTokenizerBase, served), sides)
