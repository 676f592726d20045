"""Where the prompts of a left-padded batch begin."""

import torch
from torch import Tensor

_ROUTE = "use custom_generate=GuidedDecoding(scorer, config), which knows the mask"


def masked_lengths(mask: Tensor, rows: int, width: int) -> list[int]:
    """Tokens of each prompt by its attention mask, [prompts, width].

    Raises ValueError: the mask does not belong to the batch, or pads behind tokens.
    """
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"attention_mask is a {type(mask).__name__}: expected a tensor, [prompts, {width}]"
        )
    if mask.ndim != 2 or mask.shape[1] != width or not len(mask) or rows % len(mask):
        raise ValueError(
            f"attention_mask came with shape {list(mask.shape)} for input_ids of {[rows, width]}: "
            f"expected [prompts, {width}] with a number of prompts that divides {rows}"
        )
    real = mask != 0
    if not bool((real[:, :-1] <= real[:, 1:]).all()) or not bool(real[:, -1].all()):
        raise ValueError(
            "attention_mask has padding behind tokens: expected padding on the left only "
            "(tokenizer.padding_side='left')"
        )
    return real.sum(-1).repeat_interleave(rows // len(mask)).tolist()


def masked_ids(input_ids: Tensor, lengths: list[int]) -> set[int]:
    """The token ids that stand where a mask says padding."""
    width = input_ids.shape[1]
    starts = torch.tensor([width - length for length in lengths], device=input_ids.device)
    padding = torch.arange(width, device=input_ids.device) < starts[:, None]
    return set(input_ids[padding].unique().tolist())


def unmasked_lengths(
    input_ids: Tensor, pad: int | None, bos: int | None, *, ends_are_known: bool
) -> list[int]:
    """Tokens of each prompt without its leading padding, as far as that can be told.

    Raises ValueError: a batch without a pad id or terminals, or padding that may be a BOS.
    """
    rows, width = input_ids.shape
    if rows == 1 and pad is None:
        return [width]
    if pad is None or (rows > 1 and not ends_are_known):
        raise ValueError(
            f"a batch of {rows} rows came without pad_token_id or eos_token_id: pass both (and "
            f"attention_mask, if padding may be mistaken), or {_ROUTE}"
        )
    leading = (input_ids == pad).int().cumprod(-1).sum(-1)
    if pad == bos:
        # A single prompt needs no padding: one leading id is its BOS.
        if int(leading.max()) > int(rows == 1):
            raise ValueError(
                f"pad_token_id={pad} is also the scorer's BOS, so padding and a leading BOS cannot "
                f"be told apart: pass attention_mask, or {_ROUTE}"
            )
        return [width] * rows
    return (width - leading).tolist()
