"""How weights are read: quantised or as they are, to one device or to several."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from guided_decode.checkpoints.families import FAMILIES
from guided_decode.checkpoints.placement import (
    DeviceMap,
    for_loading,
    of_trunk,
    refuse_offloaded,
    refuse_unknown_modules,
)
from guided_decode.checkpoints.quantization import Quantization, settle_stored, stored_method
from guided_decode.checkpoints.source import Source
from guided_decode.checkpoints.tensor_parallel import loading_arguments
from guided_decode.forward.shards import Shards

_WHOLE_CLASSES = {
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForCausalLM": AutoModelForCausalLM,
}
# Where heads of critics may be; none of them is ever quantised.
_HEADS = tuple(dict.fromkeys(head for family in FAMILIES.values() for head in family.heads))


@dataclass(frozen=True, slots=True)
class HowLoaded:
    """quantization: of weights that come in full precision. device_map: of several devices.
    sharded: the processes over which weights are cut by tensor parallelism; None: this one has all.
    """

    quantization: Quantization | None = None
    device_map: DeviceMap | None = None
    sharded: Shards | None = None

    def auto_class(self, source: Source, *, trunk: bool) -> Any:
        """The class to load by.

        A trunk is loaded by itself, but where settings name modules as the checkpoint's whole
        class has them: then as that class, whose trunk is taken.
        """
        if not trunk:
            return AutoModelForCausalLM
        named = self.quantization is not None and self.quantization.named
        if named or stored_method(source.config) is not None:
            for ending, auto_class in _WHOLE_CLASSES.items():
                if source.architecture.endswith(ending):
                    return auto_class
        return AutoModel

    def options(
        self,
        source: Source,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        auto_class: Any,
        *,
        trunk: bool,
    ) -> dict[str, Any]:
        """What `from_pretrained` takes for it."""
        if self.sharded is not None:
            return loading_arguments(self.sharded)
        given: dict[str, Any] = {}
        quantised = stored_method(source.config) is not None
        on_cpu = device is None or torch.device(device).type == "cpu"
        settle_stored(source.config, on_cpu and self.device_map is None)
        if self.quantization is not None and not quantised:
            computed = dtype or getattr(source.config, "dtype", None) or torch.float32
            kept = _HEADS if trunk and auto_class is not AutoModel else ()
            given["quantization_config"] = self.quantization.config(computed, kept)
        alone = trunk and auto_class is AutoModel
        prefix = base_prefix(source.config)
        placed = for_loading(
            of_trunk(self.device_map, prefix) if trunk else self.device_map,
            device,
            always=quantised or "quantization_config" in given,
            prefix="" if alone else prefix,
            others=() if alone else ("score", "lm_head"),
        )
        return given if placed is None else given | {"device_map": placed}

    def check_placed(self, model: PreTrainedModel, name: str) -> None:
        """Raises ValueError: a part of the model found no room on its devices, or the device map
        names what is none of its parts."""
        if self.device_map is not None:
            refuse_unknown_modules(self.device_map, model, name, base_prefix(model.config))
            refuse_offloaded(model, name)


AS_STORED = HowLoaded()


def base_prefix(config: PreTrainedConfig) -> str:
    """Under which a class with a head has its trunk, with the dot."""
    found = MODEL_MAPPING.get(type(config), None)
    classes = found if isinstance(found, tuple) else (found,)
    return f"{getattr(classes[0], 'base_model_prefix', '') or 'model'}."
