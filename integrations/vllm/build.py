"""An engine's guidance from vLLM's configuration: what is refused, and what is loaded."""

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch

from guided_decode.checkpoints.loading import load_scorer
from guided_decode.guidance.value_trail import check_has_values
from guided_decode.integrations.vllm import warm_up
from guided_decode.integrations.vllm.client_values.store import ValueStore, of_this_process
from guided_decode.integrations.vllm.client_values.worker import refuse_unreadable
from guided_decode.integrations.vllm.engine import Broadcast, GuidedEngine
from guided_decode.integrations.vllm.foreign import later_processors
from guided_decode.integrations.vllm.server_config import ServerConfig, config_of
from guided_decode.integrations.vllm.speculation import most_drafts, refuse_speculation
from guided_decode.integrations.vllm.trunk_build import own_trunk, trunk_tap
from guided_decode.scorer import Scorer
from guided_decode.scoring.closing import Closing

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("guided_decode")

_FORWARD_TOKENS = 8192


def build_engine(
    vllm_config: "VllmConfig", device: torch.device, *, is_v1: bool = True
) -> GuidedEngine:
    """The guidance of one worker; the scorer is loaded on the rank that scores only.

    is_v1: whether the worker's model runner is vLLM's V1, not Model Runner V2.

    Raises ValueError: the configuration is wrong, the scorer does not fit, or the engine has what
    guidance cannot serve.
    """
    _log_with_vllm()
    config = config_of(vllm_config.additional_config)
    refuse_unsupported(vllm_config, is_v1=is_v1, by_trunk=config.is_trunk_head)
    _warn_of_later_processors(vllm_config.model_config)
    parallel = vllm_config.parallel_config
    config = _within_vocabulary(config, vllm_config.model_config.get_vocab_size())
    leads, broadcast, agreed = _ranks(parallel)
    tap = scorer = trunk = None
    if config.is_trunk_head:
        tap = trunk_tap(config, vllm_config, device)
        trunk = own_trunk(config, vllm_config, tap, broadcast)
        if trunk is not None and device.type != "cpu":
            nought = warm_up.Nought(trunk.vocab_size, trunk.terminal)
            warm_up.steps(nought, config, trunk.vocab_size, device)
    elif leads:
        scorer = _load(config, vllm_config, device)
    # An implicit reward has no value of a prefix. All ranks must admit the same requests.
    values = agreed(scorer is None or scorer.terminal != "included")
    return GuidedEngine(
        config,
        scorer,
        tap=tap if leads else None,
        trunk=trunk,
        end_ids=_end_ids(vllm_config.model_config),
        groups=values and not _is_one_of_many(parallel),
        values=values,
        store=_store(parallel),
        broadcast=broadcast,
        drafts=most_drafts(vllm_config),
    )


def refuse_unsupported(
    vllm_config: "VllmConfig", *, is_v1: bool = True, by_trunk: bool = False
) -> None:
    """Raises ValueError: what this engine does, why guidance cannot serve it, what to do.

    is_v1: as of `build_engine`. by_trunk: the scorer is a head on the policy's own trunk.
    """
    refuse_speculation(vllm_config, is_v1=is_v1, by_trunk=by_trunk)
    model = vllm_config.model_config
    if getattr(model, "is_diffusion", False):
        raise ValueError(
            "this policy is a diffusion model, whose sampler is its own and writes tokens in no "
            "order: expected one that writes a token after the other"
        )
    if model.enable_prompt_embeds:
        raise ValueError(
            "prompt embeddings are on, but guidance needs token ids: start the server without "
            "--enable-prompt-embeds"
        )
    if getattr(model, "supports_multimodal_inputs", False):
        raise ValueError(
            "this policy takes images, sound or video, which no critic reads: start the server "
            "with --language-model-only, or --limit-mm-per-prompt with 0 for each of them"
        )
    if getattr(vllm_config.parallel_config, "enable_batch_sharded_sampling", False):
        raise ValueError(
            "batch-sharded sampling is on, where each rank samples other rows: start the server "
            "without it"
        )


def _warn_of_later_processors(model: Any) -> None:
    """What comes after guidance may forbid all that guidance left."""
    later = later_processors(model)
    if later:
        logger.warning(
            "%s comes after guidance in --logits-processors: if it forbids the candidates, no "
            "token is left, and vLLM writes one that nobody chose; list guided-decode's last",
            ", ".join(later),
        )


def _within_vocabulary(config: ServerConfig, vocab: int) -> ServerConfig:
    """No request may ask for more candidates than there are tokens.

    Raises ValueError: the server's own default does.
    """
    if config.top_k is not None and config.top_k > vocab:
        raise ValueError(
            f"top_k={config.top_k} is larger than the policy's vocabulary of {vocab} tokens"
        )
    return config.model_copy(update={"max_top_k": min(config.max_top_k, vocab)})


def _is_one_of_many(parallel: Any) -> bool:
    """Whether siblings may be on other engines; a dense model's worker may not be told."""
    several = getattr(parallel, "elastic_ep_max_dp_size", None) or 1
    index = getattr(parallel, "data_parallel_index", 0) or 0
    return parallel.data_parallel_size > 1 or several > 1 or index > 0


def _store(parallel: Any) -> ValueStore | None:
    """Where values wait for clients; None where nobody could fetch them."""
    if _is_one_of_many(parallel):
        return None
    try:
        refuse_unreadable(parallel)
    except ValueError:
        return None
    return of_this_process()


