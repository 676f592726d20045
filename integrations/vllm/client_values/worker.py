"""What vLLM's workers are extended by, so that `collective_rpc` can fetch values there.

    vllm serve POLICY --worker-extension-cls \\
        guided_decode.integrations.vllm.client_values.worker.ValuesOfWorker
"""

from importlib import import_module
from typing import Any

from guided_decode.integrations.vllm.client_values.store import of_this_process

EXTENSION = f"{__name__}.ValuesOfWorker"
METHOD = "guided_decode_values"


class ValuesOfWorker:
    """Another extension of yours may inherit from it."""

    def guided_decode_values(self, names: list[str]) -> bytes:
        """What is kept of the requests of these names, once: `records.decoded` reads it.

        Empty on the ranks that score nothing.
        """
        return of_this_process().take(names)


def refuse_unreadable(parallel: Any) -> None:
    """Raises ValueError: values cannot be fetched from this engine.

    parallel: vLLM's ParallelConfig.
    """
    if parallel.data_parallel_size > 1:
        raise ValueError(
            f"guide_values came to {parallel.data_parallel_size} engines (data parallelism), and "
            "vLLM does not say which of them serves a request: drop it, or serve one engine"
        )
    name = parallel.worker_extension_cls
    if name != EXTENSION and not (name and _inherits(name)):
        raise ValueError(
            "guide_values came to an engine whose workers cannot be asked for values: start it "
            f"with --worker-extension-cls {EXTENSION} (worker_extension_cls of LLM), or with a "
            "class that inherits from it"
        )


def _inherits(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    found = getattr(import_module(module), attribute, None)
    return isinstance(found, type) and issubclass(found, ValuesOfWorker)
