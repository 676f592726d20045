"""Layers that a library has quantised: which they are, and what they need to score by."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("guided_decode")

_REPEATS = "inputs will be cast from"


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is numbers as they are: no tensor of a library's own, and no packed bits."""
    if hasattr(weight, "to_local"):
        # A rank's shard of it.
        weight = weight.to_local()
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype in (
        torch.float32, torch.bfloat16, torch.float16, torch.float64,
    )  # fmt: skip


def is_quantised(model: nn.Module) -> bool:
    """Whether any weight is not plain, or lies packed in a buffer."""
    if getattr(model, "is_quantized", False):
        return True
    if getattr(getattr(model, "config", None), "quantization_config", None):
        return True
    return not all(map(is_plain, model.parameters()))


def settle_bitsandbytes(model: nn.Module, name: str) -> None:
    """Makes a copy's bitsandbytes layers answer for each token by itself, in the model's dtype.

    LLM.int8's threshold picks columns by all tokens of a forward, so that a score would depend on
    what is scored with it: it is 0 here. On some CPUs 4 bits are computed in bfloat16, whatever
    the model's dtype: in a float32 model they are not.
    """
    layers: list[Any] = list(model.modules())
    eight = [each for each in layers if type(each).__name__ == "Linear8bitLt"]
    four = [each for each in layers if type(each).__name__ == "Linear4bit"]
    above = [each for each in eight if each.state.threshold > 0]
    for layer in above:
        layer.state.threshold = 0.0
    if above:
        logger.warning(
            "%s: llm_int8_threshold is taken as 0: with outliers a score would depend on what is "
            "scored beside it", name,
        )  # fmt: skip
    if eight:
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
    if four and getattr(model, "dtype", None) == torch.float32:
        for layer in four:
            layer.support_avx512bf16_for_cpu = False


def _is_news(record: logging.LogRecord) -> bool:
    """bitsandbytes says at each product of 8 bits that it casts."""
    return _REPEATS not in str(record.msg)