def _ranks(parallel: Any) -> tuple[bool, Broadcast | None, Callable[[bool], bool]]:
    """Whether this rank leads, how its result reaches the others, and how they hear its word."""
    if parallel.tensor_parallel_size == 1 and parallel.pipeline_parallel_size == 1:
        return True, None, bool
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    if not get_pp_group().is_last_rank:
        return False, None, bool
    group = get_tp_group()
    if group.world_size == 1:
        return True, None, bool
    leads = group.rank_in_group == 0
    return (
        leads,
        lambda tensor: group.broadcast(tensor, src=0),
        lambda word: bool(group.broadcast_object(word if leads else None, src=0)),
    )


def _load(config: ServerConfig, vllm_config: "VllmConfig", device: torch.device) -> Scorer:
    """The scorer, which fits the server's limits."""
    model = vllm_config.model_config
    if config.is_remote:
        scorer, on = _load_remote(config, model), device
    else:
        scorer, on = _load_here(config, vllm_config, device)
    if config.top_k is None and not scorer.scores_vocabulary:
        raise ValueError(
            f"top_k=null was given with {type(scorer).__name__}, which forwards every candidate: "
            "set top_k (the whole vocabulary is for implicit rewards only)"
        )
    check_has_values(scorer, config.guidance)
    if scorer.vocab_size < config.max_top_k:
        raise ValueError(
            f"max_top_k={config.max_top_k} is larger than the scorer's vocabulary of "
            f"{scorer.vocab_size} tokens: set a smaller one"
        )
    if on.type != "cpu" and not config.is_remote:
        most = vllm_config.scheduler_config.max_num_seqs * (1 + most_drafts(vllm_config))
        with _explained(config, on):
            warm_up.graphs(scorer, config, most, model.max_model_len)
    if device.type != "cpu":
        with _explained(config, on):
            warm_up.steps(scorer, config, model.get_vocab_size(), device)
    reason = scorer.refusal([0] * (model.max_model_len - 1), config.max_top_k)
    if reason is not None:
        logger.warning(
            "requests near max_model_len=%d go unguided: %s", model.max_model_len, reason
        )
    logger.info("%r scores the candidates; defaults: %s", scorer, config.guidance)
    return scorer


def _load_remote(config: ServerConfig, model: Any) -> Scorer:
    """The scorer of a server, which is up when the engine starts; later it may come and go."""
    scorer = load_scorer(
        config.scorer,
        config.kind,
        dtype=config.dtype,
        bos=config.bos,
        terminal=config.terminal,
        transform=config.transform,
        policy_tokenizer=_policy_tokenizer(model),
        key_file=config.key_file,
        timeout=config.timeout,
    )
    if config.kl_coef and scorer.reference is None:
        raise ValueError(
            f"kl_coef was given, but the scorer at {config.scorer} has no reference model: start "
            "its server with --reference"
        )
    return scorer


def _load_here(
    config: ServerConfig, vllm_config: "VllmConfig", device: torch.device
) -> tuple[Scorer, torch.device]:
    """A scorer in this process, and where it is."""
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    # A step's scorer activations then stay below those of the policy, which vLLM profiles.
    forward = config.max_forward_tokens or min(_FORWARD_TOKENS, scheduler.max_num_batched_tokens)
    drafts = most_drafts(vllm_config)
    row_tokens = model.max_model_len + drafts + (1 + drafts) * config.max_top_k
    on = torch.device(config.device) if config.device else device
    with _explained(config, on):
        scorer = load_scorer(
            config.scorer,
            config.kind,
            adapter=config.adapter,
            reward=config.reward,
            reference=config.reference,
            device=on if config.device_map is None else None,
            dtype=None if config.dtype is None else getattr(torch, config.dtype),
            cache_tokens=config.cache_tokens,
            live_tokens=scheduler.max_num_seqs * row_tokens,
            max_forward_tokens=forward,
            bos=config.bos,
            terminal=config.terminal,
            transform=config.transform,
            policy_tokenizer=_policy_tokenizer(model),
            revision=config.revision,
            allow_pickle=config.allow_pickle,
            trust_remote_code=config.trust_remote_code,
            rope_theta=config.rope_theta,
            quantization=config.quantization,
            gguf_file=config.gguf_file,
            device_map=config.device_map,
        )
        if on.type != "cpu":
            warm_up.forward(scorer, forward, model.max_model_len)
    if isinstance(scorer, Closing):
        # Nobody but the processor holds it.
        scorer.freeze()
    return scorer, on


@contextlib.contextmanager
def _explained(config: ServerConfig, device: torch.device) -> Iterator[None]:
    """Turns running out of memory into what can be done about it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not out_of_memory and "allocate memory" not in str(error):
            raise
        raise ValueError(
            f"the scorer {config.scorer} does not fit on {device}: {error}. Take a smaller one, "
            "dtype=bfloat16, quantization=bnb-4bit, a smaller cache_tokens or max_forward_tokens, "
            'another device ("cuda:1", "cpu"), or more GPUs for the policy '
            "(--tensor-parallel-size), which leaves room on each"
        ) from error


def _policy_tokenizer(model: Any) -> Any:
    if model.skip_tokenizer_init:
        logger.warning("without the policy's tokenizer its ids cannot be compared to the scorer's")
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model.tokenizer,
        revision=model.tokenizer_revision,
        trust_remote_code=model.trust_remote_code,
    )


def _end_ids(model: Any) -> Collection[int]:
    """What vLLM adds to every request's stop_token_ids: the generation config's EOS."""
    given = model.try_get_generation_config().get("eos_token_id")
    return () if given is None else (given,) if isinstance(given, int) else tuple(given)


def _log_with_vllm() -> None:
    """vLLM configures its own logger only: ours writes where that one does."""
    ours, theirs = logging.getLogger("guided_decode"), logging.getLogger("vllm")
    if not ours.handlers and not logging.getLogger().handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
