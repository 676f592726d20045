"""The logits processor for Hugging Face `generate`: each live row's logits, guided by a scorer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteriaList

from guided_decode.config import GuidanceConfig
from guided_decode.prefix import PrefixHandle
from guided_decode.scores import Scorer
from guided_decode.step import OnError, guide_rows


class WatchedCriteria(StoppingCriteriaList):
    """Stopping criteria that remember the rows they have finished.

    finished: bool [rows], None before the first step.
    """

    finished: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """bool [rows], as the criteria themselves say."""
        done = super().__call__(input_ids, scores, **kwargs)
        self.finished = done if self.finished is None else self.finished | done
        return done


class ValueGuidedLogitsProcessor(LogitsProcessor):
    """Guides each live row's next-token logits by a scorer.

    One object serves one `generate` call after another; it takes a call whose ids do not continue
    the last ones as a new generation, whose prompt is what it is given. Finished rows (a terminal
    among the generated tokens) are neither scored nor changed.
    """

    def __init__(
        self,
        scorer: Scorer,
        config: GuidanceConfig,
        *,
        pad_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,  # [prompts, width], 1 for tokens
        num_beams: int = 1,
        on_error: OnError = "raise",
        stopped: WatchedCriteria | None = None,
    ) -> None:
        """
        Args:
            scorer: what scores the candidates.
            config: the guidance rule.
            pad_token_id: what left-pads prompts where no mask is given.
            eos_token_id: the token ids that end a request (terminals).
            attention_mask: [prompts, prompt width], 1 for tokens and 0 for padding; rows may be
                fewer than those of `generate` by num_return_sequences or num_beams.
            num_beams: beams a prompt; with more than one, pruning and top_p leave the candidates
                that beam search needs, and a gate is refused.
            on_error: "raise" or "passthrough", as in `guide_rows`.
            stopped: knows which rows other criteria than terminals have finished.

        Raises:
            ValueError: a gate with beams, or too small a top_k for them.
        """
        self.scorer = scorer
        self.config = config
        self.on_error: OnError = on_error
        self.pad_token_id = pad_token_id
        self.terminals = token_ids(eos_token_id)
        self.attention_mask = attention_mask
        self.stopped = stopped
        self.min_keep = _beam_candidates(config, num_beams, len(self.terminals))
        self.reset()

    def reset(self) -> None:
        """Forgets the generation in progress."""
        self._handles: list[PrefixHandle] = []
        self._ids = torch.empty(0, 0, dtype=torch.int64)
        self._width = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided scores, [rows, vocab]; input_ids: int64 [rows, length], prompts left-padded.

        Raises:
            ValueError: a batch whose padding or finished rows cannot be told, or what
                `guide_rows` refuses.
        """
        self._follow(input_ids)
        live = self._live_rows(input_ids)
        if len(live) == len(scores):
            return self._guide(scores, self._handles)
        guided = scores.clone()
        if live:
            guided[live] = self._guide(scores[live], [self._handles[i] for i in live])
        return guided

    def _guide(self, scores: Tensor, handles: Sequence[PrefixHandle]) -> Tensor:
        return guide_rows(
            self.scorer,
            scores,
            handles,
            self.config,
            terminals=self.terminals,
            on_error=self.on_error,
            min_keep=self.min_keep,
        )

    def _live_rows(self, input_ids: Tensor) -> list[int]:
        if self.stopped is not None and self.stopped.finished is not None:
            return (~self.stopped.finished).nonzero().flatten().tolist()
        if not self.terminals or input_ids.shape[1] == self._width:
            return list(range(len(input_ids)))
        ends = torch.tensor(self.terminals, device=input_ids.device)
        finished = torch.isin(input_ids[:, self._width :], ends).any(-1).tolist()
        if all(finished):
            # `generate` stops there: an answer with what ended it has become the next prompt.
            self._begin(input_ids)
            return list(range(len(input_ids)))
        return [i for i, done in enumerate(finished) if not done]

    def _follow(self, input_ids: Tensor) -> None:
        """Brings the handles up to date: one token more, beams reordered, or new prompts."""
        if not self._continues(input_ids):
            self._begin(input_ids)
        else:
            if not torch.equal(input_ids[:, :-1], self._ids):
                self._reorder(input_ids[:, :-1])
            for handle, token in zip(self._handles, input_ids[:, -1].tolist(), strict=True):
                handle.append(token)
        self._ids = input_ids.clone()

    def _continues(self, input_ids: Tensor) -> bool:
        rows, length = self._ids.shape
        return (
            rows > 0
            and input_ids.shape == (rows, length + 1)
            and torch.equal(input_ids[:, : self._width], self._ids[:, : self._width])
        )

    def _begin(self, input_ids: Tensor) -> None:
        self._width = input_ids.shape[1]
        if self._width == 0:
            raise ValueError(
                "input_ids has no tokens: guidance needs the prompt's token ids, pass them instead "
                "of inputs_embeds"
            )
        pads = [self._width - length for length in self._prompt_lengths(input_ids)]
        rows = input_ids.tolist()
        self._handles = [PrefixHandle(row[n:]) for row, n in zip(rows, pads, strict=True)]

    def _prompt_lengths(self, input_ids: Tensor) -> list[int]:
        """Tokens of each prompt without its left padding."""
        rows, width = input_ids.shape
        if self.attention_mask is not None:
            return _masked_lengths(self.attention_mask, rows, width)
        if rows == 1:
            return [width]
        if self.pad_token_id is None or not self.terminals:
            raise ValueError(
                f"a batch of {rows} rows came without pad_token_id or eos_token_id: pass both (and "
                "attention_mask, if padding may be mistaken), or use "
                "custom_generate=GuidedDecoding(scorer, config), which knows them"
            )
        padding = input_ids == self.pad_token_id
        if self.pad_token_id == self.scorer.bos_token_id and bool(padding[:, 0].any()):
            raise ValueError(
                f"pad_token_id={self.pad_token_id} is also the scorer's BOS, so padding and a "
                "leading BOS cannot be told apart: pass attention_mask, or use "
                "custom_generate=GuidedDecoding(scorer, config)"
            )
        leading = padding.int().cumprod(-1).sum(-1)
        return (width - leading).tolist()

    def _reorder(self, histories: Tensor) -> None:
        """Gives each row the handle of the last step's row whose history it continues."""
        same = (histories[:, None] == self._ids[None]).all(-1)
        if not bool(same.any(-1).all()):
            raise ValueError(
                "the ids do not continue those of the last step: call reset() between generations"
            )
        taken: set[int] = set()
        handles = []
        for parent in same.int().argmax(-1).tolist():
            handle = self._handles[parent]
            handles.append(PrefixHandle(handle.tokens) if parent in taken else handle)
            taken.add(parent)
        self._handles = handles


def _beam_candidates(config: GuidanceConfig, num_beams: int, terminals: int) -> int:
    """Finite candidates that each beam must keep: beam search looks at so many a beam."""
    if num_beams == 1:
        return 1
    if config.gate is not None:
        raise ValueError(
            f"gate={config.gate:g} was given with {num_beams} beams: beams are compared by their "
            "summed advantages, which a gated step leaves out; drop the gate, or use one beam"
        )
    needed = max(2, 1 + terminals)
    if config.top_k is not None and config.top_k < needed and config.tail == "mask":
        raise ValueError(
            f"top_k={config.top_k} leaves too few candidates for {num_beams} beams with "
            f"{terminals} terminals: expected at least {needed}"
        )
    return needed


def _masked_lengths(mask: Tensor, rows: int, width: int) -> list[int]:
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


def token_ids(given: int | Sequence[int] | None) -> list[int]:
    """No id, one, or several, as a list."""
    if given is None:
        return []
    return [given] if isinstance(given, int) else [int(token) for token in given]
