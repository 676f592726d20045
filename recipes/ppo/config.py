"""The settings of a PPO run, checked once."""

from dataclasses import dataclass

_POSITIVE = (
    "rollouts_per_step",
    "minibatch_size",
    "generation_batch_size",
    "epochs",
    "max_new_tokens",
    "temperature",
    "policy_lr",
    "value_lr",
    "clip_range",
    "value_clip_range",
    "vf_coef",
    "max_grad_norm",
)
_NOT_NEGATIVE = ("steps", "warmup_steps", "lr_warmup_steps", "kl_coef", "save_every", "seed")
_FRACTIONS = ("gamma", "lam", "warmup_lam")


@dataclass(frozen=True)
class PPOConfig:
    """Defaults are EasyLM's for Tulu 2.5 where it has them; sizes suit one small machine.

    A step is one batch of rollouts and the updates on it. In the first `warmup_steps` (counted in
    addition to `steps`) only the value model learns, on returns with `warmup_lam` in place of
    `lam`: the policy's first advantages then come from a value model that knows something.
    """

    steps: int = 100
    warmup_steps: int = 0
    rollouts_per_step: int = 64
    minibatch_size: int = 64
    generation_batch_size: int = 256
    epochs: int = 1
    max_new_tokens: int = 1024
    temperature: float = 0.7  # of the rollouts; log-probabilities are taken at 1
    policy_lr: float = 1e-6
    value_lr: float = 1e-6
    lr_warmup_steps: int = 0
    gamma: float = 1.0
    lam: float = 0.95
    warmup_lam: float = 1.0
    kl_coef: float = 0.0325
    clip_range: float = 0.2
    value_clip_range: float = 0.2  # in reward units
    vf_coef: float = 0.1
    max_grad_norm: float = 1.0
    reward_gain: float = 1.0
    reward_bias: float = 0.0
    # In place of the score, before gain and bias; None leaves the score.
    unfinished_score: float | None = -10.0
    save_every: int = 0  # steps between checkpoints; 0: at the end only
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in _FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")
