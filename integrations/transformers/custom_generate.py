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
from transformers.generation import logits_process
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.guidance.step import OnError
from guided_decode.integrations.transformers.logits_processor import (
    ValueGuidedLogitsProcessor,
    WatchedCriteria,
    token_ids,
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
    after penalties and other processors, before temperature, top-k and top-p.
    """

    def __init__(
        self,
        scorer: Scorer,
        config: GuidanceConfig,
        *,
        on_error: OnError = "raise",
        streamer: BaseStreamer | None = None,
    ) -> None:
        """
        Args:
            scorer: what scores the candidates.
            config: the guidance rule.
            on_error: "raise" or "passthrough", as in `guide_rows`.
            streamer: gets the prompt and the tokens; `generate` hands its own to no custom loop.
        """
        self.scorer = scorer
        self.config = config
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
            ValueError: a generation mode without a stock loop, or what the processor refuses.
        """
        loop = _stock_loop(model, generation_config)
        mask = model_kwargs.get("attention_mask")
        beams = generation_config.num_beams or 1
        if beams > 1 and self.streamer is not None:
            raise ValueError(
                f"a streamer was given with {beams} beams: tokens are known when beam search ends; "
                "drop the streamer, or use one beam"
            )
        # Beam search asks its criteria about candidates, not rows.
        watched = WatchedCriteria(stopping_criteria) if beams == 1 else None
        processor = ValueGuidedLogitsProcessor(
            self.scorer,
            self.config,
            eos_token_id=terminal_ids(generation_config),
            attention_mask=torch.ones_like(input_ids) if mask is None else mask,
            num_beams=beams,
            on_error=self.on_error,
            stopped=watched,
        )
        kwargs = {} if self.streamer is None else {"streamer": self.streamer}
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        return loop(
            input_ids,
            logits_processor=_with_guidance(logits_processor, processor),
            stopping_criteria=stopping_criteria if watched is None else watched,
            generation_config=generation_config,
            **kwargs,
            **model_kwargs,
        )


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
