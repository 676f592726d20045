"""The logits processor that vLLM loads, on whichever model runner."""

from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor import LogitsProcessor as BatchInterface

from guided_decode.integrations.vllm.request import check_request
from guided_decode.integrations.vllm.request_ends import SamplingParams
from guided_decode.integrations.vllm.server_config import front_end_config

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotInterface
except ImportError:  # vLLM before 0.32 has no such runner
    SlotInterface = object  # type: ignore[assignment,misc]

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

    from guided_decode.integrations.vllm.rows import LiveRow


class ValueGuidedLogitsProcessor(BatchInterface, SlotInterface):
    """Value-guided decoding for the requests that ask for it; every other row stays as it is.

    Configured by `additional_config["guided_decode"]` (`ServerConfig`), and by each request's
    `extra_args` (`Keys`). The V1 runner calls `update_state` and `apply(logits)`; Model Runner V2
    `add_request`, `apply_staged_writes` and `apply(logits, context)`.
    """

    def __init__(self, vllm_config: "VllmConfig", *runner: Any) -> None:
        """
        Args:
            vllm_config: the engine's.
            runner: (device, is_pin_memory) of the V1 runner, or (req_states,) of V2.

        Raises:
            ValueError: the configuration is wrong, or the engine has what guidance cannot serve.
        """
        from guided_decode.integrations.vllm.build import build_engine
        from guided_decode.integrations.vllm.foreign import may_overrule, may_rewrite
        from guided_decode.integrations.vllm.rows import BatchRows
        from guided_decode.integrations.vllm.slot_rows import SlotRows
        from guided_decode.integrations.vllm.speculation import most_drafts

        is_v1 = len(runner) == 2
        self.engine = build_engine(
            vllm_config, runner[0] if is_v1 else runner[0].device, is_v1=is_v1
        )
        admit, rewrites = self.engine.admit, may_rewrite(vllm_config)
        self._batch = BatchRows(admit, rewrites=rewrites) if is_v1 else None
        self._slots = None
        if not is_v1:
            self._slots = SlotRows(
                admit,
                runner[0],
                drafts=most_drafts(vllm_config),
                rewrites=rewrites,
                overruled=may_overrule(vllm_config),
            )
        trunk = self.engine.trunk
        if trunk is not None:
            rows = self._slots if self._batch is None else self._batch
            assert rows is not None
            trunk.held.standing = rows.handles

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses what a request must not ask for.

        Raises ValueError: the reason, which the server answers with HTTP 400.
        """
        check_request(sampling_params, front_end_config())

    @property
    def live(self) -> "list[LiveRow]":
        """The requests in the batch that asked for something."""
        rows = self._batch if self._batch is not None else self._slots
        assert rows is not None
        return rows.live()

    def is_argmax_invariant(self) -> bool:
        """Guidance changes the greedy token."""
        return False

    def update_state(self, batch_update: "BatchUpdate | None") -> None:
        """V1: who came, left, and moved."""
        assert self._batch is not None
        if self._batch.update(batch_update):
            self.engine.release(self.live)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request takes a slot; whether any of its rows may change."""
        assert self._slots is not None
        asks = self._slots.add(req_idx, sampling_params)
        self.engine.counts.abstained_rows += self._slots.take_abstained()
        self.engine.release(self.live)
        return asks

    def apply_staged_writes(self) -> None:
        """V2: a step begins."""
        assert self._slots is not None
        if self._slots.advance():
            self.engine.counts.abstained_rows += self._slots.take_abstained()
            self.engine.release(self.live)

    def apply(
        self, logits: "torch.Tensor", context: "LogitsContext | None" = None
    ) -> "torch.Tensor":
        """Guided logits in place; [rows, vocab] float32."""
        if context is not None:
            assert self._slots is not None
            rows = self._slots.rows(context, logits)
            self.engine.counts.abstained_rows += self._slots.take_abstained()
            return self.engine.step(logits, rows, goes_on=self._slots.goes_on)
        assert self._batch is not None
        return self.engine.step(logits, self._batch.rows())
