"""One packed pass over an unmodified transformers module: prefixes and candidates of many rows.

Attention, CUDA graphs, the linear layers on a CPU, models that are sharded over processes, and the
check at load that a packed forward of this model is the model's own.
"""

from typing import TYPE_CHECKING

from guided_decode.public_names import handed_on

__all__ = [
    "Follower",
    "GraphedForward",
    "PackedBatch",
    "PackedModel",
    "ShardError",
    "check_packed",
    "pack",
]

if TYPE_CHECKING:
    from guided_decode.forward.follower import Follower
    from guided_decode.forward.graphs import GraphedForward
    from guided_decode.forward.packed import PackedBatch, pack
    from guided_decode.forward.packed_model import PackedModel
    from guided_decode.forward.ranks import ShardError
    from guided_decode.forward.self_check import check_packed
else:
    __getattr__, __dir__ = handed_on(
        __name__,
        {
            "Follower": "follower",
            "GraphedForward": "graphs",
            "PackedBatch": "packed",
            "PackedModel": "packed_model",
            "ShardError": "ranks",
            "check_packed": "self_check",
            "pack": "packed",
        },
    )
