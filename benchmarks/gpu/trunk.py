"""The value head on the policy's own trunk, in our loop: lookahead, and pruning of siblings."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.loop import Guide, Handles, PooledPolicy
from benchmarks.gpu.models import Models, head_weight
from guided_decode.forward.final_norm import take_final_norm
from guided_decode.forward.packed import PackedBatch
from guided_decode.forward.packed_model import PackedModel
from guided_decode.kernels import lm_head_value
from guided_decode.scoring.next_logits import NextLogits
from guided_decode.scoring.trunk_head import TrunkHead
from guided_decode.scoring.trunk_scorer import TrunkScorer


def trunk_of(models: Models, cache_tokens: int, **options: Any) -> tuple[PackedModel, TrunkHead]:
    """The policy's trunk without its final norm, which the head applies instead."""
    trunk = models.policy_trunk()
    norm = take_final_norm(trunk)
    assert norm is not None
    weight = head_weight(models.size, str(models.device))
    packed = PackedModel(trunk, "the policy's trunk", cache_tokens=cache_tokens, **options)
    return packed, TrunkHead(weight, norm=norm)


class LookaheadPolicy:
    """The policy whose next logits follow from hidden states that the last step computed."""

    def __init__(self, models: Models, scorer: TrunkScorer) -> None:
        self.scorer = scorer
        self.logits_of = NextLogits(models.policy, scorer.trunk_head)
        scorer.keep_hidden()

    def next_logits(self, handles: Handles) -> Tensor:
        return self.logits_of(self.scorer.read(handles).hidden).float()


class ValuedPolicy(PooledPolicy):
    """The plain policy with V(prefix) beside its logits: norm, lm_head and head in one launch."""

    def __init__(self, models: Models, packed: PackedModel, head: TrunkHead, rows: int, **options):
        super().__init__(packed, models.policy.lm_head, rows, **options)
        self.head = head
        self.values = torch.empty(len(self.logits), dtype=torch.float32, device=packed.device)

    def _write(self, batch: PackedBatch) -> None:
        hidden = self.packed.forward(batch)
        assert self.head.norm is not None
        weight, eps, offset = self.head.norm
        logits, values = lm_head_value(
            hidden,
            self.lm_head,
            self.head.weight,
            norm_weight=weight,
            norm_eps=eps,
            norm_offset=offset,
        )
        self.logits[: len(hidden)].copy_(logits)
        self.values[: len(hidden)].copy_(values[:, 0])


class SiblingPruning(Guide):
    """Finds siblings whose V(prefix) is too far below the best one's.

    The margin is infinite, so that no row goes and steps stay comparable; the decision is made, and
    comes to the host with the tokens.
    """

    def __init__(self, policy: ValuedPolicy, margin: float = float("inf")) -> None:
        self.policy = policy
        self.margin = margin

    def choose(self, logits: Tensor) -> list[int]:
        values = self.policy.values[: len(logits)]
        kept = values >= values.amax() - self.margin
        tokens, alive = torch.stack([logits.argmax(-1), kept.long()]).tolist()
        assert all(alive)
        return tokens
