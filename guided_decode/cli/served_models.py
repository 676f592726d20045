"""What would keep a scorer from being served, found before vLLM loads anything."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guided_decode.checkpoints.adapter_files import ADAPTER_CONFIG, base_of
from guided_decode.cli.checkpoints import location
from guided_decode.cli.errors import Refusal, one_line
from guided_decode.cli.run_identity import adapter_home
from guided_decode.cli.served_guidance import chosen_settings
from guided_decode.cli.vllm_options import VllmOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from guided_decode.checkpoints.examination import Examined
    from guided_decode.integrations.vllm.server_config import ServerConfig


def examined(
    policy: str, given: Mapping[str, Any], options: VllmOptions, *, only_here: bool
) -> dict[str, Any]:
    """The server's configuration; with the scorer's kind where "auto" hides what requests are
    refused by: the front end sees no checkpoint.

    Args:
        policy: its name.
        given: the value of additional_config["guided_decode"], which `parse_config` takes.
        options: vLLM's.
        only_here: look at folders on this machine alone, and download nothing.

    Raises Refusal or ValueError: what the worker would refuse once all is loaded, but for what only
    shows in the weights.
    """
    from guided_decode.integrations.vllm.server_config import parse_config

    config = parse_config(given, "the configuration")
    _check_device(config.device)
    for place in (config.device_map or {}).values() if isinstance(config.device_map, dict) else ():
        _check_device(place)
    _check_value_log(config.value_log)
    known = _is_known(policy, only_here=only_here)
    vocab = _check_policy(policy, config, options) if known else None
    if config.is_trunk_head:
        return dict(given)
    if config.is_remote:
        # Of a dry run nobody is asked.
        if only_here:
            return dict(given)
        found, name = _meet_server(config, _policy_tokenizer(policy, options) if known else None)
        settings = chosen_settings(name, given.get("rule")) | dict(given)
        _check_sizes(parse_config(settings, "the configuration"), found, vocab)
        return {**settings, "kind": found.kind} if found.kind == "implicit" else settings
    if Path(config.scorer).is_file() and not config.scorer.endswith(".gguf"):
        raise Refusal(
            f"{config.scorer} is a file: expected a folder, a registered name or a Hub id; a head "
            "on the policy's own hidden states is served with --kind trunk-head"
        )
    names = [config.scorer, config.reward, config.reference]
    if config.adapter is not None and not Path(config.adapter).is_absolute():
        names.append(adapter_home(config.scorer, config.adapter))
    if not all(_is_known(name, only_here=only_here) for name in names if name is not None):
        kind = _recorded_kind(config)
    else:
        tokenizer = _policy_tokenizer(policy, options) if known else None
        kind = _check_scorer(config, vocab, tokenizer)
    return {**given, "kind": kind} if kind == "implicit" else dict(given)


def _is_known(name: str, *, only_here: bool) -> bool:
    """Whether a model may be looked at: of an adapter also the base."""
    where = location(name)
    if not only_here or not Path(where).exists():
        return not only_here
    base = base_of(where)
    # What is no model is named by who reads it.
    return base is None or Path(base).is_absolute() or _is_known(base, only_here=True)


def _recorded_kind(config: ServerConfig) -> str:
    """The kind that was given, or that the registry knows of a scorer that is not here."""
    from guided_decode.checkpoints.registry import find

    record = find(config.scorer)
    return config.kind if config.kind != "auto" or record is None else record.kind or "auto"


def _check_scorer(
    config: ServerConfig, vocab: int | None, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """The scorer's kind."""
    from guided_decode.checkpoints.examination import examine_scorer

    names = ("kind", "adapter", "reward", "reference", "bos", "terminal", "transform", "rope_theta",
             "revision", "allow_pickle", "trust_remote_code", "quantization",
             "gguf_file")  # fmt: skip
    how = {name: getattr(config, name) for name in names}
    found = _in_one_line(
        f"scorer {config.scorer}",
        lambda: examine_scorer(config.scorer, policy_tokenizer=tokenizer, **how),
    )
    _check_sizes(config, found, vocab)
    kind: str = found.kind
    return kind


