"""A value head on a frozen policy's own hidden states, for guidance without a second model."""

from recipes.trunk_head.config import TrunkHeadConfig
from recipes.trunk_head.readings import Readings, critic_targets, read_rollouts, reward_targets
from recipes.trunk_head.rollouts import Rollout, load_rollouts
from recipes.trunk_head.training import train_head

__all__ = [
    "Readings",
    "Rollout",
    "TrunkHeadConfig",
    "critic_targets",
    "load_rollouts",
    "read_rollouts",
    "reward_targets",
    "train_head",
]
