"""What a model's config must be for packed scoring, and its rope."""

import math
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from guided_decode.checkpoints.families import Family

_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})
# Fields of configs whose recurrent layers layer_types does not show.
_RECURRENT_FIELDS = ("block_types", "rescale_every")
# Causal whatever is_decoder says, whose default is False there and which their classes never read.
_ALWAYS_CAUSAL = frozenset({"gpt_neox", "gpt_neox_japanese"})
# Their frequencies depend on the longest position in the batch, so a value would too.
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def check_config(name: str, config: PreTrainedConfig) -> None:
    """Raises ValueError: the model cannot be scored in packed form, and why."""
    reason = _misfit(config)
    if reason is not None:
        raise ValueError(
            f"{name} ({config.model_type}) {reason}: expected a causal decoder in which only full "
            "or sliding-window attention carries state; use a checkpoint of such a model"
        )


def _misfit(config: PreTrainedConfig) -> str | None:
    if config.is_encoder_decoder:
        return "is an encoder-decoder"
    if config.get_text_config() is not config:
        return "holds its text model's config inside another one (a multimodal model)"
    layers = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS)
    if layers:
        return f"has layers of type {', '.join(layers)}"
    recurrent = [field for field in _RECURRENT_FIELDS if hasattr(config, field)]
    if recurrent:
        return f"has recurrent layers ({recurrent[0]})"
    if _is_bidirectional(config):
        return "is bidirectional"
    ropes = {str(rope.get("rope_type")) for rope in rope_parameters(config)}
    if ropes & _BATCH_DEPENDENT_ROPE:
        return f"has rope_type {', '.join(sorted(ropes & _BATCH_DEPENDENT_ROPE))}"
    return None


def _is_bidirectional(config: PreTrainedConfig) -> bool:
    if config.model_type in _ALWAYS_CAUSAL:
        return False
    if getattr(config, "use_bidirectional_attention", False):
        return True
    if getattr(config, "is_decoder", True) is False or getattr(config, "is_causal", True) is False:
        return True
    own_code = getattr(config, "auto_map", None)
    return not own_code and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rope of the config: one dict, or one for each layer type; empty without rope."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, dict)]
    return nested or ([given] if given else [])


def settle_rope(
    name: str, config: PreTrainedConfig, family: Family, rope_theta: float | None
) -> None:
    """Sets rope_theta where the caller gave one, else refuses one that is known to be wrong.

    Raises ValueError: the family's known wrong value; or a value was given that no rope can have,
    or for a config without rope, or with several.
    """
    ropes = rope_parameters(config)
    if rope_theta is not None:
        theta = rope_theta if isinstance(rope_theta, int | float) else 0.0
        if not 0 < theta < math.inf:
            raise ValueError(f"rope_theta={rope_theta!r}: expected a finite number above 0")
        if len(ropes) != 1:
            raise ValueError(
                f"rope_theta={rope_theta:g} was given for {name}, whose config has {len(ropes)} "
                "ropes: expected one; leave rope_theta out"
            )
        ropes[0]["rope_theta"] = float(rope_theta)
        return
    defect = family.rope_defect
    if defect is not None and any(rope.get("rope_theta") == defect.wrong for rope in ropes):
        raise ValueError(
            f"{name} has rope_theta {defect.wrong:g}: one converter for {family.kind} wrote that "
            f"where {defect.right:g} is right; pass rope_theta={defect.right:g}, or "
            f"rope_theta={defect.wrong:g} if it was trained so"
        )
