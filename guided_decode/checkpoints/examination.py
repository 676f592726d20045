"""What `load_scorer` would refuse, found without reading weights: before an engine loads, say."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from guided_decode.checkpoints.adapted import Adapted
from guided_decode.checkpoints.adapter_loading import refuse_without_peft
from guided_decode.checkpoints.checkpoint import load_tokenizer
from guided_decode.checkpoints.config_checks import check_config, settle_rope
from guided_decode.checkpoints.families import BosRule, Family
from guided_decode.checkpoints.gguf_weights import refuse_packed
from guided_decode.checkpoints.head import choose_transform, read_head
from guided_decode.checkpoints.kinds import choose_family
from guided_decode.checkpoints.loading import reference_of, refuse_for_implicit, settled_terminal
from guided_decode.checkpoints.quantization import (
    check_stored,
    read_quantization,
    refuse_twice,
)
from guided_decode.checkpoints.source import Source, open_source
from guided_decode.checkpoints.tokenizer_match import check_tokenizers
from guided_decode.scorer import TerminalRule
from guided_decode.scoring.step_scorer import NOT_TOKENS
from guided_decode.scoring.transforms import parse_transform


@dataclass(frozen=True, slots=True)
class Examined:
    """kind: the family's, also where "auto" was asked for. vocab_size: of the scorer's config."""

    kind: str
    vocab_size: int


def examine_scorer(
    model: str,
    kind: str = "auto",
    *,
    adapter: str | None = None,
    reward: str | None = None,
    reference: str | None = None,
    bos: BosRule | None = None,
    terminal: TerminalRule | None = None,
    transform: str | None = None,
    policy_tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    rope_theta: float | None = None,
    quantization: str | None = None,
    gguf_file: str | None = None,
) -> Examined:
    """What is known of a scorer by its config, its tokenizer, its head and the headers of its
    weights; arguments as of `load_scorer`.

    Raises ValueError: as `load_scorer` does, but for what only shows in the weights.
    """
    wanted = None if transform is None else parse_transform(transform)
    of_files: dict[str, Any] = {
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
    }
    quantized = read_quantization(quantization)
    given = model if adapter is None else Adapted(model, adapter)
    source = open_source(given, revision=revision, gguf_file=gguf_file, **of_files)
    if quantized is not None:
        refuse_twice(source.name, quantized, source.config, in_memory=False)
        refuse_packed(source, quantized)
    family = choose_family(source, kind, bos=bos, terminal=terminal)
    if family.by_steps:
        raise ValueError(f"{source.name}: {NOT_TOKENS}")
    _examine(source, family, rope_theta, policy_tokenizer)
    vocab = int(source.config.get_text_config().vocab_size)
    if not family.heads:
        refuse_for_implicit(reward=reward, bos=bos, terminal=terminal, transform=transform)
        _examine_language_model(source, family)
        base = open_source(reference_of(source, reference), **of_files)
        _examine(base, family, rope_theta, policy_tokenizer)
        _examine_language_model(base, family)
        return Examined(family.kind, vocab)
    settled_terminal(reward, terminal)
    head = read_head(source, family, wanted)
    choose_transform(source, family, wanted, len(head.weight))
    if reward is not None:
        examine_scorer(reward, policy_tokenizer=policy_tokenizer, **of_files)
    if reference is not None:
        other = open_source(reference, **of_files)
        language_model = choose_family(other, "implicit")
        _examine(other, language_model, None, policy_tokenizer)
        _examine_language_model(other, language_model)
    return Examined(family.kind, vocab)


def _examine(
    source: Source,
    family: Family,
    rope_theta: float | None,
    policy_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    if source.adapter is not None:
        refuse_without_peft(source)
    check_config(source.name, source.config)
    check_stored(source.name, source.config)
    settle_rope(source.name, source.config, family, rope_theta)
    tokenizer = _tokenizer(source)
    if policy_tokenizer is not None and tokenizer is not None:
        check_tokenizers(policy_tokenizer, tokenizer)


def _tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(source)
    except Exception as error:
        raise _unreadable(f"{source.name}: its tokenizer", error) from error


def _examine_language_model(source: Source, family: Family) -> None:
    if source.architecture and not family.takes(source.architecture):
        raise ValueError(
            f"{source.name} is a {source.architecture}: a reference or implicit reward expects a "
            "class that ends in ForCausalLM; pass a language model"
        )


def read_config(model: str, **options: Any) -> PreTrainedConfig:
    """A model's config. Raises ValueError: it has none, or one that cannot be read."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model, **options)
    except Exception as error:
        raise _unreadable(f"{model}: its config", error) from error
    return config


def _unreadable(what: str, error: Exception) -> ValueError:
    """transformers raises what it likes of files that are wrong."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{what} cannot be read ({reason}): download it again, or mend it")
