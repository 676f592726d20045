"""PPO for causal language models that keeps the value model: a small recipe for your own models.

The policy, the reference and the value model are three networks. The conventions are those of
EasyLM's PPO (Tulu 2.5): the value is read at the token before the one that is generated, the score
is paid at the last token, and a response that does not end is punished.
"""

from recipes.ppo.config import PPOConfig
from recipes.ppo.trainer import PPOTrainer
from recipes.ppo.value_model import new_value_model

__all__ = ["PPOConfig", "PPOTrainer", "new_value_model"]
