"""`load_scorer`: a checkpoint, read as its trainer read it, ready to score candidates."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from guided_decode.checkpoints.adapted import Adapted, is_in_memory
from guided_decode.checkpoints.checkpoint import load_causal_lm
from guided_decode.checkpoints.critic_loading import load_critic, load_trunk_scorer
from guided_decode.checkpoints.families import BosRule
from guided_decode.checkpoints.head_beside import with_head_beside
from guided_decode.checkpoints.kinds import choose_family
from guided_decode.checkpoints.loading_options import (
    LoadingOptions,
    Tokenizer,
    check_tokenizer,
    options_for,
    options_of_companions,
    packed_model,
    read_tokenizer,
)
from guided_decode.checkpoints.placement import DeviceMapLike, first_device, read_device_map
from guided_decode.checkpoints.precision import (
    Device,
    DType,
    read_device,
    read_dtype,
    settled_dtype,
)
from guided_decode.checkpoints.quantization import (
    QuantizationLike,
    check_device,
    read_quantization,
)
from guided_decode.checkpoints.remote_loading import is_remote, load_remote
from guided_decode.checkpoints.source import ModelLike, Source, open_source
from guided_decode.checkpoints.special_ids import first, special_token
from guided_decode.checkpoints.step_loading import load_step_scorer, refuse_steps
from guided_decode.checkpoints.tensor_parallel import device_of_rank, open_shards
from guided_decode.checkpoints.tokenizer_files import load_tokenizer
from guided_decode.checkpoints.trunk_head_loading import HeadLike
from guided_decode.checkpoints.trunk_policy import with_own_policy
from guided_decode.forward.follower import Follower
from guided_decode.forward.modes import without_autograd
from guided_decode.scorer import LogProbs, Scorer, TerminalRule
from guided_decode.scoring.implicit import ImplicitScorer
from guided_decode.scoring.transforms import Transform
from guided_decode.scoring.trunk_head import KIND as TRUNK_HEAD

FORWARD_TOKENS = 8192


class UnknownPolicyWarning(UserWarning):
    """A scorer was loaded without the tokenizer of the policy that it is to guide."""


@without_autograd
def load_scorer(
    model: ModelLike,
    kind: str = "auto",
    *,
    head: HeadLike | None = None,
    adapter: str | Path | Sequence[str] | None = None,
    reward: "ModelLike | Scorer | None" = None,
    reference: "ModelLike | LogProbs | None" = None,
    device: Device | None = None,
    dtype: DType | None = None,
    cache_tokens: int | None = None,
    live_tokens: int | None = None,
    max_forward_tokens: int = FORWARD_TOKENS,
    bos: BosRule | None = None,
    terminal: TerminalRule | None = None,
    transform: str | Transform | None = None,
    steps: str | None = None,
    aggregate: str | None = None,
    policy_tokenizer: Tokenizer | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    rope_theta: float | None = None,
    quantization: QuantizationLike | None = None,
    gguf_file: str | None = None,
    device_map: DeviceMapLike | None = None,
    tp_plan: str | None = None,
    key_file: str | Path | None = None,
    timeout: float | None = None,
) -> Scorer:
    """A scorer that follows the conventions its checkpoint's trainer used.

    Args:
        model: a registered name, a Hub id, a local path (a GGUF file too), or a transformers model
            in memory, whose weights are then shared and which is not changed. A PEFT adapter's
            folder or Hub id stands for the adapted base, into which it is merged where that is
            exact; a PeftModel for what is active in it; an `Adapted` for a model with a certain
            adapter; a folder of `guided-decode train-critic` with a head for its policy with that
            head. Or the address of a scorer server (`guided-decode scorer`), tcp://HOST:PORT or
            ipc://PATH, which was given the options of loading itself: kind, bos, terminal,
            transform and dtype are then what it has to have.
        kind: the checkpoint family (`guided_decode.checkpoints.families`), or "remote"; "auto"
            decides on positive evidence.
        head: for kind="trunk-head", where `model` is the policy: a value head on its hidden states
            (`trunk_head_loading.load_trunk_head` says in which forms). For a GGUF file of another
            kind: the checkpoint that it was converted from, or a safetensors file with its head.
        adapter: of the model, as of `Adapted`: its name in memory or its folder; None: what the
            model is by itself.
        reward: a reward model that scores responses that end, in the critic's units; implies
            terminal="reward".
        reference: the language model of kl_coef; for kind="implicit" the tuned policy's reference.
        device: where it runs; None is the CPU, or where the given model is.
        dtype: of the weights, "bfloat16" or "bf16", say; None and "auto" keep the checkpoint's, and
            are float32 on a CPU.
        cache_tokens: capacity of each model's prefix cache; None takes a bounded share of memory.
        live_tokens: the most tokens that are live at once; the default of cache_tokens takes no
            more than these.
        max_forward_tokens: the most tokens of one forward.
        bos: "keep" or "drop" one leading BOS; None follows the family.
        terminal: the terminal rule; None follows the family.
        transform: "sigmoid", "softmax:1", "clip:0,1", ...; None follows the family.
        steps: how the steps of a process reward model are marked, a name of
            `guided_decode.checkpoints.steps`; None follows the registry, or its class.
        aggregate: one value of the rewards of all steps: "last", "min", "product" or "mean"; None
            is what its authors do.
        policy_tokenizer: the policy's, or its path: refused where its ids are not the scorer's,
            whose reward model and reference are compared with the scorer where it is missing.
        revision: of the Hub repository.
        allow_pickle: read pickled weights where there are no safetensors.
        trust_remote_code: run code that comes with the checkpoint.
        rope_theta: overrides the config's.
        quantization: of weights that come in full precision, the scorer's and its companions':
            "bnb-4bit", "bnb-8bit", "int8", "int4" or "fp8", or a quantization config of
            transformers; heads stay in full precision. None reads each checkpoint as it is stored.
        gguf_file: which GGUF file of the folder or Hub repository `model` has the weights.
        device_map: instead of a device: "auto" and accelerate's other words, or a dict of modules
            to devices; each layer's cache lies where the layer does. With a dict, companions are
            spread by "auto".
        tp_plan: "auto" shards the weights over the processes that torchrun started, by
            transformers' own plan; all of them call load_scorer alike. Rank 0 gets the scorer; the
            others get a `Follower`, whose `is_leader` is False, and which does its part in
            `follow()` until the scorer is closed.
        key_file: the clients' key file of a scorer server that wants keys.
        timeout: seconds that a scorer server may take for an answer; None is 60.

    Returns:
        A CriticScorer, TrunkScorer, ImplicitScorer, RemoteScorer, or for process reward models,
        which judge responses and guide no tokens, a StepScorer.

    Raises:
        ValueError: what does not fit; names what was given, what was expected and what to do.
        ImportError: the library that reads such weights is not installed.
        ScorerServerError: no scorer server answers at the address.
    """
    if is_remote(model, kind, {"key_file": key_file, "timeout": timeout}):
        if policy_tokenizer is None:
            warn_of_unknown_policy(str(model), calls=1)
        own_forward = None if max_forward_tokens == FORWARD_TOKENS else max_forward_tokens
        return load_remote(
            str(model),
            kind,
            policy_tokenizer=read_tokenizer(policy_tokenizer),
            key_file=key_file,
            timeout=timeout,
            conventions={"bos": bos, "terminal": terminal, "transform": transform},
            dtype=read_dtype(dtype),
            of_server={
                "head": head,
                "adapter": adapter,
                "reward": reward,
                "reference": reference,
                "steps": steps,
                "aggregate": aggregate,
                "device": device,
                "cache_tokens": cache_tokens,
                "live_tokens": live_tokens,
                "max_forward_tokens": own_forward,
                "revision": revision,
                "allow_pickle": allow_pickle,
                "trust_remote_code": trust_remote_code,
                "rope_theta": rope_theta,
                "quantization": quantization,
                "gguf_file": gguf_file,
                "device_map": device_map,
                "tp_plan": tp_plan,
            },
        )
    model, head = with_own_policy(model, kind, head)
    on, spread = read_device(device), read_device_map(device_map, device)
    sharded = open_shards(
        tp_plan,
        model,
        on,
        head=head,
        adapter=adapter,
        quantization=quantization,
        gguf_file=gguf_file,
        device_map=device_map,
    )
    given: dict[str, Any] = {
        "gguf_file": gguf_file,
        "conventions": {"bos": bos, "terminal": terminal, "transform": transform},
        "by_steps": {"steps": steps, "aggregate": aggregate},
    }
    with nullcontext() if sharded is None else sharded.loading():
        if tp_plan is not None and not is_in_memory(model):
            on = device_of_rank()
        if adapter is not None:
            model = Adapted(model, adapter)  # type: ignore[arg-type]
        quantized = read_quantization(quantization)
        target = on if spread is None else first_device(spread)
        options = LoadingOptions(
            device=on,
            dtype=settled_dtype(
                model, target, read_dtype(dtype), None if quantized is None else quantized.dtype
            ),
            revision=revision,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            rope_theta=rope_theta,
            cache_tokens=cache_tokens,
            live_tokens=live_tokens,
            max_forward_tokens=max_forward_tokens,
            policy_tokenizer=read_tokenizer(policy_tokenizer),
            quantization=quantized,
            device_map=spread,
            sharded=sharded,
        )
        if quantized is not None:
            check_device(quantized, target, options.dtype)
        scorer = _load(model, kind, head, reward, reference, options, **given)
    if sharded is None or sharded.leads:
        return scorer
    # Not a scorer, and says so: its rank has no tree, and does nothing but follow.
    return cast(Scorer, Follower(sharded))


def _load(
    model: ModelLike,
    kind: str,
    head: HeadLike | None,
    reward: "ModelLike | Scorer | None",
    reference: "ModelLike | LogProbs | None",
    options: LoadingOptions,
    *,
    gguf_file: str | None,
    conventions: dict[str, Any],
    by_steps: dict[str, str | None],
) -> Scorer:
    """`load_scorer` with its options read; conventions: bos, terminal and transform; by_steps:
    steps and aggregate."""
    source = open_source(model, gguf_file=gguf_file, **options.of_files)
    source, kind, head = with_head_beside(source, kind, head, allow_pickle=options.allow_pickle)
    family = choose_family(source, _kind(kind, head, source.name))
    if family.by_steps:
        refuse_for_steps(source.name, reward=reward, reference=reference,
                         terminal=conventions["terminal"])  # fmt: skip
        own = {name: conventions[name] for name in ("bos", "transform")}
        return load_step_scorer(source, kind, family, options, **by_steps, **own)
    refuse_steps(source.name, family.kind, **by_steps)
    # A head on the policy's own trunk reads the policy's own ids.
    leads = options.sharded is None or options.sharded.leads
    if options.policy_tokenizer is None and not family.head_apart and leads:
        warn_of_unknown_policy(source.name, calls=2)
    if not family.heads:
        refuse_for_implicit(reward=reward, **conventions)
        return _load_implicit(source, reference, options)
    terminal = settled_terminal(reward, conventions["terminal"])
    if head is not None:
        bos, transform = conventions["bos"], conventions["transform"]
        family = choose_family(source, family.kind, bos=bos, terminal=terminal)
        return load_trunk_scorer(source, family, head, transform, reward, reference, options)
    given = conventions | {"terminal": terminal}
    return load_critic(source, kind, options, reward, reference, **given)


def warn_of_unknown_policy(name: str, calls: int) -> None:
    """Says that nothing compares the token ids of a scorer with a policy's.

    calls: how deep in `load_scorer` this is called.
    """
    warnings.warn(
        f"{name} was loaded without policy_tokenizer=, so nothing compares the token ids that it "
        "reads with the policy's: pass the policy's tokenizer",
        UnknownPolicyWarning,
        # The caller of load_scorer, which runs in `without_autograd`.
        stacklevel=3 + calls,
    )


def settled_terminal(reward: object, terminal: TerminalRule | None) -> TerminalRule | None:
    """The rule that was given, or that a reward model implies. Raises ValueError: they differ."""
    if reward is not None and terminal not in (None, "reward"):
        raise ValueError(
            f'a reward model was given with terminal={terminal!r}: expected terminal="reward", or '
            "no reward model"
        )
    return "reward" if reward is not None else terminal


def _kind(kind: str, head: object, name: str) -> str:
    """The kind that was asked for: a head that comes apart is evidence for its own."""
    if head is None:
        if kind == TRUNK_HEAD:
            raise ValueError(
                f"{name} was given as {kind} without a head: pass head=, a value head on this "
                "policy's hidden states (a file that recipes.trunk_head wrote, say)"
            )
        return kind
    if kind not in ("auto", TRUNK_HEAD):
        raise ValueError(
            f"head= was given with kind={kind!r}, whose checkpoints have their head inside: "
            f'expected kind="{TRUNK_HEAD}" with the policy as the model; drop one of the two'
        )
    return TRUNK_HEAD


def _load_implicit(
    source: Source,
    reference: "ModelLike | LogProbs | None",
    options: LoadingOptions,
) -> ImplicitScorer:
    start = reference_of(source, reference)
    tuned = load_causal_lm(source, **options.of_weights)
    base_options = replace(options, revision=None)
    base_source = open_source(start, **base_options.of_files)
    base_options = options_for(base_options, base_source)
    base = load_causal_lm(base_source, **base_options.of_weights)
    tokenizer = load_tokenizer(source)
    check_tokenizer(options, tokenizer, tuned, source)
    own = options_of_companions(options, tokenizer, "the reference")
    check_tokenizer(own, load_tokenizer(base_source), base, base_source)
    return ImplicitScorer(
        packed_model(tuned, source.name, options),
        packed_model(base, base_source.name, options),
        bos_token_id=first(special_token("bos_token_id", tokenizer, tuned)),
        eos_token_id=first(
            special_token("eos_token_id", tokenizer, tuned, options.policy_tokenizer)
        ),
    )


def reference_of(source: Source, reference: "ModelLike | LogProbs | None") -> ModelLike:
    """The model that an implicit reward's policy started from: the given one, or the registry's.

    Raises ValueError: neither is there.
    """
    if reference is None and source.record is not None:
        reference = source.record.reference
    if reference is None or not isinstance(reference, ModelLike):
        raise ValueError(
            f"{source.name} is scored as an implicit reward, log π* − log π_ref, but no reference "
            "came with it: pass reference=, the model that its training started from"
        )
    return reference


def refuse_for_steps(name: str, **given: object) -> None:
    """Raises ValueError: an option that a scorer of single tokens has a use for."""
    names = [f"{option}=" for option, value in given.items() if value is not None]
    if names:
        raise ValueError(
            f"{', '.join(names)} came with {name}, a process reward model, which reads the steps "
            "of responses and no tokens: drop it"
        )


def refuse_for_implicit(**given: object) -> None:
    """Raises ValueError: an option that only a value head has a use for."""
    names = [f"{name}=" for name, value in given.items() if value is not None]
    if names:
        raise ValueError(
            f"{', '.join(names)} came with an implicit reward, which has no value head: expected "
            "only a reference; drop it"
        )
