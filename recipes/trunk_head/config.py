"""The settings of a head's training, checked once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrunkHeadConfig:
    """width: of the inner layer; 0 is one linear layer. batch_size: in tokens.

    validation: the share of rollouts that choose the epoch; whole rollouts, not tokens.
    """

    width: int = 256
    epochs: int = 40
    batch_size: int = 2048
    lr: float = 4e-3
    weight_decay: float = 0.01
    validation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("width", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must lie between 0 and 1, got {self.validation}.")
