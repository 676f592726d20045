"""Which arguments of `generate` the trunk's own decoding loop honours, and which it refuses."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process
from transformers.generation.configuration_utils import GenerationMode

from guided_decode.forward.cache_argument import CACHE_ARGUMENTS

# Honoured: what logits processors and stopping criteria are made of (temperature, top_k, top_p and
# the other warpers, penalties, bad words, min_new_tokens, max_new_tokens, max_time, ...), and
HONOURED = (
    "do_sample", "num_return_sequences", "eos_token_id", "pad_token_id", "attention_mask",
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "generation_config",
    "return_dict_in_generate", "output_scores", "output_logits",
)  # fmt: skip

# Fields of GenerationConfig, each with what to do instead.
_REFUSED = {
    "output_attentions": "attention runs on the slot pool and keeps no weights; leave it out",
    "output_hidden_states": "only last hidden states are kept; leave it out",
    "cache_implementation": "the slot pool is the cache; leave it out",
    "prefill_chunk_size": "chunks are bounded by load_scorer(max_forward_tokens=); pass that",
    "compile_config": "nothing is compiled; leave it out",
    "guidance_scale": "it runs the policy a second time; use GuidedDecoding",
    "token_healing": "it rewrites the prompt; heal the prompt before",
}
_NEUTRAL = {"guidance_scale": 1.0}
# Arguments of the policy's forward that say nothing new, or that are checked below.
_KNOWN_INPUTS = frozenset(
    {"attention_mask", "position_ids", *CACHE_ARGUMENTS, "use_cache", "logits_to_keep"}
)
_STATEFUL = tuple(
    getattr(logits_process, name)
    for name in ("SynthIDTextWatermarkLogitsProcessor",)
    if hasattr(logits_process, name)
)


def refuse_options(config: GenerationConfig, processors: LogitsProcessorList) -> None:
    """Raises ValueError: a generation mode, option or processor that the loop does not honour."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"generation mode {mode.value!r} was asked for: expected greedy search or sampling, "
            "the only ones in which a step's candidates are the next step; use GuidedDecoding for "
            "beams, with the same scorer"
        )
    for field, instead in _REFUSED.items():
        given = getattr(config, field, None)
        if given and given != _NEUTRAL.get(field):
            raise ValueError(
                f"{field}={given!r} is not honoured by TrunkLookahead: {instead}; honoured are "
                f"{', '.join(HONOURED)}, and what makes logits processors and stopping criteria"
            )
    for processor in processors:
        if isinstance(processor, _STATEFUL):
            raise ValueError(
                f"{type(processor).__name__} keeps a state for the whole batch, of which gated "
                "rows are chosen apart: drop it, or use GuidedDecoding"
            )


def refuse_inputs(inputs: dict[str, Any], input_ids: Tensor) -> None:
    """Raises ValueError: arguments of the policy's forward that the slot pool has no place for.

    Args:
        inputs: what `generate` hands on to the policy.
        input_ids: int64 [rows, width], prompts left-padded.
    """
    unknown = [
        name for name, given in inputs.items() if name not in _KNOWN_INPUTS and given is not None
    ]
    if input_ids.shape[1] == 0 or "inputs_embeds" in unknown:
        raise ValueError(
            "the prompt came as inputs_embeds: the trunk's prefix cache needs token ids; pass "
            "input_ids instead"
        )
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} came for the policy's forward: expected token ids and their "
            "attention_mask alone; drop it, or use GuidedDecoding"
        )
    for name in CACHE_ARGUMENTS:
        if _is_callers(inputs.get(name)):
            raise ValueError(
                f"{name} came with the prompt: the slot pool is the cache, and finds prefixes that "
                "it has seen by their ids; drop it, and pass the whole prompt"
            )
    if inputs.get("use_cache") is False:
        raise ValueError(
            "use_cache=False was given: the loop runs on a cache, its slot pool; leave it out"
        )


def _is_callers(cache: Any) -> bool:
    """Whether a cache is not the one that `generate` has just made.

    Before 5.17 nothing marks a caller's: an empty one then passes, and stays empty.
    """
    if cache is None:
        return False
    return getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0


def refuse_positions(positions: Tensor | None, width: int, lengths: list[int]) -> None:
    """Raises ValueError: positions, [rows, width], that do not count each prompt from 0.

    lengths: tokens of each prompt, at the end of its row.
    """
    if positions is None:
        return
    starts = torch.tensor([width - length for length in lengths], device=positions.device)
    wanted = torch.arange(width, device=positions.device) - starts[:, None]
    if positions.shape[-1] != width or bool(((positions != wanted) & (wanted >= 0)).any()):
        raise ValueError(
            "position_ids came that do not count each prompt's tokens from 0: the slot pool counts "
            "them so; drop position_ids"
        )
