"""The logits processor for Hugging Face `generate`: each live row's logits, guided by a scorer."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteriaList

from guided_decode.guidance.config import GuidanceConfig, OnError
from guided_decode.guidance.rule import Configs
from guided_decode.guidance.step import guide_rows
from guided_decode.integrations.transformers.abstention import (
    AbstentionCriteria,
    refuse_abstention_of_beams,
)
from guided_decode.integrations.transformers.checked_arguments import check_beams, checked_configs
from guided_decode.integrations.transformers.policy_match import PolicyIds, check_policy
from guided_decode.integrations.transformers.row_configs import all_configs
from guided_decode.integrations.transformers.row_follower import RowFollower
from guided_decode.integrations.transformers.value_record import ValueRecord
from guided_decode.scorer import Scorer


class WatchedCriteria(StoppingCriteriaList):
    """Stopping criteria that remember the rows they have finished.

    finished: bool [rows], None before the first step. abstention: asked last, about the rows that
    no other has finished.
    """

    finished: Tensor | None = None
    abstention: AbstentionCriteria | None = None

    @property
    def ended_at(self) -> Tensor:
        """As of `abstention`, which has to be there."""
        assert self.abstention is not None
        return self.abstention.ended_at

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """bool [rows], as the criteria themselves say."""
        done = super().__call__(input_ids, scores, **kwargs)
        self.finished = done if self.finished is None else self.finished | done
        if self.abstention is not None:
            live = (~self.finished).nonzero().flatten().tolist()
            done = done | self.abstention.below(input_ids, live)
            self.finished = self.finished | done
        return done


class ValueGuidedLogitsProcessor(RowFollower, LogitsProcessor):
    """Guides each live row's next-token logits by a scorer.

    It goes last in `logits_processor`: what a processor behind it masks, or all that it masks, is
    not seen here.

    One object serves one `generate` call after another; it takes a call whose ids do not continue
    the last ones as a new generation, whose prompt is what it is given; threads that share it have
    a generation each. An attention mask belongs
    to one batch of prompts: assign `attention_mask` before the next. Finished rows (a terminal
    among the generated tokens) are neither scored nor changed; rows that another stopping
    criterion finished are known on the `custom_generate` route only. A processor ends no row:
    `abstain` is refused here, and is `GuidedDecoding`'s, or an `AbstentionCriteria`'s beside it.
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
        record: ValueRecord | None = None,
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
            record: gets the rows' values, a step at a time.

        Raises:
            ValueError: what is no scorer or no config, a gate or `abstain` with beams, too small a
                top_k for them, or `abstain` where nobody ends rows.
        """
        check_beams(num_beams)
        super().__init__(
            scorer,
            checked_configs(scorer, config, on_error),
            pad_token_id=pad_token_id,
            eos_token_id=eos_token_id,
            attention_mask=attention_mask,
            num_beams=num_beams,
            listens=record is not None,
        )
        self.on_error: OnError = on_error
        self.stopped = stopped
        self.record = record
        self.min_keep = max(
            _beam_candidates(each, num_beams, len(self.terminals))
            for each in all_configs(self.config)
        )
        if stopped is None:
            _refuse_abstention(all_configs(self.config))

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
        handles = [self._now.handles[i] for i in rows]
        trails = [self._now.trails[i] for i in rows]
        guided = guide_rows(
            self.scorer,
            scores,
            handles,
            [self._now.configs[i] for i in rows],
            terminals=self.terminals,
            on_error=self.on_error,
            min_keep=self.min_keep,
            trails=trails,
        )
        if self.record is not None:
            self.record.add(self.scorer, rows, handles, trails, self.on_error)
        return guided

    def _live_rows(self, input_ids: Tensor) -> list[int]:
        if self.stopped is not None and self.stopped.finished is not None:
            return (~self.stopped.finished).nonzero().flatten().tolist()
        every = list(range(len(input_ids)))
        ended = self.ended(input_ids)
        if ended is None:
            return every
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


def _beam_candidates(config: GuidanceConfig, num_beams: int, terminals: int) -> int:
    """Finite candidates that each beam must keep: beam search looks at so many a beam."""
    if num_beams == 1:
        return 1
    for name in ("gate", "value_gate", "value_gate_fall"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name}={getattr(config, name):g} was given with {num_beams} beams: beams are "
                "compared by their summed advantages, which a gated step leaves out; drop the "
                "gate, or use one beam"
            )
    refuse_abstention_of_beams(config, num_beams)
    needed = max(2, 1 + terminals)
    if config.top_k is not None and config.top_k < needed and config.tail == "mask":
        raise ValueError(
            f"top_k={config.top_k} leaves too few candidates for {num_beams} beams with "
            f"{terminals} terminals: expected at least {needed}"
        )
    return needed


def _refuse_abstention(configs: Iterable[GuidanceConfig]) -> None:
    for each in configs:
        if each.abstain is not None:
            raise ValueError(
                f"abstain={each.abstain:g} was given to a logits processor, which ends no row: use "
                "custom_generate=GuidedDecoding(scorer, config), or put AbstentionCriteria(scorer, "
                "config) among the stopping_criteria and drop abstain here"
            )
