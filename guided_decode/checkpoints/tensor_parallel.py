"""Tensor parallelism of `load_scorer(..., tp_plan="auto")`: what it needs, and what it refuses."""

import atexit
import os
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from guided_decode.checkpoints.adapted import Adapted, PeftModelLike
from guided_decode.checkpoints.adapter_layers import has_adapters
from guided_decode.checkpoints.source import ModelLike, Source
from guided_decode.forward.shards import Shards, close_all
from guided_decode.forward.tensor_parallel import shard_mesh

TP_PLAN: Literal["auto"] = "auto"
# What torchrun tells each process that it starts.
_OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# transformers' own: ranks read large checkpoints at unlike speeds.
_TIMEOUT = timedelta(hours=2)


def open_shards(
    tp_plan: str | None, model: ModelLike, device: torch.device | None, **beside: object
) -> Shards | None:
    """The ranks that share a scorer, which all come here together; None where there is one.

    Args:
        tp_plan: as of `load_scorer`.
        model: what is to be loaded.
        device: that was asked for.
        beside: other arguments of `load_scorer` that a plan does not go with, by name.

    Raises ValueError: no plan, a process that torchrun did not start, or what does not go with it.
    """
    if tp_plan is None:
        return None
    if tp_plan != TP_PLAN:
        raise ValueError(f'tp_plan={tp_plan!r}: expected "{TP_PLAN}", transformers\' own plan')
    if given := [name for name, value in beside.items() if value is not None]:
        raise ValueError(
            f'tp_plan="{TP_PLAN}" came with {" and ".join(given)}, which it does not go with: each '
            "rank has its shard of whole full-precision weights on its own device; drop one of them"
        )
    if isinstance(model, Adapted | PeftModelLike):
        raise _refused_adapter(f"a model given as {type(model).__name__}")
    if isinstance(model, PreTrainedModel) and shard_mesh(model) is None:
        raise ValueError(
            f'tp_plan="{TP_PLAN}" came with a {type(model).__name__} in memory, whose weights are '
            "whole: expected a name or folder, of which each rank loads its shard, or a model that "
            'was loaded with distributed_config=DistributedConfig(tp_plan="auto")'
        )
    join_ranks()
    own = device_of_rank()
    if device is not None and not _is_at(device, own):
        raise ValueError(
            f'device={str(device)!r} came with tp_plan="{TP_PLAN}": expected none, since each rank '
            f"has its own device ({own} here)"
        )
    return Shards() if dist.get_world_size() > 1 else None


def _is_at(device: torch.device, own: torch.device) -> bool:
    """Whether a device that was asked for is this rank's; without an index it is any rank's."""
    return device.type == own.type and device.index in (None, own.index or 0)


def join_ranks() -> None:
    """Makes torch.distributed's default group of torchrun's processes, if there is none.

    Raises ValueError: torchrun did not start this process.
    """
    if dist.is_initialized():
        return
    missing = [name for name in _OF_TORCHRUN if name not in os.environ]
    if missing:
        raise ValueError(
            f'tp_plan="{TP_PLAN}" was given to a process that torchrun did not start '
            f"({', '.join(missing)} not in its environment): expected one process a shard; run "
            "torchrun --nproc-per-node SHARDS with the same script or command"
        )
    device = device_of_rank()
    if device.type == "cpu":
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    else:
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=_TIMEOUT, device_id=device)
    atexit.register(_leave_ranks)


def rank_0_loads(loads: bool = True) -> bool:
    """Whether rank 0 loads a scorer, or has no use for one; all ranks ask together.

    Raises ValueError: torchrun did not start this process.
    """
    join_ranks()
    said = torch.tensor(int(loads), device=device_of_rank())
    dist.broadcast(said, 0)
    return bool(said)


def device_of_rank() -> torch.device:
    """The device on which transformers puts this rank's shard."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def loading_arguments(sharded: Shards) -> dict[str, Any]:
    """What `from_pretrained` takes to load this rank's shard, when all ranks are about to."""
    from transformers.distributed import DistributedConfig

    # transformers makes groups of the ranks, for which all of them have to come.
    sharded.agree()
    return {"distributed_config": DistributedConfig(tp_plan=TP_PLAN)}


def check_divides(source: Source, shards: int) -> None:
    """Raises ValueError: the model of these files cannot be cut into so many shards."""
    config = source.config
    if source.adapter is not None:
        raise _refused_adapter(source.name)
    if source.is_gguf:
        raise ValueError(
            f'{source.name} is a GGUF file, which tp_plan="{TP_PLAN}" does not cut: drop tp_plan, '
            "or pass the checkpoint that the file was converted from"
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f'{source.name} is quantised: tp_plan="{TP_PLAN}" shards full-precision weights only; '
            "drop tp_plan, or pass the checkpoint before quantisation"
        )
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(
            f"{source.name} is a {config.model_type}, for which transformers has no "
            "tensor-parallel plan: expected an architecture with one (Llama, Mistral, Qwen2, ...); "
            "drop tp_plan"
        )
    if "colwise" not in plan.values():
        # Its attention is whole on every rank.
        return
    heads = config.num_attention_heads
    counts = {
        "attention heads": heads,
        "key-value heads": getattr(config, "num_key_value_heads", None) or heads,
    }
    for what, count in counts.items():
        if count % shards:
            divisors = [n for n in range(2, count + 1) if all(c % n == 0 for c in counts.values())]
            fitting = f"{', '.join(map(str, divisors))} processes" if divisors else "one process"
            raise ValueError(
                f"{source.name} has {count} {what}, which {shards} processes cannot share evenly: "
                f"run torchrun with --nproc-per-node of {fitting}"
            )


def check_vocabulary_divides(source: Source, shards: int) -> None:
    """Raises ValueError: a language model's output layer cannot be cut into so many shards."""
    vocab = source.config.vocab_size
    if vocab % shards:
        raise ValueError(
            f"{source.name} has a vocabulary of {vocab} tokens, which the output layer of {shards} "
            "processes cannot share evenly: run torchrun with another --nproc-per-node"
        )


def check_spans_ranks(model: PreTrainedModel, name: str, shards: int) -> None:
    """Raises ValueError: a model in memory is sharded over some of the processes only."""
    mesh = shard_mesh(model)
    if mesh is not None and mesh.size() != shards:
        raise ValueError(
            f"{name} is sharded over {mesh.size()} of {shards} processes: expected all of them; "
            "start as many as it has shards"
        )


def check_copied(source: Source, dtype: torch.dtype | None) -> None:
    """Raises ValueError: a sharded model in memory in another dtype, or with adapters in it."""
    model = source.instance
    assert model is not None
    if shard_mesh(model) is None:
        return
    if dtype not in (None, model.dtype):
        raise ValueError(
            f"dtype={str(dtype)[6:]} came with a {type(model).__name__} in memory, which is "
            f"sharded in {str(model.dtype)[6:]}: expected none; load it in the one you want"
        )
    if has_adapters(model):
        raise _refused_adapter(source.name)


def _refused_adapter(name: str) -> ValueError:
    return ValueError(
        f"{name} has a PEFT adapter, of which no rank has a shard: tensor parallelism takes whole "
        "checkpoints only; merge it into its base (PEFT's merge_and_unload), and save and pass that"
    )


def _leave_ranks() -> None:
    """What torch asks of who made its default group; followers are told before."""
    close_all()
    if dist.is_initialized():
        dist.destroy_process_group()
