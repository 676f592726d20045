"""Regression of V on frozen features, up to the epoch with the least error on rollouts held out."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from guided_decode.scoring.trunk_head import TrunkHead, head_of_module
from recipes.trunk_head.config import TrunkHeadConfig
from recipes.trunk_head.readings import Readings

Log = Callable[[dict[str, float]], None]


def train_head(
    readings: Readings, targets: Tensor, config: TrunkHeadConfig, log: Log = lambda stats: None
) -> TrunkHead:
    """A head of one layer or two.

    Args:
        readings: the policy's features along rollouts.
        targets: float32 [tokens], in units of the reward.
        config: sizes and rates.
        log: gets each epoch's mean squared error and the share of variance that is explained.
    """
    generator = torch.Generator().manual_seed(config.seed)
    held_out = _held_out(readings.rollout, config.validation, generator)
    features, wanted = readings.features[~held_out], targets[~held_out]
    module = _new_module(features.shape[1], config.width, wanted.mean(), generator)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    best, best_error = copy.deepcopy(module), float("inf")
    for epoch in range(config.epochs):
        order = torch.randperm(len(features), generator=generator)
        for batch in order.split(config.batch_size):
            with torch.enable_grad():
                loss = (module(features[batch])[:, 0] - wanted[batch]).square().mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        schedule.step()
        error = _error(module, readings.features[held_out], targets[held_out])
        if error < best_error:
            best, best_error = copy.deepcopy(module), error
        variance = float(targets[held_out].var(correction=0))
        # Of rewards that are all alike there is nothing to explain.
        explained = 1 - error / variance if variance else math.nan
        log({"epoch": epoch + 1, "held_out_mse": error, "explained": explained})
    return head_of_module(best)


def _held_out(rollout: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Tokens of the rollouts that choose the epoch, bool [tokens]; at least one rollout."""
    count = int(rollout.max()) + 1
    if count < 2:
        raise ValueError(f"{count} rollout is too few: at least one trains and one validates.")
    chosen = torch.randperm(count, generator=generator)[: max(1, int(count * share))]
    return torch.isin(rollout, chosen)


def _new_module(size: int, width: int, mean: Tensor, generator: torch.Generator) -> nn.Module:
    """V starts at the targets' mean everywhere."""
    last = nn.Linear(width or size, 1)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, float(mean))
    if not width:
        return last
    first = nn.Linear(size, width)
    nn.init.normal_(first.weight, std=size**-0.5, generator=generator)
    nn.init.zeros_(first.bias)
    return nn.Sequential(first, nn.GELU(), last)


@torch.no_grad()
def _error(module: nn.Module, features: Tensor, targets: Tensor) -> float:
    return float((module(features)[:, 0] - targets).square().mean())
