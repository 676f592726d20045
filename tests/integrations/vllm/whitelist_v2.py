"""A user's own logits processor of Model Runner V2: a request's white list, "40,41"; "" is none."""

import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor


class Whitelist(LogitsProcessor):
    """Forbids all but the ids in `only`."""

    def __init__(self, vllm_config, req_states):
        self._only = {}

    @classmethod
    def validate_params(cls, sampling_params):
        """Takes anything."""

    def add_request(self, req_idx, sampling_params):
        """Whether the request has a list."""
        self._only[req_idx] = (sampling_params.extra_args or {}).get("only")
        return self._only[req_idx] is not None

    def apply_staged_writes(self):
        """Keeps nothing on the device."""

    def apply(self, logits, ctx):
        """In place."""
        for at, slot in enumerate(ctx.idx_mapping_np.tolist()):
            only = self._only.get(slot)
            if only is not None:
                forbidden = torch.ones_like(logits[at], dtype=torch.bool)
                forbidden[[int(one) for one in only.split(",") if one]] = False
                logits[at].masked_fill_(forbidden, -torch.inf)
        return logits
