"""The value model: a token-classification network with one label and no head bias."""

import copy

import torch
from torch import nn
from transformers import AutoModelForTokenClassification, PreTrainedModel


def new_value_model(source: PreTrainedModel) -> PreTrainedModel:
    """A value model on a copy of `source`'s trunk.

    `source` is a reward model (`*ForSequenceClassification` with one label: its head is copied)
    or a policy (the head starts at zero, and so does V).
    """
    config = copy.deepcopy(source.config)
    config.num_labels = 1
    config.classifier_dropout = 0.0
    model = AutoModelForTokenClassification.from_config(config)
    trunk: nn.Module = getattr(model, model.base_model_prefix)
    trunk.load_state_dict(getattr(source, source.base_model_prefix).state_dict())
    head = getattr(source, "score", None)
    with torch.no_grad():
        if head is None:
            model.score.weight.zero_()
        elif head.weight.shape[0] == 1:
            model.score.weight.copy_(head.weight)
        else:
            raise ValueError(f"a reward model has one label, this one has {head.weight.shape[0]}.")
        freeze_bias(model)
    return model.to(source.device)


def freeze_bias(model: PreTrainedModel) -> None:
    """Hold the head's bias, which the Hugging Face class has and EasyLM's lacks, at zero."""
    head = model.get_submodule("score")
    if isinstance(head, nn.Linear) and head.bias is not None:
        head.bias.data.zero_()
        head.bias.requires_grad_(False)
