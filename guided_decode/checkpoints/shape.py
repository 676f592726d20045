"""The sizes of a decoder, from which its weights and its cache follow."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense decoder of Llama's build: attention, then a gated feed-forward of three matrices.

    head_size: of one attention head; None: hidden / heads.
    qkv_bias, o_bias, mlp_bias: which linear layers have a bias.
    norms: norms of the hidden size in one layer. qk_norm: norms of queries and keys, a head wide.
    tied: the language-model head is the embedding table.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    head_size: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    norms: int = 2
    qk_norm: bool = False
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads if self.head_size is None else self.head_size

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of the linear layers of one decoder layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = ((queries, self.hidden), (keys, self.hidden), (keys, self.hidden),
                     (self.hidden, queries))  # fmt: skip
        inner = (self.intermediate, self.hidden)
        return (*attention, inner, inner, (self.hidden, self.intermediate))

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of one layer."""
        return sum(outputs * inputs for outputs, inputs in self.matrices)

    @property
    def layer_vectors(self) -> int:
        """Weights of the biases and norms of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biases = (queries + 2 * keys) * self.qkv_bias + self.hidden * self.o_bias
        biases += (2 * self.intermediate + self.hidden) * self.mlp_bias
        return biases + self.norms * self.hidden + 2 * self.head_dim * self.qk_norm

    @property
    def table(self) -> int:
        """Weights of the embedding table, and once more of a head that is not tied to it."""
        return self.vocab * self.hidden

    def parameters(self, *, lm_head: bool, labels: int = 0, head_bias: bool = False) -> int:
        """Weights of the trunk with its heads; tied ones once.

        lm_head: with the language-model head. labels, head_bias: of the value head, if any.
        """
        tables = self.table * (2 if lm_head and not self.tied else 1)
        trunk = self.layers * (self.layer_weights + self.layer_vectors) + self.hidden
        return tables + trunk + labels * (self.hidden + head_bias)

    def kv_bytes(self, dtype_bytes: int = 2) -> int:
        """Bytes of keys and values that one cached token takes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes


# Touvron et al., arXiv 2307.09288; meta-llama/Llama-2-*-hf/config.json.
LLAMA_2_7B = Shape(32, 4096, 11008, 32, 32, 32000)
LLAMA_2_13B = Shape(40, 5120, 13824, 40, 40, 32000)
LLAMA_2_70B = Shape(80, 8192, 28672, 64, 8, 32000)
# Llama Team, arXiv 2407.21783, table 3; meta-llama/Llama-3.1-*/config.json.
LLAMA_3_8B = Shape(32, 4096, 14336, 32, 8, 128256)
LLAMA_3_70B = Shape(80, 8192, 28672, 64, 8, 128256)
# allenai/Llama-3.1-Tulu-3-8B/config.json: eight rows more.
TULU_3_8B = Shape(32, 4096, 14336, 32, 8, 128264)
# Jiang et al., arXiv 2310.06825, table 1; mistralai/Mistral-7B-Instruct-v0.2/config.json.
MISTRAL_7B = Shape(32, 4096, 14336, 32, 8, 32000)
# meta-llama/Llama-3.2-*-Instruct/config.json.
LLAMA_3_2_1B = Shape(16, 2048, 8192, 32, 8, 128256, tied=True)
LLAMA_3_2_3B = Shape(28, 3072, 8192, 24, 8, 128256, tied=True)
# Qwen2.5 technical report, arXiv 2412.15115, table 1; Qwen/Qwen2.5-*/config.json.
QWEN_2_5_HALF_B = Shape(24, 896, 4864, 14, 2, 151936, qkv_bias=True, tied=True)
QWEN_2_5_1_5B = Shape(28, 1536, 8960, 12, 2, 151936, qkv_bias=True, tied=True)
QWEN_2_5_7B = Shape(28, 3584, 18944, 28, 4, 152064, qkv_bias=True)
QWEN_2_5_32B = Shape(64, 5120, 27648, 40, 8, 152064, qkv_bias=True)
QWEN_2_5_72B = Shape(80, 8192, 29568, 64, 8, 152064, qkv_bias=True)
# deepseek-ai/DeepSeek-R1-Distill-Qwen-*/config.json: not tied at 1.5B either.
R1_QWEN_1_5B = Shape(28, 1536, 8960, 12, 2, 151936, qkv_bias=True)
# Qwen3 technical report, arXiv 2505.09388, table 1; Qwen/Qwen3-*/config.json.
_QWEN_3: dict[str, Any] = {"head_size": 128, "qk_norm": True}
QWEN_3_HALF_B = Shape(28, 1024, 3072, 16, 8, 151936, tied=True, **_QWEN_3)
QWEN_3_1_7B = Shape(28, 2048, 6144, 16, 8, 151936, tied=True, **_QWEN_3)
QWEN_3_4B = Shape(36, 2560, 9728, 32, 8, 151936, tied=True, **_QWEN_3)
QWEN_3_8B = Shape(36, 4096, 12288, 32, 8, 151936, **_QWEN_3)
# HuggingFaceTB/SmolLM2-135M-Instruct/config.json.
SMOLLM2_135M = Shape(30, 576, 1536, 9, 3, 49152, tied=True)
# assets/tiny_tulu and assets/tiny_tulu_lists of this package.
TINY = Shape(4, 128, 344, 4, 4, 287)
TINY_LISTS = Shape(3, 96, 256, 3, 3, 287)
