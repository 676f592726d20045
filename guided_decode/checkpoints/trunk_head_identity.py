"""Whether a head was trained on the policy's own trunk, as far as that can be told."""

import hashlib
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from guided_decode.checkpoints.adapter_layers import has_adapters
from guided_decode.scoring.trunk_head import TrunkRecord

# Elements of each weight that a fingerprint reads.
_PROBES = 64
# Their values agree after rounding to bf16, whichever of the two a checkpoint was loaded in.
_COMPARABLE = (torch.float32, torch.bfloat16)


def record_trunk(trunk: PreTrainedModel, name: str) -> TrunkRecord:
    """What a head file says of the trunk that its head was trained on."""
    config = trunk.config.get_text_config()
    return TrunkRecord(
        name=name,
        model_type=str(config.model_type),
        hidden_size=int(config.hidden_size),
        num_hidden_layers=int(config.num_hidden_layers),
        vocab_size=int(config.vocab_size),
        fingerprint=fingerprint(trunk),
    )


def fingerprint(trunk: nn.Module) -> str | None:
    """A digest of evenly spread elements of every weight, rounded to bf16.

    None where it would depend on how the checkpoint was loaded: weights that are neither float32
    nor bf16, or adapters that are not merged.
    """
    if has_adapters(trunk):
        return None
    digest = hashlib.sha256()
    for name, weight in sorted(trunk.named_parameters()):
        if weight.dtype not in _COMPARABLE:
            return None
        digest.update(f"{name} {list(weight.shape)}".encode())
        flat = weight.detach().reshape(-1)
        at = torch.linspace(0, len(flat) - 1, min(_PROBES, len(flat)), dtype=torch.float64)
        probes = flat[at.long().to(flat.device)].to(torch.bfloat16).cpu()
        digest.update(probes.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def check_recorded(
    trunk: PreTrainedModel, policy: str, recorded: TrunkRecord, head: str, *, exact: bool = True
) -> None:
    """Raises ValueError: the head file names another trunk than the policy's.

    exact: False for a trunk that was quantised, of which only the sizes are compared.
    """
    own = record_trunk(trunk, policy)
    fields = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    for field in fields:
        theirs, ours = getattr(recorded, field), getattr(own, field)
        if theirs != ours:
            raise ValueError(
                f"{head} was trained on {recorded.name}, whose {field} is {theirs}, but the policy "
                f"{policy} has {ours}: a head reads the hidden states of one trunk only; pass the "
                "policy that it was trained on, or train a head for this one (recipes.trunk_head)"
            )
    if (
        exact
        and None not in (recorded.fingerprint, own.fingerprint)
        and (recorded.fingerprint != own.fingerprint)
    ):
        raise ValueError(
            f"{head} was trained on {recorded.name}, whose weights are not those of the policy "
            f"{policy} (fingerprint {recorded.fingerprint} against {own.fingerprint}): pass that "
            "policy, train a head for this one (recipes.trunk_head), or pass the head's tensors "
            "themselves if you know that they fit"
        )


def check_same_weights(
    trunk: PreTrainedModel,
    policy: str,
    names: Collection[str],
    read: Callable[[str], Tensor],
    head: str,
) -> None:
    """Holds the last layer and what follows it to the trunk that comes with a head.

    Training a head together with its trunk changes these. A checkpoint that holds none of them is
    taken as it is.

    Args:
        trunk: the policy's.
        policy: its name, for errors.
        names: the tensors of the checkpoint that has the head.
        read: one of them.
        head: the checkpoint's name.

    Raises:
        ValueError: a weight is missing or differs.
    """
    own = _last_weights(trunk)
    theirs = {name: _find(name, names) for name in own}
    if not any(theirs.values()):
        return
    for name, weight in own.items():
        stored = theirs[name]
        if stored is None:
            raise ValueError(
                f"{head} lacks {name}, which the policy {policy} has: its head was trained on "
                "another trunk; pass the policy that it was trained on"
            )
        other = read(stored).to(weight.device)
        if other.shape != weight.shape or not _agree(weight, other):
            raise ValueError(
                f"{head} has another {stored} than the policy {policy}: its head reads its own "
                'trunk; load it as a critic (kind="value-head", "verl-critic" or "ppo-critic"), or '
                "pass the policy that shares its trunk"
            )


def check_same_adapter(
    trunk: nn.Module, policy: str, adapter: Mapping[str, Tensor], head: str
) -> None:
    """Holds a trunk with an adapter in its layers to the adapter that a head comes with.

    Args:
        trunk: the policy's.
        policy: its name, for errors.
        adapter: the adapter's weights, by the names that PEFT gives them in a file.
        head: the name of what has both.

    Raises:
        ValueError: the trunk has no such adapter in it, or other weights.
    """
    own: dict[str, Tensor] = {}
    for name, weight in trunk.named_parameters():
        parts = name.split(".")
        # In memory the adapter's name stands last, or before the name of its weight.
        for at in (len(parts) - 1, len(parts) - 2):
            own[".".join([*parts[:at], *parts[at + 1 :]])] = weight
    for name, theirs in adapter.items():
        _, _, short = name.partition(".")
        ours = own.get(name, own.get(short))
        if ours is None or ours.shape != theirs.shape or not _agree(ours, theirs.to(ours.device)):
            raise ValueError(
                f"{head} is a head on its base with an adapter in it, which the policy {policy} "
                f"has not ({name}): pass the same adapter as the policy, or this one as a critic "
                "of its own, without head="
            )


def _last_weights(trunk: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of the last layer, and of what is no layer but the embeddings."""
    last = trunk.config.get_text_config().num_hidden_layers - 1
    found = {}
    for name, weight in trunk.named_parameters():
        parts = name.split(".")
        in_layer = next((int(part) for part in parts if part.isdigit()), None)
        if in_layer == last or (in_layer is None and "embed" not in name):
            found[name] = weight.detach()
    return found


def _find(name: str, names: Collection[str]) -> str | None:
    """A trunk's weight under the name that a model with a head gives it."""
    return next((each for each in names if each == name or each.endswith(f".{name}")), None)


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    dtypes = {ours.dtype, theirs.dtype}
    if dtypes <= set(_COMPARABLE):
        return torch.equal(ours.bfloat16(), theirs.bfloat16())
    return torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-3)
