"""Critics and trunk heads as scorers, with the reward model and the reference that go with them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from guided_decode.checkpoints.checkpoint import (
    load_causal_lm,
    load_checkpoint,
    load_policy_trunk,
)
from guided_decode.checkpoints.families import Family
from guided_decode.checkpoints.following import critic_head_origin, trunk_head_origin
from guided_decode.checkpoints.head import Head
from guided_decode.checkpoints.loading_options import (
    LoadingOptions,
    check_tokenizer,
    options_for,
    options_of_companions,
    packed_model,
)
from guided_decode.checkpoints.misgiven import misgiven_object
from guided_decode.checkpoints.quantised_layers import is_quantised
from guided_decode.checkpoints.source import ModelLike, Source, open_source
from guided_decode.checkpoints.special_ids import conventions, turn_end_of
from guided_decode.checkpoints.tokenizer_files import load_tokenizer
from guided_decode.checkpoints.tokenizer_match import check_rows
from guided_decode.checkpoints.trunk_head_loading import HeadLike, load_trunk_head
from guided_decode.forward.final_norm import put_back_final_norm, take_final_norm
from guided_decode.scorer import LogProbs, Scorer
from guided_decode.scoring.critic import CriticScorer, ValueHead
from guided_decode.scoring.implicit import LanguageModel
from guided_decode.scoring.transforms import Transform
from guided_decode.scoring.trunk_head import TrunkHead
from guided_decode.scoring.trunk_scorer import TrunkScorer
from guided_decode.scoring.turn_end import TurnEndScorer


def load_critic(
    source: Source,
    kind: str,
    options: LoadingOptions,
    reward: "ModelLike | Scorer | None" = None,
    reference: "ModelLike | LogProbs | None" = None,
    own_head: Callable[[Source], Head] | None = None,
    **given: Any,
) -> CriticScorer:
    """A critic or reward model of any kind that has its head inside.

    Args as of `loading.load_scorer`; own_head: as of `load_checkpoint`; `given`: bos, terminal and
    transform.
    """
    checkpoint = load_checkpoint(source, kind, own_head=own_head, **given, **options.of_weights)
    check_tokenizer(options, checkpoint.tokenizer, checkpoint.trunk, source)
    weight, bias, inner = checkpoint.head_weight, checkpoint.head_bias, checkpoint.head_inner
    family, transform = checkpoint.family, checkpoint.transform
    made: Callable[..., CriticScorer] = CriticScorer
    behind = turn_end_of(checkpoint.record, checkpoint.family, checkpoint.tokenizer)
    if behind:
        made = partial(TurnEndScorer, turn_end=behind)
    return made(
        packed_model(checkpoint.trunk, checkpoint.name, options),
        ValueHead(weight, bias, transform, inner),
        head_origin=critic_head_origin(source, family, transform, own_head),
        **_companions(reward, reference, checkpoint.tokenizer, options),
        **conventions(family, checkpoint.tokenizer, checkpoint.trunk, options.policy_tokenizer),
    )


def load_trunk_scorer(
    source: Source,
    family: Family,
    head: HeadLike,
    transform: str | Transform | None,
    reward: "ModelLike | Scorer | None",
    reference: "ModelLike | LogProbs | None",
    options: LoadingOptions,
) -> TrunkScorer:
    """A head on the policy's own hidden states; arguments as of `loading.load_scorer`."""
    trunk = load_policy_trunk(
        source, family, options.dtype, options.device, options.rope_theta,
        options.quantization, options.device_map,
    )  # fmt: skip
    of_head = options.of_files | {"revision": None, "transform": transform}
    # Of weights that were quantised nobody knows what they were.
    of_head["exact"] = not (source.is_gguf or is_quantised(trunk))

    def read(trunk: PreTrainedModel) -> TrunkHead:
        # A head may know its trunk by its weights, the norm's among them.
        put_back_final_norm(trunk)
        found = load_trunk_head(head, trunk, source.name, **of_head)
        return replace(found, norm=take_final_norm(trunk))

    found = read(trunk)
    tokenizer = load_tokenizer(source)
    check_tokenizer(options, tokenizer, trunk, source)
    # A loop that reads next tokens off this trunk keeps each token's hidden state.
    hidden_bytes = trunk.config.get_text_config().hidden_size * trunk.dtype.itemsize
    return TrunkScorer(
        packed_model(trunk, source.name, options, hidden_bytes),
        found,
        head_origin=trunk_head_origin(head, read),
        **_companions(reward, reference, tokenizer, options),
        **conventions(family, tokenizer, trunk, options.policy_tokenizer),
    )


def _companions(
    reward: "ModelLike | Scorer | None",
    reference: "ModelLike | LogProbs | None",
    tokenizer: PreTrainedTokenizerBase | None,
    options: LoadingOptions,
) -> dict[str, Any]:
    """The reward model and the reference, which read the ids that the scorer reads."""
    of_reward = options_of_companions(options, tokenizer, "the reward model")
    of_reference = options_of_companions(options, tokenizer, "the reference")
    return {
        "reward": _load_reward(reward, of_reward),
        "reference": _load_reference(reference, of_reference),
    }


def _load_reference(
    reference: "ModelLike | LogProbs | None", options: LoadingOptions
) -> LogProbs | None:
    if not isinstance(reference, ModelLike):
        if reference is not None and not isinstance(reference, LogProbs):
            raise ValueError(
                f"reference: {misgiven_object(reference)}, or an object with log_probs"
            )
        return reference
    own = replace(options, revision=None, rope_theta=None)
    source = open_source(reference, **own.of_files)
    own = options_for(own, source)
    model = load_causal_lm(source, **own.of_weights)
    check_tokenizer(own, load_tokenizer(source), model, source)
    return LanguageModel(packed_model(model, source.name, own))


def _load_reward(reward: "ModelLike | Scorer | None", options: LoadingOptions) -> Scorer | None:
    if not isinstance(reward, ModelLike):
        if reward is not None and not isinstance(reward, Scorer):
            raise ValueError(f"reward: {misgiven_object(reward)}, or a scorer")
        if reward is not None and options.policy_tokenizer is not None:
            check_rows(
                options.policy_tokenizer, reward.vocab_size, "the reward model", options.writer
            )
        return reward
    own = replace(options, revision=None, rope_theta=None)
    source = open_source(reward, **own.of_files)
    return load_critic(source, "auto", options_for(own, source))
