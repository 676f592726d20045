"""Loading what commands are given by name: policies, scorers, and which goes with which."""

from __future__ import annotations

import difflib
import os
import re
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from guided_decode.checkpoints.registry import REGISTRY, Record, find
from guided_decode.cli.errors import Refusal, one_line
from guided_decode.cli.judge_options import pooling_urls
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.quiet import quieten_libraries
from guided_decode.cli.remote_options import RemoteOptions
from guided_decode.scoring.remote.address import is_address

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from guided_decode.scorer import Scorer

NOT_REMOTE = RemoteOptions()
# What may have been meant as a scorer server's address.
_ADDRESS = re.compile(r"(?:zmq://)?([\w.-]+:\d+)")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_POLICY, DEFAULT_SCORER = "tiny-tulu-sft", "tiny-tulu-value"


@dataclass(frozen=True, slots=True)
class Policy:
    """A causal LM of transformers that is decoded, with its tokenizer and its registry entry."""

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    record: Record | None


def pair(policy: str | None, scorer: str | None, *, head: str | None = None) -> tuple[str, str]:
    """Policy and scorer, each found through the registry where only the other is given.

    With a head on the policy's hidden states, the policy is the scorer.

    Raises Refusal: no model is called so, or the registry knows no partner of it.
    """
    for name in (policy, scorer):
        if name is not None and not is_address(name) and not pooling_urls(name):
            location(name)
    if head is not None:
        policy = policy or scorer or DEFAULT_POLICY
        return policy, scorer or policy
    if policy is None and scorer is None:
        return DEFAULT_POLICY, DEFAULT_SCORER
    if policy is None:
        assert scorer is not None
        if is_address(scorer):
            raise Refusal(f"--scorer {scorer} is a server, which does not say whose critic it "
                          "serves: pass --policy")  # fmt: skip
        record = find(scorer)
        if record is None or record.policy is None:
            raise Refusal(f"--scorer {scorer} is paired with no policy in the registry: "
                          "pass --policy")  # fmt: skip
        return record.policy, scorer
    if scorer is None:
        own = find(policy)
        names = {policy} if own is None else {policy, own.name}
        found = next((r.name for r in REGISTRY if _guides(r, names)), None)
        if found is None:
            raise Refusal(f"--policy {policy} is paired with no scorer in the registry: "
                          "pass --scorer")  # fmt: skip
        return policy, found
    return policy, scorer


def _guides(scorer: Record, policies: set[str]) -> bool:
    """Whether a scorer is paired with a policy of these names.

    The value model of an embedded family serves its reference policy, too.
    """
    if scorer.policy is None or scorer.policy in policies:
        return scorer.policy is not None
    own = find(scorer.policy)
    return own is not None and own.assets is not None and own.reference in policies


def location(name: str) -> str:
    """What `from_pretrained` takes for a folder, a registered name or a Hub id (owner/name).

    Raises Refusal for what is none of these. That a Hub id exists shows only when it is loaded.
    """
    record = find(name)
    if Path(name).is_dir() or (name.endswith(".gguf") and Path(name).is_file()):
        return _quieten(name)
    if (host := _ADDRESS.fullmatch(name)) and not Path(name).exists():
        raise Refusal(f"{name}: no such model; the address of a scorer server is written "
                      f"tcp://{host[1]}")  # fmt: skip
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise Refusal(f"{name}: no such folder")
    if record is None and "/" not in name:
        close = difflib.get_close_matches(name, [one for r in REGISTRY for one in r.names], n=1)
        raise Refusal(
            f"{name}: unknown model{f' (did you mean {close[0]}?)' if close else ''}; expected a "
            "folder, a name that guided-decode models lists, or a Hub id, OWNER/NAME"
        )
    return _quieten(name if record is None else record.location)


def load_policy(
    name: str,
    device: str | None,
    dtype: str,
    *,
    adapter: str | None = None,
    trust_remote_code: bool = False,
) -> Policy:
    """A policy and its tokenizer, in eval mode. Raises Refusal where they cannot be loaded.

    adapter: a PEFT adapter of it or on it.
    """
    from transformers import AutoModelForCausalLM

    where, to = location(name), pick_device(device)
    torch_dtype = parse_dtype(dtype)
    try:
        model = _adapted_policy(where, adapter, torch_dtype, trust_remote_code)
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(
                where, dtype=torch_dtype or "auto", trust_remote_code=trust_remote_code
            )
        model.to(to).eval()
    except (ImportError, ValueError) as error:
        if adapter is not None or isinstance(error, ImportError):
            raise
        raise _cannot_load(f"policy {name}", error) from error
    except Exception as error:
        # Parsers of damaged files raise what they like.
        raise _cannot_load(f"policy {name}", error) from error
    tokenizer = load_tokenizer(
        name, f"policy {name}", adapter=adapter, trust_remote_code=trust_remote_code
    )
    return Policy(name, model, tokenizer, find(name))


def _adapted_policy(
    where: str, adapter: str | None, dtype: torch.dtype | None, trust_remote_code: bool
) -> Any:
    """The base of a PEFT adapter with the adapter in it; None where there is no adapter."""
    from guided_decode.checkpoints.adapted import Adapted
    from guided_decode.checkpoints.adapter_files import adapter_of
    from guided_decode.checkpoints.source import open_source
    from guided_decode.checkpoints.trunk import load_decoded

    if adapter_of(where, None, None if adapter is None else (adapter,)) is None:
        return None
    given = where if adapter is None else Adapted(where, adapter)
    return load_decoded(open_source(given, trust_remote_code=trust_remote_code), dtype)


