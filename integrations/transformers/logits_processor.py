"""The logits processor for Hugging Face `generate`: each live row's logits, guided by a scorer."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteriaList

from guided_decode.guidance.config import GuidanceConfig, OnError
from guided_decode.guidance.rule import Configs
from guided_decode.guidance.step import guide_rows
from guided_decode.integrations.transformers.checked_arguments import check_beams, checked_configs
from guided_decode.integrations.transformers.padding import (
    masked_ids,
    masked_lengths,
    unmasked_lengths,
)
from guided_decode.integrations.transformers.policy_match import PolicyIds, check_policy
from guided_decode.integrations.transformers.row_configs import all_configs, row_configs
from guided_decode.integrations.transformers.token_ids import token_ids
from guided_decode.prefix import PrefixHandle
from guided_decode.scorer import Scorer


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


class _Generation(threading.local):
    """The generation in progress on this thread.

    handles, configs: its rows' histories and settings. ids: int64 [rows, length], as they came
    last. width: tokens of its prompts, padding included.
    """

    def __init__(self) -> None:
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Generation":
        return _Generation()

    def clear(self) -> None:
        self.begin(torch.empty(0, 0, dtype=torch.int64), [], ())

    def begin(
        self, ids: Tensor, handles: list[PrefixHandle], configs: Sequence[GuidanceConfig]
    ) -> None:
        self.handles = handles
        self.configs = configs
        self.ids = ids
        self.width = ids.shape[1]


class ValueGuidedLogitsProcessor(LogitsProcessor):
    """Guides each live row's next-token logits by a scorer.

    It goes last in `logits_processor`: what a processor behind it masks, or all that it masks, is
    not seen here.

    One object serves one `generate` call after another; it takes a call whose ids do not continue
    the last ones as a new generation, whose prompt is what it is given; threads that share it have
    a generation each. An attention mask belongs
    to one batch of prompts: assign `attention_mask` before the next. Finished rows (a terminal
    among the generated tokens) are neither scored nor changed; rows that another stopping
    criterion finished are known on the `custom_generate` route only.
    """

    def __init__(
        self,
        scorer: Scorer,
        config: Configs,
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
            config: the guidance rule; or a list, with one a prompt (known by attention_mask or
                num_beams) or one a row, in the order of `generate`'s rows. Beams of a prompt share
                one.
            pad_token_id: what left-pads prompts where no mask is given.
            eos_token_id: the token ids that end a request (terminals).
            attention_mask: [prompts, prompt width], 1 for tokens and 0 for padding; rows may be
                fewer than those of `generate` by num_return_sequences or num_beams.
            num_beams: beams a prompt; with more than one, pruning and top_p leave the candidates
                that beam search needs, and a gate is refused.
            on_error: "raise" or "passthrough", as in `guide_rows`.
            stopped: knows which rows other criteria than terminals have finished.

        Raises:
            ValueError: what is no scorer or no config, a gate with beams, or too small a top_k for
                them.
        """
        check_beams(num_beams)
        self.scorer = scorer
        self.config = checked_configs(scorer, config, on_error)
        self.on_error: OnError = on_error
        self.pad_token_id = pad_token_id
        self.terminals = token_ids(eos_token_id)
        self.attention_mask = attention_mask
        self.stopped = stopped
        self.num_beams = num_beams
        # The mask that was used last, and the ids that it hid.
        self._padding: tuple[Tensor | None, set[int]] = (None, set())
        self.min_keep = max(
            _beam_candidates(each, num_beams, len(self.terminals))
            for each in all_configs(self.config)
        )
        self._now = _Generation()

    def reset(self) -> None:
        """Forgets the generation in progress on this thread."""
        self._now.clear()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided scores, [rows, vocab]; input_ids: int64 [rows, length], prompts left-padded.

        Raises:
            ValueError: a batch whose padding or finished rows cannot be told, a number of configs
                that does not fit it, a policy of another vocabulary, or what `guide_rows` refuses.
        """
        check_policy(self.scorer, PolicyIds(scores.shape[-1], self.terminals), complete=False)
        self._follow(input_ids)
        live = self._live_rows(input_ids)
        if len(live) == len(scores):
            return self._guide(scores, live)
        guided = scores.clone()
        if live:
            guided[live] = self._guide(scores[live], live)
        return guided

    def _guide(self, scores: Tensor, rows: list[int]) -> Tensor:
        return guide_rows(
            self.scorer,
            scores,
            [self._now.handles[i] for i in rows],
            [self._now.configs[i] for i in rows],
            terminals=self.terminals,
            on_error=self.on_error,
            min_keep=self.min_keep,
        )

    def _live_rows(self, input_ids: Tensor) -> list[int]:
        if self.stopped is not None and self.stopped.finished is not None:
            return (~self.stopped.finished).nonzero().flatten().tolist()
        every = list(range(len(input_ids)))
        if not self.terminals or input_ids.shape[1] == self._now.width:
            return every
        ends = torch.tensor(self.terminals, device=input_ids.device)
        ended = torch.isin(input_ids[:, self._now.width :], ends)
        if self._is_next_turn(input_ids, ended):
            self._begin(input_ids)
            return every
        return (~ended.any(-1)).nonzero().flatten().tolist()

    def _is_next_turn(self, input_ids: Tensor, ended: Tensor) -> bool:
        """Whether answers, with what ended them, have become the next prompts.

        `generate` stops when every row has ended, and appends nothing but padding to one that has.
        """
        if self.num_beams > 1 or self.stopped is not None:
            return False
        if self.attention_mask is not None and self.attention_mask.shape[1] != input_ids.shape[1]:
            return False
        if self.pad_token_id is None:
            return bool(ended.any(-1).all())
        goes_on = ended[:, :-1].any(-1) & (input_ids[:, -1] != self.pad_token_id)
        return bool(ended.any(-1).all() | goes_on.any())

    def _follow(self, input_ids: Tensor) -> None:
        """Brings the handles up to date: one token more, beams reordered, or new prompts."""
        parents = self._parents(input_ids) if self._continues(input_ids) else None
        if parents is None:
            self._begin(input_ids)
        else:
            self._reorder(parents)
            for handle, token in zip(self._now.handles, input_ids[:, -1].tolist(), strict=True):
                handle.append(token)
        self._now.ids = input_ids.clone()

    def _continues(self, input_ids: Tensor) -> bool:
        rows, length = self._now.ids.shape
        return (
            rows > 0
            and input_ids.shape == (rows, length + 1)
            and torch.equal(input_ids[:, : self._now.width], self._now.ids[:, : self._now.width])
        )

    def _parents(self, input_ids: Tensor) -> list[int] | None:
        """For each row the last step's row that it continues; None where there is none."""
        rows = len(input_ids)
        if torch.equal(input_ids[:, :-1], self._now.ids):
            return list(range(rows))
        # Beams are reordered within their prompt.
        group = self.num_beams if rows % self.num_beams == 0 and self.num_beams > 1 else rows
        now = input_ids[:, :-1].reshape(rows // group, group, -1)
        before = self._now.ids.view(rows // group, group, -1)
        same = (now[:, :, None] == before[:, None]).all(-1)
        if not bool(same.any(-1).all()):
            return None
        first = torch.arange(0, rows, group, device=same.device)[:, None]
        return (same.int().argmax(-1) + first).flatten().tolist()

    def _reorder(self, parents: list[int]) -> None:
        moved = any(
            self._now.configs[i] != self._now.configs[parent] for i, parent in enumerate(parents)
        )
        if moved:
            raise ValueError(
                "rows that continue each other came with different configs, as in beam search: "
                "pass num_beams, and one config a prompt"
            )
        taken: set[int] = set()
        handles = []
        for parent in parents:
            handle = self._now.handles[parent]
            handles.append(PrefixHandle(handle.tokens) if parent in taken else handle)
            taken.add(parent)
        self._now.handles = handles

    def _begin(self, input_ids: Tensor) -> None:
        width = input_ids.shape[1]
        if width == 0:
            raise ValueError(
                "input_ids has no tokens: guidance needs the prompt's token ids, pass them instead "
                "of inputs_embeds"
            )
        pads = [width - length for length in self._prompt_lengths(input_ids)]
        rows = input_ids.tolist()
        configs = row_configs(
            self.config, len(rows), self._prompts(len(rows)), beams=self.num_beams
        )
        handles = [PrefixHandle(row[n:]) for row, n in zip(rows, pads, strict=True)]
        self._now.begin(input_ids, handles, configs)

    def _prompts(self, rows: int) -> int:
        """How many prompts the rows belong to, as far as that is known."""
        if self.num_beams > 1 and rows % self.num_beams == 0:
            return rows // self.num_beams
        return rows if self.attention_mask is None else len(self.attention_mask)

    def _prompt_lengths(self, input_ids: Tensor) -> list[int]:
        """Tokens of each prompt without its left padding."""
        if self.attention_mask is None:
            return unmasked_lengths(
                input_ids,
                self.pad_token_id,
                self.scorer.bos_token_id,
                ends_are_known=bool(self.terminals),
            )
        lengths = masked_lengths(self.attention_mask, *input_ids.shape)
        hidden = masked_ids(input_ids, lengths)
        known_mask, padding = self._padding
        if known_mask is self.attention_mask and not hidden <= padding:
            raise ValueError(
                f"attention_mask hides token ids {sorted(hidden)[:8]}, where the last batch had "
                f"{sorted(padding)[:8]}: it belongs to other prompts; assign the new batch's mask "
                "to the processor's attention_mask"
            )
        self._padding = (self.attention_mask, hidden)
        return lengths


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
