"""What a forward holds beside weights and cache, and its CUDA graphs."""

# Tokens of a forward that is a CUDA graph, by bucket.
TOKEN_BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
# Every model has graphs of so many.
_SURE_TOKENS = 512
# Tokens · weights of a layer that a GPU works through while Python launches the layer's 35 or so
# kernels, which took 1.8 ms beside an H200 (benchmarks/results/h200: an 8B critic's 1,024 tokens
# and 2,048 as they are, 58 and 63 ms): at 2 operations a weight and token, of the 6e14 a second
# that it reaches in 16 bits. A longer forward hides its launches behind its arithmetic.
_HIDDEN_WORK = 5e11
# The buffer of a causal LM's logits that its graphs write to.
LOGIT_BYTES = 64 << 20
# 32 MiB for cuBLAS on Hopper, and 1 MiB for each of 64 graphs.
_WORKSPACE_BYTES = 96 << 20


def activation_bytes(tokens: int, hidden: int, inner: int, itemsize: int) -> int:
    """Activations of a forward, about: a layer's take the place of the last layer's.

    A few rows of the hidden size, and of the feed-forward's inner one, a token.
    """
    return tokens * (4 * hidden + 3 * inner) * itemsize


def graph_tokens(layer_weights: float) -> int:
    """Tokens of the longest forward that is a CUDA graph, of a model with such layers."""
    return max(n for n in TOKEN_BUCKETS if n <= _SURE_TOKENS or n * layer_weights <= _HIDDEN_WORK)


def graph_memory(tokens: int, hidden: int, inner: int, itemsize: int) -> int:
    """What the CUDA graphs of a model's forwards hold, about: the activations of the longest one.

    All graphs share one memory pool. Beside them cuBLAS keeps a workspace for the stream of the
    captures, and the driver its nodes of each graph.
    """
    return activation_bytes(tokens, hidden, inner, itemsize) + _WORKSPACE_BYTES
