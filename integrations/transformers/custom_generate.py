"""The `custom_generate` route: the stock decoding loops with guidance in the right place."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput, logits_process
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from guided_decode.guidance.config import OnError
from guided_decode.guidance.rule import Configs
from guided_decode.integrations.transformers.abstention import (
    AbstentionCriteria,
    check_abstention,
)
from guided_decode.integrations.transformers.checked_arguments import (
    check_streamer,
    checked_configs,
)
from guided_decode.integrations.transformers.logits_processor import (
    ValueGuidedLogitsProcessor,
    WatchedCriteria,
)
from guided_decode.integrations.transformers.policy_match import check_policy, policy_ids
from guided_decode.integrations.transformers.row_configs import all_configs, row_configs
from guided_decode.integrations.transformers.token_ids import token_ids
from guided_decode.integrations.transformers.value_record import GuidedOutput, ValueRecord
from guided_decode.integrations.transformers.withheld import (
    chosen_streamer,
    refuse_assistant,
    withheld_arguments,
)
from guided_decode.scorer import Scorer

# Guidance acts before these: on the policy's logits at temperature 1, over all tokens.
_AFTER_GUIDANCE = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper", "TopHLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
        "MinPLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper",
        "WatermarkLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor", "LogitNormalization",
    )
    if hasattr(logits_process, name)
)  # fmt: skip


class GuidedDecoding:
    """`custom_generate` callable: the stock decoding loops with guidance in the right place.

    Greedy, sampling, several return sequences and beam search, with left padding. Guidance acts
    after penalties and other processors, before temperature, top-k and top-p. With `abstain` in its
    config it ends rows as `AbstentionCriteria` does, and a `GuidedOutput` says which.

    `generate` hands its own `streamer`, `assistant_model` and `synced_gpus` to no custom loop; they
    are looked up in its call (`withheld`): a streamer and `synced_gpus=True` are honoured, an
    assistant is refused. Two remain: its `tokenizer` is lost, so give stop strings as
    `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`; and `synced_gpus` is not set by
    itself, so pass it with DeepSpeed ZeRO-3 or FSDP on several GPUs.
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
            scorer: what scores the candidates.
            config: the guidance rule; or a list, with one a prompt, or one a row where
                num_return_sequences makes several rows of a prompt. Beams of a prompt share one.
            on_error: "raise" or "passthrough", as in `guide_rows`.
            streamer: gets the prompt and the tokens, as one that is given to `generate` does.
            values: with return_dict_in_generate the output is a `GuidedOutput` with prefix_values
                and advantages. Where guidance scores nothing, V(prefix) is then read for them.

        Raises:
            ValueError: an argument is not what it has to be.
        """
        self.config = checked_configs(scorer, config, on_error)
        check_streamer(streamer)
        self.abstains = any(each.abstain is not None for each in all_configs(self.config))
        if self.abstains:
            check_abstention(scorer, self.config)
        if values and scorer.terminal == "included":
            raise ValueError(
                f"values=True came with {type(scorer).__name__}, which values tokens or steps and "
                "no prefixes: expected a critic or a reward model"
            )
        self.values = values
        self.scorer = scorer
        self.on_error: OnError = on_error
        self.streamer = streamer

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate` calls; returns what the stock loop of the mode returns.

        Raises:
            ValueError: a generation mode without a stock loop, an assistant model, a number of
                configs that does not fit the prompts, a policy of another vocabulary, or what the
                processor refuses.
        """
        loop = _stock_loop(model, generation_config)
        terminals = terminal_ids(generation_config)
        check_policy(self.scorer, policy_ids(model, generation_config, terminals), complete=True)
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        beams = generation_config.num_beams or 1
        # A prompt's rows stand together.
        mask = mask[:: max(beams, generation_config.num_return_sequences or 1)]
        row_configs(self.config, len(input_ids), len(mask), beams=beams)
        self._check_output(generation_config, beams)
        own_arguments = self._loop_arguments(input_ids, beams)
        # Beam search asks its criteria about candidates, not rows.
        watched = WatchedCriteria(stopping_criteria) if beams == 1 else None
        record = ValueRecord() if self.values else None
        processor = ValueGuidedLogitsProcessor(
            self.scorer,
            self.config,
            eos_token_id=terminals,
            attention_mask=mask,
            num_beams=beams,
            on_error=self.on_error,
            stopped=watched,
            record=record,
        )
        if watched is not None and self.abstains:
            watched.abstention = AbstentionCriteria(
                self.scorer, self.config, on_error=self.on_error, follower=processor
            )
        output = loop(
            input_ids,
            logits_processor=_with_guidance(logits_processor, processor),
            stopping_criteria=stopping_criteria if watched is None else watched,
            generation_config=generation_config,
            **own_arguments,
            **model_kwargs,
        )
        abstention = None if watched is None else watched.abstention
        return _with_values(output, input_ids.shape[1], record, abstention)

    def _check_output(self, options: GenerationConfig, beams: int) -> None:
        if self.values and beams > 1:
            raise ValueError(
                f"values=True was given with {beams} beams, which are reordered on their way: drop "
                "it, or use one beam"
            )
        if self.values and not options.return_dict_in_generate:
            raise ValueError(
                "values=True was given without return_dict_in_generate=True: a tensor of tokens "
                "has no place for values; pass both to generate"
            )

    def _loop_arguments(self, input_ids: Tensor, beams: int) -> dict[str, Any]:
        """What the stock loop gets of the arguments that `generate` withheld."""
        withheld = withheld_arguments()
        refuse_assistant(withheld.assistant_model)
        streamer = chosen_streamer(self.streamer, withheld.streamer)
        if streamer is not None and beams > 1:
            raise ValueError(
                f"a streamer was given with {beams} beams: tokens are known when beam search ends; "
                "drop the streamer, or use one beam"
            )
        if self.streamer is not None:
            # To its own, `generate` has given the prompt.
            self.streamer.put(input_ids.cpu())
        found = {"streamer": streamer, "synced_gpus": withheld.synced_gpus}
        return {name: given for name, given in found.items() if given is not None}


