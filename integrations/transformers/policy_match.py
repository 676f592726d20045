"""Whether policy and scorer can have the same token ids, by what both tell of their vocabularies.

Tokenizers are compared where the scorer is loaded with `policy_tokenizer`; this is what can be
seen without them.
"""

import functools
import logging
from collections.abc import Collection
from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedModel

from guided_decode.integrations.transformers.token_ids import token_ids
from guided_decode.scorer import Scorer

logger = logging.getLogger("guided_decode")

# Models of one tokenizer differ by padding and a few added tokens: Pythia by up to 384, Qwen2.5 by
# 128. Two Mistral tokenizers with other ids differ by 768.
_ANOTHER_VOCABULARY = 512
_COMPARE = "load_scorer(..., policy_tokenizer=...) compares the tokenizers themselves"


@dataclass(frozen=True)
class PolicyIds:
    """What is known of the policy's tokens; no id where nothing is."""

    vocab_size: int | None
    ends: Collection[int] = ()
    bos: Collection[int] = ()


def policy_ids(
    model: PreTrainedModel, options: GenerationConfig, terminals: Collection[int]
) -> PolicyIds:
    """Of a model that decodes by these options."""
    text = model.config.get_text_config()
    configs = [text, model.config, options, getattr(model, "generation_config", None)]
    ends, bos = (
        {token for config in configs for token in token_ids(getattr(config, name, None))}
        for name in ("eos_token_id", "bos_token_id")
    )
    return PolicyIds(getattr(text, "vocab_size", None), ends | set(terminals), bos)


def check_policy(scorer: Scorer, policy: PolicyIds, *, complete: bool) -> None:
    """Warns once where the ids may differ, or nothing but sizes is known.

    complete: `policy` is all that can be known of it.

    Raises ValueError: vocabularies of clearly different sizes, whose special ids differ as well.
    """
    size, own = policy.vocab_size, scorer.vocab_size
    bos = _unlike("BOS", scorer.bos_token_id, policy.bos)
    unlike = [*_unlike("EOS", scorer.eos_token_id, policy.ends), *bos]
    if size is not None and abs(size - own) >= _ANOTHER_VOCABULARY:
        sizes = f"the policy has {size} token ids and the scorer {own}"
        if unlike:
            raise ValueError(
                f"{sizes}, and {' and '.join(unlike)}: they have different tokenizers; expected a "
                "scorer that reads the policy's token ids"
            )
        _warn_once(f"{sizes}: their tokenizers may differ; {_COMPARE}")
    elif complete and bos:
        _warn_once(f"{bos[0]}: the policy's and the scorer's tokenizers may differ; {_COMPARE}")
    elif complete and not _has_common_names(scorer, policy):
        _warn_once(
            "the special ids of the policy or the scorer are not known, so nothing tells whether "
            f"their tokenizers are the same; {_COMPARE}"
        )


def _unlike(name: str, own: int | None, theirs: Collection[int]) -> list[str]:
    """How a special id differs that both know, in words, if it does.

    One in common is enough: chat models have several ends, and their bases another.
    """
    if own is None or not theirs or own in theirs:
        return []
    ids = " or ".join(map(str, sorted(theirs)))
    return [f"{name} is {ids} for the policy and {own} for the scorer"]


def _has_common_names(scorer: Scorer, policy: PolicyIds) -> bool:
    ends = scorer.eos_token_id is not None and bool(policy.ends)
    return ends or (scorer.bos_token_id is not None and bool(policy.bos))


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