def _meet_server(
    config: ServerConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Examined, str]:
    """What a scorer server serves, and its name; the worker meets it again.

    Raises ValueError or OSError: no server is there, or its scorer does not fit.
    """
    from guided_decode.checkpoints.examination import Examined
    from guided_decode.checkpoints.loading import UnknownPolicyWarning, load_scorer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownPolicyWarning)
        scorer: Any = load_scorer(
            config.scorer, config.kind, dtype=config.dtype, bos=config.bos,
            terminal=config.terminal, transform=config.transform, policy_tokenizer=tokenizer,
            key_file=config.key_file, timeout=config.timeout,
        )  # fmt: skip
    scorer.close()
    if config.kl_coef and scorer.reference is None:
        raise Refusal(
            f"kl_coef={config.kl_coef:g} was given, but the scorer at {config.scorer} has no "
            "reference model: start its server with --reference"
        )
    served = scorer.described.scorer
    return Examined(served.kind or config.kind, scorer.vocab_size), served.name


def _check_sizes(config: ServerConfig, found: Examined, vocab: int | None) -> None:
    if config.top_k is None and found.kind != "implicit":
        raise Refusal(
            f"top_k=null was given with a {found.kind}, which forwards every candidate: set top_k "
            "(the whole vocabulary is for implicit rewards only)"
        )
    most = config.max_top_k if vocab is None else min(config.max_top_k, vocab)
    if found.vocab_size < most:
        raise Refusal(
            f"max_top_k={most} is larger than the scorer's vocabulary of "
            f"{found.vocab_size} tokens: set a smaller one"
        )
    if vocab is not None and config.top_k is not None and config.top_k > vocab:
        raise Refusal(
            f"top_k={config.top_k} is larger than the policy's vocabulary of {vocab} tokens"
        )


def _check_policy(policy: str, config: ServerConfig, options: VllmOptions) -> int | None:
    """The policy's vocabulary; None where vLLM reads its config from elsewhere.

    Raises Refusal: a file that did not arrive whole, or a head of another policy.
    """
    from guided_decode.checkpoints.arrival import opened_safetensors
    from guided_decode.checkpoints.examination import read_config
    from guided_decode.checkpoints.trunk_head_loading import read_trunk_head
    from guided_decode.integrations.vllm.server_config import head_options
    from guided_decode.integrations.vllm.trunk_tap import check_fits

    where = location(policy)
    if Path(where).is_dir():
        for file in sorted(Path(where).glob("*.safetensors")):
            with opened_safetensors(file):
                # Its header says whether it arrived whole.
                pass
    if Path(where, ADAPTER_CONFIG).is_file():
        raise Refusal(
            f"{policy} is a PEFT adapter, which vLLM serves on its base only: pass its base as "
            f"POLICY with --enable-lora --lora-modules NAME={where}"
        )
    if not config.is_trunk_head and options.has("--hf-config-path", "--config-format"):
        return None
    text = read_config(where, **_of_policy(options)).get_text_config()
    if config.is_trunk_head:
        head = _in_one_line(
            f"head {config.scorer}",
            lambda: read_trunk_head(config.scorer, **head_options(config)),
        )
        check_fits(head, config.scorer, text, policy)
    return int(text.vocab_size)


def _policy_tokenizer(policy: str, options: VllmOptions) -> PreTrainedTokenizerBase | None:
    """The tokenizer that vLLM will take; None where it is told to take none."""
    from transformers import AutoTokenizer

    if options.has("--skip-tokenizer-init"):
        return None
    own = options.values("--tokenizer")
    revision = options.values("--tokenizer-revision") or options.values("--revision")
    return _in_one_line(
        f"tokenizer of the policy {policy}",
        lambda: AutoTokenizer.from_pretrained(
            own[0] if own else location(policy),
            **_of_policy(options) | ({"revision": revision[0]} if revision else {}),
        ),
    )


def _of_policy(options: VllmOptions) -> dict[str, Any]:
    revision = options.values("--revision")
    return {
        "revision": revision[0] if revision else None,
        "trust_remote_code": options.has("--trust-remote-code"),
    }


def _in_one_line(what: str, read: Any) -> Any:
    """What is read; libraries raise what they like of files that are wrong."""
    try:
        return read()
    except (ValueError, Refusal, KeyboardInterrupt):
        raise
    except Exception as error:
        raise Refusal(f"the {what} cannot be read: {one_line(error)}") from error


def _check_device(device: str | int | None) -> None:
    import torch

    if device is None:
        return
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise Refusal(f"device={device!r} is none: {one_line(error)}") from None
    # Counted by the driver: a context of ours would take memory of the GPU while vLLM serves.
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise Refusal(
            f"device={device!r} cannot be used: torch sees {torch.cuda.device_count()} GPUs"
        )
    if chosen.type == "meta":
        raise Refusal(f"device={device!r} cannot be used: it holds no weights")


def _check_value_log(given: str | None) -> None:
    if given is None:
        return
    path = Path(given)
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "no permission"
    else:
        return
    raise Refusal(f"value_log={given!r} cannot be written: {reason}")