def _with_values(
    output: Any,
    width: int,
    record: ValueRecord | None,
    abstention: AbstentionCriteria | None,
) -> Any:
    """The loop's output, with what was asked for beside it; width: of the prompts."""
    asked = record is not None or abstention is not None
    if not asked or not isinstance(output, GenerateDecoderOnlyOutput):
        return output
    guided = GuidedOutput(**output)
    if record is not None:
        guided.prefix_values, guided.advantages = record.of(output.sequences[:, width:])
    if abstention is not None:
        guided.abstained_at = abstention.ended_at.to(output.sequences.device)
    return guided


def _stock_loop(model: PreTrainedModel, config: GenerationConfig) -> Any:
    mode = config.get_generation_mode()
    if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return model._sample
    if mode in (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE):
        return model._beam_search
    raise ValueError(
        f"generation mode {mode.value!r} cannot be guided: expected greedy search, sampling, "
        "beam search or beam sampling"
    )


def _with_guidance(
    processors: LogitsProcessorList, guidance: ValueGuidedLogitsProcessor
) -> LogitsProcessorList:
    before, after = split_processors(processors)
    return LogitsProcessorList([*before, guidance, *after])


def split_processors(
    processors: LogitsProcessorList,
) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """The processors that act before guidance, and the last ones, which reshape what it leaves."""
    at = len(processors)
    while at and isinstance(processors[at - 1], _AFTER_GUIDANCE):
        at -= 1
    return LogitsProcessorList(processors[:at]), LogitsProcessorList(processors[at:])


def terminal_ids(config: GenerationConfig) -> list[int]:
    """The token ids that end a request of this call."""
    prepared = getattr(config, "_eos_token_tensor", None)
    return prepared.flatten().tolist() if prepared is not None else token_ids(config.eos_token_id)
