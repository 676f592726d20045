"""The decoding loop in which the lookahead is the decode step: one policy forward a token.

The policy runs on the slot pool. Each step forwards the k candidates of every row; a value head
on the same hidden states scores them, the chosen one's hidden state gives the next logits, and the
others' slots are free again.
"""

from typing import Any

from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from guided_decode.checkpoints.adapter_layers import has_adapters, settled_copy
from guided_decode.guidance.config import OnError
from guided_decode.guidance.rule import Configs
from guided_decode.integrations.transformers.checked_arguments import (
    check_streamer,
    checked_configs,
)
from guided_decode.integrations.transformers.padding import masked_lengths
from guided_decode.integrations.transformers.row_configs import row_configs
from guided_decode.integrations.transformers.trunk_options import (
    refuse_inputs,
    refuse_options,
    refuse_positions,
)
from guided_decode.integrations.transformers.trunk_run import TrunkRun
from guided_decode.integrations.transformers.withheld import (
    Withheld,
    chosen_streamer,
    refuse_assistant,
    withheld_arguments,
)
from guided_decode.scorer import Scorer
from guided_decode.scoring.next_logits import NextLogits
from guided_decode.scoring.trunk_scorer import TrunkScorer


class TrunkLookahead:
    """`custom_generate` callable: guided decoding by a head on the policy's own hidden states.

        scorer = load_scorer(policy, kind="trunk-head", head=...)
        policy.generate(**inputs, custom_generate=TrunkLookahead(scorer, config))

    Greedy and sampling, several return sequences, left padding, several EOS ids, logits processors
    in the order of `GuidedDecoding`, stopping criteria; with the same tokens as `GuidedDecoding`
    with the same scorer, for half its forwards. What it does not honour it refuses
    (`trunk_options`). `generate` hands its own `streamer`, `assistant_model` and `synced_gpus` to
    no custom loop; they are looked up in its call (`withheld`): a streamer is honoured, the others
    are refused. Its `tokenizer` is lost: give stop strings as
    `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`.

    The cache outlives a call, so that prompts that come again are not forwarded again. The policy
    is followed from call to call: other weights or another adapter empty the cache. Threads may
    share one.
    """

    def __init__(
        self,
        scorer: Scorer,
        config: Configs,
        *,
        on_error: OnError = "raise",
        streamer: BaseStreamer | None = None,
        values: bool = False,
    ) -> None:
        """
        Args:
            scorer: of kind "trunk-head", loaded from the policy that is decoded.
            config: the guidance rule; or a list, as of `GuidedDecoding`.
            on_error: "raise" or "passthrough", as in `guide_rows`.
            streamer: gets the prompt and the tokens, as one that is given to `generate` does.
            values: with return_dict_in_generate the output has advantages beside its prefix_values.

        Raises:
            ValueError: another kind of scorer, one that does not see the policy's BOS, or another
                argument that is not what it has to be.
        """
        self.config = checked_configs(scorer, config, on_error)
        check_streamer(streamer)
        if not isinstance(scorer, TrunkScorer):
            raise ValueError(
                f"a {type(scorer).__name__} was given: expected the scorer of "
                'load_scorer(policy, kind="trunk-head", head=...); use GuidedDecoding for others'
            )
        if scorer.skip_token is not None:
            raise ValueError(
                'the scorer drops a leading BOS (bos="drop"), but the policy reads it: expected a '
                'scorer with bos="policy"; load it so'
            )
        self.scorer = scorer
        self.on_error: OnError = on_error
        self.streamer = streamer
        self.values = values
        # What the next tokens are read with, and what that was made of.
        self._logits_of: tuple[tuple[object, ...], NextLogits] | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate` calls; returns what its sampling loop returns.

        Raises:
            ValueError: another policy, an argument that is not honoured, or a number of configs
                that does not fit the prompts.
        """
        withheld = withheld_arguments()
        _refuse_withheld(withheld)
        streamer = chosen_streamer(self.streamer, withheld.streamer)
        refuse_options(generation_config, logits_processor)
        refuse_inputs(model_kwargs, input_ids)
        mask = model_kwargs.get("attention_mask")
        rows, width = input_ids.shape
        lengths = [width] * rows if mask is None else masked_lengths(mask, rows, width)
        refuse_positions(model_kwargs.get("position_ids"), width, lengths)
        prompts = rows // (generation_config.num_return_sequences or 1)
        configs = row_configs(self.config, rows, prompts)
        self.scorer.keep_hidden()
        logits_of = self._policy_head(model)
        if self.streamer is not None:
            # To its own, `generate` has given the prompt.
            self.streamer.put(input_ids.cpu())
        run = TrunkRun(
            self.scorer,
            configs,
            logits_of,
            input_ids,
            lengths,
            logits_processor,
            generation_config,
            on_error=self.on_error,
            streamer=streamer,
            listens=self.values,
        )
        output = run.until(stopping_criteria)
        if streamer is not None:
            streamer.end()
        return output if generation_config.return_dict_in_generate else output.sequences

    def _policy_head(self, model: PreTrainedModel) -> NextLogits:
        if has_adapters(model):
            # Which of them are active may be another matter at the next call.
            model = settled_copy(model, None, type(model).__name__)
            self._check_weights(model)
            return NextLogits(model, self.scorer.trunk_head)
        self._check_weights(model)
        made_of = (model, model.get_output_embeddings(), self.scorer.trunk_head)
        known = self._logits_of
        if known is None or any(a is not b for a, b in zip(known[0], made_of, strict=True)):
            known = self._logits_of = (made_of, NextLogits(model, self.scorer.trunk_head))
        return known[1]

    def _check_weights(self, model: PreTrainedModel) -> None:
        theirs = dict(model.base_model.named_parameters())
        for name, weight in self.scorer.model.model.named_parameters():
            other = theirs.get(name)
            if other is None or other.data_ptr() != weight.data_ptr():
                raise ValueError(
                    f"the scorer's trunk ({self.scorer.model.name}) is not the policy's own: "
                    f"{name} is another tensor; load the scorer from the policy in memory, with "
                    "the adapter that is active in it, if any: "
                    'load_scorer(policy, kind="trunk-head", head=...)'
                )


def _refuse_withheld(given: Withheld) -> None:
    refuse_assistant(given.assistant_model)
    if given.synced_gpus:
        raise ValueError(
            "synced_gpus=True was given: a row's slots are in one process; drop it, or use "
            "GuidedDecoding for a policy that is spread over processes"
        )
