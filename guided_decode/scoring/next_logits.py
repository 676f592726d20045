"""The policy's next-token logits from hidden states that were computed before."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from guided_decode.forward.modes import without_autograd
from guided_decode.kernels import lm_head_value
from guided_decode.kernels.norm import Norm
from guided_decode.scoring.trunk_head import TrunkHead

# Largest difference from the policy's own logits, relative to their norm.
_ALLOWED = {True: 1e-4, False: 5e-2}
_CHECKED_TOKENS = 6


class NextLogits:
    """Final norm, lm_head, and what the policy's class does to its output, in one pass."""

    def __init__(self, policy: PreTrainedModel, head: TrunkHead) -> None:
        """
        Args:
            policy: a causal LM.
            head: the value head that rides on the pass; its norm is the policy's final one, where
                hidden states come from before it.

        Raises:
            ValueError: no lm_head, or one whose logits this cannot reproduce.
        """
        lm_head = policy.get_output_embeddings()
        if lm_head is None:
            raise ValueError(
                f"{type(policy).__name__} has no language-model head: expected the causal LM that "
                "is decoded"
            )
        config = policy.config.get_text_config()
        self._lm_head = lm_head
        # A head with two layers has no row of its own in this pass.
        linear = head.inner is None
        self._weight = head.weight if linear else head.weight.new_zeros(1, head.hidden_size)
        self._bias = head.bias if linear else None
        self._norm: Norm | None = head.norm
        # Cohere's, Granite's and Gemma's.
        scale = getattr(config, "logit_scale", None) or 1.0
        self._scale = float(scale) / float(getattr(config, "logits_scaling", None) or 1.0)
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._check(policy)

    @without_autograd
    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits, [rows, vocab] of the policy's dtype, of hidden states [rows, hidden]."""
        return self._logits(hidden, self._norm)

    def _logits(self, hidden: Tensor, norm: Norm | None) -> Tensor:
        weight, eps, offset = (None, 1e-6, 0.0) if norm is None else norm
        logits, _ = lm_head_value(
            hidden,
            self._lm_head,
            self._weight,
            self._bias,
            norm_weight=weight,
            norm_eps=eps,
            norm_offset=offset,
            scale=self._scale,
            softcap=self._softcap,
        )
        return logits

    @without_autograd
    def _check(self, policy: PreTrainedModel) -> None:
        """Holds the logits to the policy's own, on a few tokens."""
        vocab = len(policy.get_input_embeddings().weight)  # type: ignore[arg-type]
        ids = torch.arange(_CHECKED_TOKENS, device=policy.device)[None] % vocab
        output = policy(input_ids=ids, use_cache=False, output_hidden_states=True)
        stock = output.logits[0].float()
        # The last of the hidden states is what lm_head reads, after the norm.
        ours = self._logits(output.hidden_states[-1][0], None).float()
        differs = float((ours - stock).norm() / stock.norm().clamp(min=1e-9))
        allowed = _ALLOWED[policy.dtype == torch.float32]
        if not differs <= allowed:
            raise ValueError(
                f"{type(policy).__name__} computes its logits in a way that is not known here: "
                f"they differ by {differs:.2g} of their norm, where {allowed:g} is allowed; use "
                "GuidedDecoding, which runs the policy's own forward"
            )
