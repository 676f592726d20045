"""From names to planned models: the registry, or a config.json; nothing is loaded or fetched."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from guided_decode.checkpoints.plan.model import PlannedModel
from guided_decode.checkpoints.plan.shape_of_config import read_config
from guided_decode.checkpoints.plan.stored_weights import StoredWeights, stored_weights
from guided_decode.checkpoints.plan.weight_forms import FORMS
from guided_decode.checkpoints.registry import POLICIES, REGISTRY, find

_CAUSAL_LM = ("ForCausalLM", "LMHeadModel")
_SEQUENCE, _TOKEN = "ForSequenceClassification", "ForTokenClassification"
IMPLICIT, TRUNK_HEAD = "implicit", "trunk-head"
# What files of the same weights may differ by: a head that lies beside them, a buffer.
_TOLERANCE = 0.01


def planned_policy(name: str) -> PlannedModel:
    """A causal LM by its name.

    Raises ValueError: nothing is known under the name, or it is another class of model.
    """
    model = _described(name)
    if model.architecture and not model.architecture.endswith(_CAUSAL_LM):
        raise ValueError(
            f"{name} is a {model.architecture}: a policy is a causal LM; give the scorer second"
        )
    return _as(model, lm_head=True, labels=0)


def planned_scorer(
    name: str, kind: str | None = None, reference: str | None = None
) -> tuple[str, tuple[PlannedModel, ...]]:
    """(kind, the models that it loads): a critic or reward model, or an implicit reward's two.

    Args:
        name: a registered name, a folder or a config.json.
        kind: as `load_scorer` takes it; None and "auto" go by the registry and the class.
        reference: of an implicit reward; None is the registry's.

    Raises ValueError: nothing is known under a name, or it is not known what kind of scorer it is.
    """
    model, record = _described(name), find(name)
    kind = _kind(model, kind, reference)
    if kind == TRUNK_HEAD:
        raise ValueError(
            f"kind={kind!r} is a head on the policy's own hidden states, which brings no second "
            "model: there is nothing to place beside the policy"
        )
    if kind != IMPLICIT:
        # Of a language model some rows of its head are read, as many as there are labels.
        labels = model.labels or (1 if record is None else record.head_labels)
        return kind, (_as(model, lm_head=False, labels=labels),)
    reference = reference or (None if record is None else record.reference)
    if reference is None:
        raise ValueError(
            f"{name} is an implicit reward, log π* − log π_ref, but no reference came with it: "
            "pass reference=, the model that its training started from"
        )
    return kind, (planned_policy(name), planned_policy(reference))


def _as(model: PlannedModel, *, lm_head: bool, labels: int) -> PlannedModel:
    bias = bool(labels) and (model.head_bias or model.architecture.endswith(_TOKEN))
    return replace(model, lm_head=lm_head, labels=labels, head_bias=bias)


def _kind(model: PlannedModel, given: str | None, reference: str | None) -> str:
    if given not in (None, "auto"):
        # The families' value transforms are torch's.
        from guided_decode.checkpoints.families import find_family

        assert given is not None
        return find_family(given).kind
    if model.kind is not None:
        return model.kind
    if model.architecture.endswith(_SEQUENCE) and model.labels == 1:
        return "reward-model"
    if reference is not None:
        return IMPLICIT
    raise ValueError(
        f"{model.name} ({model.architecture or 'no class named'}) does not say what kind of scorer "
        "it is: pass kind=, as load_scorer takes it, or reference= for an implicit reward"
    )


def _described(name: str) -> PlannedModel:
    """A model by its name, with the class and the shape that the registry or its config has."""
    path, record = Path(name), find(name)
    kind = None if record is None else record.kind
    if path.is_dir():
        model = _of_config(name, path / "config.json")
        return model if kind is None else replace(model, kind=kind)
    if path.is_file():
        if path.suffix != ".json":
            raise ValueError(f"{name} is a file: expected a folder, a config.json or a known name")
        return _of_config(name, path)
    if record is not None:
        return PlannedModel(
            record.name, record.architecture, record.shape, False, record.labels,
            head_bias=record.head_bias, kind=kind, inner_weights=record.inner_weights,
        )  # fmt: skip
    known = {one: full for full in POLICIES for one in (full, full.rpartition("/")[2])}
    if name in known:
        return PlannedModel(known[name], "", POLICIES[known[name]], True)
    raise ValueError(_unknown(name, list(known)))


def _unknown(name: str, policies: list[str]) -> str:
    if name.startswith(("tcp://", "ipc://")):
        return f"{name} is a scorer server: give the model that it serves"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"{name}: no such folder"
    names = [*policies, *(one for record in REGISTRY for one in record.names)]
    close = difflib.get_close_matches(name, names, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    if "/" in name:
        return (
            f"{name} is not in the registry{meant}, and a plan fetches nothing: give a folder with "
            f"its config.json (hf download {name} config.json --local-dir FOLDER)"
        )
    return (
        f"{name}: unknown model{meant}; expected a name "
        "that guided-decode models lists, or a folder with a config.json"
    )


def _of_config(name: str, path: Path) -> PlannedModel:
    if not path.is_file():
        if (path.parent / "adapter_config.json").is_file():
            raise ValueError(f"{name} is an adapter: give its base model, whose size it has")
        raise ValueError(f"{name} has no config.json: expected what save_pretrained writes")
    config = read_config(path)
    model = PlannedModel(
        name,
        config.architecture,
        config.shape,
        lm_head=False,
        labels=config.labels,
        positions=config.positions,
        kind=config.kind,
    )
    files = stored_weights(path.parent)
    if config.quantised is not None:
        return _quantised(model, path, config.quantised, files)
    note = None if files is None else _disagreement(model, files)
    return model if note is None else replace(model, note=note)


def _disagreement(model: PlannedModel, files: StoredWeights) -> str | None:
    """What is odd about the number of weights in the files; None: nothing."""
    trunk = model.shape.parameters(lm_head=False)
    # With a language-model head or without it, whichever class reads them.
    likely = (trunk, trunk + model.shape.table)
    if any(abs(files.weights - count) <= _TOLERANCE * count for count in likely):
        return None
    return (
        f"{model.name}: its safetensors hold {files.weights:,} weights where its config.json makes "
        f"{trunk:,} and a head: they do not belong together"
    )


def _quantised(
    model: PlannedModel, path: Path, how: Mapping[str, Any], files: StoredWeights | None
) -> PlannedModel:
    """A model that is quantised already: its files' bytes, else what its method makes of them."""
    method = str(how.get("quant_method", "method unknown"))
    if files is not None:
        return replace(model, stored=method, stored_bytes=files.bytes)
    form = next((f"bnb-{n}bit" for n in (4, 8) if how.get(f"load_in_{n}bit")), None)
    if form is None:
        raise ValueError(
            f"{path} says that its weights are quantised ({method}), and no safetensors lie beside "
            "it: give the whole folder, whose files' bytes are counted"
        )
    counted = replace(model, lm_head=not model.labels).weight_bytes(FORMS[form])
    return replace(model, stored=form, stored_bytes=counted)
