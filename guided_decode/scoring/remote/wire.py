"""The messages between a scorer server and its clients: msgpack headers, raw little-endian buffers.

Every message is a few ZeroMQ frames: `PREAMBLE` with the protocol's version, a header (one of the
records below, as a msgpack array that begins with its name), and the buffers that it announces.
Nothing in a message names a file, a model or code.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from guided_decode.scoring.remote.prefix_hash import DIGEST_BYTES

VERSION = 1
_NAME = b"guided-decode scorer "
PREAMBLE = _NAME + bytes([VERSION])
CLIENT_BYTES = 16
# Names of the models of one scorer.
SCORER, REWARD, REFERENCE = "scorer", "reward", "reference"

Number = Annotated[int, Meta(ge=0, le=2**53)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Digest = Annotated[bytes, Meta(max_length=DIGEST_BYTES)]
Client = Annotated[bytes, Meta(min_length=CLIENT_BYTES, max_length=CLIENT_BYTES)]
Target = Annotated[str, Meta(pattern=f"^({SCORER}|{REWARD}|{REFERENCE})$")]


class WireError(ValueError):
    """A message that is none of this protocol's."""


class Row(Struct, array_like=True, frozen=True, gc=False):
    """What a row's prefix is: the first `known` tokens of session `base`, and `new` more.

    session: which one the whole becomes, 0 for none. digest: the hash of the known tokens.
    """

    session: Number
    base: Number
    known: Count
    new: Count
    digest: Digest


class Hello(Struct, tag="hello", array_like=True, frozen=True):
    """Asks for `Welcome`."""


class AskTokens(Struct, tag="ask-tokens", array_like=True, frozen=True):
    """Asks for the scorer's tokenizer: `Tokens`."""

    id: Number


class AskScores(Struct, tag="ask-scores", array_like=True, frozen=True):
    """Asks a model for rows: `Answer`, `Missing` or `Failed`.

    Buffers: all rows' new tokens, int32; candidates, int32 [rows, k], padded with -1.
    client: whose sessions these are, its secret. scorer: the digest of the `Welcome` that it got.
    closed: sessions that are over.
    """

    id: Number
    client: Client
    scorer: Digest
    target: Target
    k: Count
    rows: list[Row]
    closed: list[Number] = []


class AskRefusal(Struct, tag="ask-refusal", array_like=True, frozen=True):
    """Asks whether a row with so many candidates can be scored: `Reason`, `Missing` or `Failed`.

    Buffer: the row's new tokens, int32.
    """

    id: Number
    client: Client
    scorer: Digest
    target: Target
    candidates: Count
    rows: Annotated[list[Row], Meta(min_length=1, max_length=1)]
    closed: list[Number] = []


class AskCounters(Struct, tag="ask-counters", array_like=True, frozen=True):
    """Asks for `Counters`."""

    id: Number


class Bye(Struct, tag="bye", array_like=True, frozen=True):
    """A client goes, with all its sessions; nothing comes back."""

    client: Client


class Model(Struct, frozen=True, kw_only=True):
    """What a client has to know of a scorer, or of its reward model or reference.

    name: how errors call it. kind, dtype, bos, transform: None where the server does not know.
    room: any row whose prefix and candidates are no more than so many tokens can be scored.
    """

    name: str
    vocab_size: Count
    room: Count
    kind: str | None = None
    dtype: str | None = None
    bos: str | None = None
    transform: str | None = None
    terminal: str = "baseline"
    scores_vocabulary: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None


class Described(Struct, frozen=True, kw_only=True):
    """All of a scorer that its answers follow from, but its weights.

    tokenizer: a digest of the token ids, None where the server has no tokenizer.
    """

    scorer: Model
    reward: Model | None = None
    reference: Model | None = None
    tokenizer: str | None = None


class Welcome(Struct, tag="welcome", array_like=True, frozen=True):
    """The scorer that is served. digest: of `scorer`; requests repeat it."""

    scorer: Described
    digest: Digest


class Tokens(Struct, tag="tokens", array_like=True, frozen=True):
    """The scorer's tokenizer. special: ids of added tokens, and whether each is special."""

    id: Number
    vocabulary: dict[str, int]
    bos_token_id: int | None
    eos_token_id: int | None
    added: dict[int, bool]


class Answer(Struct, tag="answer", array_like=True, frozen=True):
    """Buffers: values, float32 [rows, k], and for a scorer baselines, float32 [rows]."""

    id: Number


class Missing(Struct, tag="missing", array_like=True, frozen=True):
    """Rows, by index, whose known tokens the server does not know: to be sent in full."""

    id: Number
    rows: list[Count]


class Reason(Struct, tag="reason", array_like=True, frozen=True):
    """Why a row cannot be scored, or None."""

    id: Number
    text: str | None


class Counters(Struct, tag="counters", array_like=True, frozen=True):
    """The server's counters by name."""

    id: Number
    counts: dict[str, float]


class Failed(Struct, tag="failed", array_like=True, frozen=True):
    """A request that has no answer. id: 0 where the request could not be read.

    reason: "refused" (a ValueError of the scorer), "busy", "changed" (the scorer is another one),
    "malformed", "version" or "error".
    """

    id: Number
    reason: str
    message: str


Request = Hello | AskTokens | AskScores | AskRefusal | AskCounters | Bye
Reply = Welcome | Tokens | Answer | Missing | Reason | Counters | Failed
T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def frames(header: Request | Reply, *buffers: bytes) -> list[bytes]:
    """A message."""
    return [PREAMBLE, _encoder.encode(header), *buffers]


def read_request(message: Sequence[bytes]) -> tuple[Request, Sequence[bytes]]:
    """Header and buffers. Raises WireError: another version, or no message of ours."""
    return _read(message, _requests)


def read_reply(message: Sequence[bytes]) -> tuple[Reply, Sequence[bytes]]:
    """Header and buffers. Raises WireError: another version, or no message of ours."""
    return _read(message, _replies)


def other_version(message: Sequence[bytes]) -> int | None:
    """The protocol's version of a message of another one; None where it is ours, or no message."""
    first = message[0] if message else b""
    if first == PREAMBLE or len(first) != len(PREAMBLE) or not first.startswith(_NAME):
        return None
    return first[-1]


def digest_of(described: Described) -> bytes:
    """The digest that stands for a scorer in requests; how much room it has is not part of it."""
    every = [described.scorer, described.reward, described.reference]
    roomless = [each and msgspec.structs.replace(each, room=0) for each in every]
    text = _encoder.encode([*roomless, described.tokenizer])
    return blake2b(text, digest_size=DIGEST_BYTES).digest()


def _read(
    message: Sequence[bytes], decoder: "msgspec.msgpack.Decoder[T]"
) -> tuple[T, Sequence[bytes]]:
    if len(message) < 2 or message[0] != PREAMBLE:
        version = other_version(message)
        said = "no message" if version is None else f"a message of version {version}"
        raise WireError(f"{said} of a scorer server's protocol: expected version {VERSION}")
    try:
        return decoder.decode(message[1]), message[2:]
    # Text that is no UTF-8 is a plain ValueError.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"a message whose header cannot be read: {error}") from None
