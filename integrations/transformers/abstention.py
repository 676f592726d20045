"""Abstention as a stopping criterion: rows end of which the scorer expects nothing more."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from guided_decode.guidance import failed_rows
from guided_decode.guidance.config import GuidanceConfig, OnError
from guided_decode.guidance.rule import Configs
from guided_decode.guidance.value_trail import check_has_values, read_values
from guided_decode.integrations.transformers.checked_arguments import checked_configs
from guided_decode.integrations.transformers.row_configs import all_configs
from guided_decode.integrations.transformers.row_follower import RowFollower
from guided_decode.integrations.transformers.withheld import running_options
from guided_decode.scorer import Scorer


class AbstentionCriteria(StoppingCriteria):
    """Ends a row behind the first t tokens of its response for which

        t >= abstain_after  and  V(prompt + t tokens) < abstain

    by its `GuidanceConfig` (arXiv 2604.18419). By itself it guides nothing:

        quits = GuidanceConfig(beta=0.0, tail="keep", abstain=-1.5, abstain_after=20)
        model.generate(**inputs, stopping_criteria=[AbstentionCriteria(
            scorer, quits, attention_mask=inputs["attention_mask"], eos_token_id=...)])

    and costs the scorer one token a step, or nothing where guidance scored that token as a
    candidate. `GuidedDecoding` brings it along where its config has `abstain`. One object serves
    one `generate` call after another, as `ValueGuidedLogitsProcessor` does; beams have no rows, and
    are refused. By itself it also reads V of rows that other criteria than EOS and length ended.
    """

    def __init__(
        self,
        scorer: Scorer,
        config: Configs,
        *,
        pad_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,  # [prompts, width], 1 for tokens
        on_error: OnError = "raise",
        follower: RowFollower | None = None,
    ) -> None:
        """
        Args:
            scorer: what values the prefixes.
            config: the settings, of which `abstain` and `abstain_after` are read; or a list, as of
                `ValueGuidedLogitsProcessor`.
            pad_token_id, eos_token_id, attention_mask: as there.
            on_error: "raise", or "passthrough": a row whose value fails, or is no finite number,
                is not ended, and counted.
            follower: who follows the rows already, a processor on the same call.

        Raises:
            ValueError: what is no scorer or no config, no config with `abstain`, or a scorer
                without values of prefixes.
        """
        configs = checked_configs(scorer, config, on_error)
        check_abstention(scorer, configs)
        self.scorer = scorer
        self.on_error: OnError = on_error
        self._rows = follower or RowFollower(
            scorer,
            configs,
            pad_token_id=pad_token_id,
            eos_token_id=eos_token_id,
            attention_mask=attention_mask,
        )

    @property
    def attention_mask(self) -> Tensor | None:
        """Of the prompts; assign the next batch's before it is generated."""
        return self._rows.attention_mask

    @attention_mask.setter
    def attention_mask(self, mask: Tensor | None) -> None:
        self._rows.attention_mask = mask

    @property
    def ended_at(self) -> Tensor:
        """Tokens that each row's response had when it was ended, int64 [rows]; -1 where it was not.
        Of the generation in progress on this thread, or the last one."""
        return self._rows.now.ended_at

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows are ended, bool [rows]; input_ids: int64 [rows, length], left-padded.

        Raises ValueError: beams; as `ValueGuidedLogitsProcessor`, of rows.
        """
        # Looked up in `generate`'s call: a criterion is told of neither.
        options = running_options()
        if options is not None:
            for each in all_configs(self._rows.config):
                refuse_abstention_of_beams(each, options.num_beams or 1)
        self._rows.follow_chosen(input_ids)
        ended = self._rows.ended(input_ids)
        over = torch.zeros(len(input_ids)) if ended is None else ended.any(-1)
        live = (over == 0).nonzero().flatten().tolist()
        longest = None if options is None else options.max_length
        if longest is not None and input_ids.shape[1] >= longest:
            live = []
        return self._ended(input_ids, live)

    def below(self, input_ids: Tensor, live: Sequence[int]) -> Tensor:
        """The same where it is known which rows nothing else has finished."""
        self._rows.follow_chosen(input_ids)
        return self._ended(input_ids, live)

    def _ended(self, input_ids: Tensor, live: Sequence[int]) -> Tensor:
        now = self._rows.now
        tokens = input_ids.shape[1] - now.width
        due = [i for i in live if now.ended_at[i] < 0 and now.configs[i].abstains_at(tokens)]
        values = read_values(
            self.scorer,
            [now.handles[i] for i in due],
            [now.trails[i] for i in due],
            self.on_error,
        )
        unread = sum(map(math.isnan, values))
        if unread:
            failed_rows.count(self.scorer, unread, failed_rows.no_value(unread, len(values)))
        for i, value in zip(due, values, strict=True):
            if now.configs[i].ends(value, tokens):
                now.ended_at[i] = tokens
        return (now.ended_at >= 0).to(input_ids.device)


def refuse_abstention_of_beams(config: GuidanceConfig, num_beams: int) -> None:
    """Raises ValueError: a config that abstains, with several beams."""
    if config.abstain is not None and num_beams > 1:
        raise ValueError(
            f"abstain={config.abstain:g} was given with {num_beams} beams: a beam that falls "
            "behind is dropped by the search itself; drop it, or use one beam"
        )


def check_abstention(scorer: Scorer, config: Configs) -> None:
    """Raises ValueError: nobody abstains by these configs, or prefixes have no values."""
    every = all_configs(config)
    if all(each.abstain is None for each in every):
        raise ValueError(
            "config has no abstain: expected GuidanceConfig(abstain=..., abstain_after=...), the "
            "value below which a row is ended"
        )
    for each in every:
        check_has_values(scorer, each)
