"""The least time that a forward takes on a device: what it must read, and what it must compute."""

from dataclasses import dataclass

from guided_decode.checkpoints.shape import Shape


@dataclass(frozen=True)
class Size:
    """A Llama's shape; itemsize: bytes of a weight, and of a key's element."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    itemsize: int = 2

    @property
    def shape(self) -> Shape:
        sizes = (self.layers, self.hidden, self.intermediate, self.heads, self.kv_heads)
        return Shape(*sizes, self.vocab)

    @property
    def head_dim(self) -> int:
        return self.shape.head_dim

    @property
    def trunk_weights(self) -> int:
        """Weights that every token is multiplied by, all layers."""
        return self.layers * self.shape.layer_weights

    @property
    def table_weights(self) -> int:
        """Of lm_head, and once more of the embeddings, of which a forward reads its tokens only."""
        return self.shape.table

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token, all layers."""
        return self.shape.kv_bytes(self.itemsize)


LLAMA2_13B = Size("13B", 40, 5120, 13824, 40, 40, 32_000)
LLAMA3_8B = Size("8B", 32, 4096, 14336, 32, 8, 128_256)


@dataclass(frozen=True)
class Rates:
    """What the device was measured to do in a second: bytes copied, bf16 operations."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Work:
    """Bytes to be read and operations to be done by one forward."""

    bytes: float
    flops: float

    def seconds(self, rates: Rates) -> float:
        """The floor: the larger of the two."""
        return max(self.bytes / rates.bytes, self.flops / rates.flops)


def forward_work(size: Size, rows: int, prefix: int, tokens: int, *, logits: bool) -> Work:
    """Of a forward of `tokens` for each of `rows` prefixes, each read once for all its tokens.

    logits: lm_head is applied to one token a row.
    """
    read = size.trunk_weights + (size.table_weights if logits else 0)
    kv = rows * (prefix + tokens) * size.kv_bytes
    products = rows * (tokens * size.trunk_weights + (size.table_weights if logits else 0))
    attended = size.layers * size.heads * size.head_dim * (prefix + 1)
    flops = 2 * products + 4 * rows * tokens * attended
    return Work(read * size.itemsize + kv, flops)


def step_floor(size: Size, rows: int, prefix: int, k: int | None, rates: Rates) -> float:
    """Seconds of a step: the policy's forward, and with k the critic's of k candidates a row."""
    seconds = forward_work(size, rows, prefix, 1, logits=True).seconds(rates)
    if k is not None:
        seconds += forward_work(size, rows, prefix, k, logits=False).seconds(rates)
    return seconds


def trunk_floor(size: Size, rows: int, prefix: int, k: int, rates: Rates) -> float:
    """Seconds of a step whose k-wide lookahead is the decode step."""
    return forward_work(size, rows, prefix, k, logits=True).seconds(rates)