def load_tokenizer(
    name: str,
    what: str,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, padding on the left. Raises Refusal where it has none."""
    from transformers import AutoTokenizer

    from guided_decode.checkpoints.tokenizer_files import tokenizer_home, tokenizer_place

    home, revision = tokenizer_home(location(name), revision, adapter)
    try:
        where, given = tokenizer_place(home, revision, gguf_file)
        tokenizer = AutoTokenizer.from_pretrained(
            where,
            **given,
            padding_side="left",
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        raise _cannot_load(f"the tokenizer of {what}", error) from error
    if tokenizer.pad_token_id is None:
        # Padding is masked, so any id does; only the tokenizer insists on a name.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def open_scorer(
    name: str,
    options: ScorerOptions,
    *,
    device: str | None = None,
    dtype: str = "auto",
    policy: Policy | None = None,
    remote: RemoteOptions = NOT_REMOTE,
) -> Scorer:
    """`load_scorer` of a name that a command was given.

    policy: whose decoding it guides; a head on this one's hidden states shares its weights.
    remote: how its server is met, where the name is an address; device and dtype are the server's.
    """
    if pooling_urls(name):
        raise Refusal(f"{name}: a pooling server reads a text anew at each call, so that only "
                      "guided-decode search asks it, about pieces; serve the scorer with "
                      "guided-decode scorer, or pass its name")  # fmt: skip
    if not is_address(name):
        location(name)
    for other in (options.reward, options.reference, options.head):
        if other is not None and not Path(other).is_file():
            location(other)
    # After that has quietened what transformers imports.
    if options.tp_plan is not None and not _rank_0_loads(True):
        raise typer.Exit
    from guided_decode import load_scorer
    from guided_decode.checkpoints.loading import UnknownPolicyWarning

    placed: dict[str, Any] = {}
    if not is_address(name):
        # A device map says where all goes, and a shard has a device of its own.
        placed_otherwise = options.device_map is not None or options.tp_plan is not None
        on = device if placed_otherwise else pick_device(device)
        placed = {"device": on, "dtype": parse_dtype(dtype)}
    model: Any = name
    given = options.given()
    shared = policy is not None and policy.model is not None and name == policy.name
    if policy is not None and options.head is not None and shared:
        # With its adapter in it, where it has one.
        model, placed = policy.model, {}
        given.pop("adapter", None)
    tokenizer = None if policy is None else policy.tokenizer
    try:
        with warnings.catch_warnings():
            # A command that names no policy guides none.
            warnings.simplefilter("ignore", UnknownPolicyWarning)
            return load_scorer(model, policy_tokenizer=tokenizer, **placed, **given,
                               **remote.given())  # fmt: skip
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        asked = options.cache_tokens
        room = "" if asked is None else f" with --cache-tokens {asked}"
        raise _cannot_load(f"scorer {name}{room}", error) from error


def known_as(scorer: Scorer, given: str) -> str:
    """What the registry may know a scorer as: a server says what it serves."""
    described = getattr(scorer, "described", None)
    return given if described is None else str(described.scorer.name)


def follow_if_not_leading(name: str, options: ScorerOptions, dtype: str) -> None:
    """On a rank of torchrun's that leads no sharded scorer, follows the one that does, and exits.

    Elsewhere it does nothing: the command goes on, and `open_scorer` loads the leader's part.

    Raises Refusal: the leader is gone, or the ranks are out of step.
    """
    if options.tp_plan is None or os.environ.get("RANK", "0") == "0":
        return
    follower: Any = open_scorer(name, options, dtype=dtype)
    from guided_decode.forward.ranks import ShardError

    # torchrun hands both on to all ranks: the leader ends what it has in work, and then this one.
    handled = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        follower.follow()
    except ShardError as error:
        raise Refusal(str(error)) from error
    finally:
        for one, handler in handled.items():
            signal.signal(one, handler)
    raise typer.Exit


def open_none(options: ScorerOptions) -> None:
    """What the leader calls in the place of `open_scorer` where nothing is left to score: the other
    ranks of torchrun's, which wait for it, exit."""
    if options.tp_plan is not None:
        _rank_0_loads(False)


def _rank_0_loads(loads: bool) -> bool:
    if "RANK" not in os.environ:
        # There are no others; `load_scorer` says what a plan needs.
        return loads
    from guided_decode.checkpoints.tensor_parallel import rank_0_loads

    return rank_0_loads(loads)


def parse_dtype(dtype: str) -> torch.dtype | None:
    """The torch dtype of a name; None for "auto", the checkpoint's own."""
    import torch

    if dtype not in DTYPES:
        raise Refusal(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    chosen: torch.dtype | None = None if dtype == "auto" else getattr(torch, dtype)
    return chosen


def pick_device(device: str | None) -> str:
    """The device to load to: what was asked for, else a GPU where there is one.

    Raises Refusal where torch cannot use it.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"--device {device} cannot be used: {one_line(error)}") from error
    return device


def _quieten(where: str) -> str:
    """Leaves the terminal to the command: no warnings, and bars only where something downloads."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    quieten_libraries()
    if Path(where).is_dir():
        transformers_logging.disable_progress_bar()
    return where


def _cannot_load(what: str, error: Exception) -> Refusal:
    """One line on a load that failed: the library's first sentence says why."""
    reason = one_line(error).split(". ")[0]
    if isinstance(error, KeyError):
        reason = f"one of its files lacks {reason}"
    return Refusal(f"cannot load {what}: {reason}")
