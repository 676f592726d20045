"""A user's own logits processor of the V1 runner: a request's white list, "40,41"; "" is none."""

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


class Whitelist(LogitsProcessor):
    """Forbids all but the ids in `only`."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self._only = {}

    @classmethod
    def validate_params(cls, sampling_params):
        """Takes anything."""

    def is_argmax_invariant(self):
        """It is not."""
        return False

    def update_state(self, batch_update):
        """Follows the batch."""
        process_dict_updates(
            self._only, batch_update, lambda params, _, __: (params.extra_args or {}).get("only")
        )

    def apply(self, logits):
        """In place."""
        for at, only in self._only.items():
            forbidden = torch.ones_like(logits[at], dtype=torch.bool)
            forbidden[[int(one) for one in only.split(",") if one]] = False
            logits[at].masked_fill_(forbidden, -torch.inf)
        return logits
