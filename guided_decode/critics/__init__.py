"""Critics of users' own policies, trained from rollouts and rewards alone."""

from guided_decode.critics.config import CriticConfig
from guided_decode.critics.rollout import Rollout, split_by_prompt

__all__ = ["CriticConfig", "Rollout", "split_by_prompt"]
