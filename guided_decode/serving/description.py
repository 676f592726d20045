"""What a server tells its clients of its scorer."""

from hashlib import blake2b
from typing import Any

from transformers import PreTrainedTokenizerBase

from guided_decode.scorer import LogProbs, Scorer
from guided_decode.scoring.remote.wire import Described, Model, Tokens
from guided_decode.scoring.step_scorer import NOT_TOKENS, StepScorer

# No prefix is longer.
_MOST_ROOM = 1 << 24


def describe(scorer: Scorer, *, kind: str | None = None, tokens: Tokens | None = None) -> Described:
    """The description of a scorer and its companions.

    Args:
        scorer: any.
        kind: its checkpoint family, where that is known.
        tokens: of the tokenizer whose ids it reads, where that is known.

    Raises ValueError: it scores no tokens.
    """
    if isinstance(scorer, StepScorer):
        raise ValueError(f"{_name(scorer.model, scorer)} cannot be served: {NOT_TOKENS}")
    reward, reference = scorer.reward, scorer.reference
    return Described(
        scorer=_model(scorer, "implicit" if scorer.terminal == "included" else kind),
        reward=None if reward is None else _model(reward),
        reference=None if reference is None else _reference(reference, scorer),
        tokenizer=None if tokens is None else _digest(tokens),
    )


def tokens_of(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """A tokenizer's ids, as the reply to a request whose number is still to be set."""
    return Tokens(
        0,
        {str(token): index for token, index in tokenizer.get_vocab().items()},
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        {index: token.special for index, token in tokenizer.added_tokens_decoder.items()},
    )


def _model(scorer: Scorer, kind: str | None = None) -> Model:
    packed = getattr(scorer, "model", None)
    transform = getattr(getattr(scorer, "head", None), "transform", None)
    return Model(
        name=_name(packed, scorer),
        kind=kind,
        dtype=_dtype(packed),
        bos=_bos(scorer),
        transform=None if transform is None else str(transform),
        vocab_size=scorer.vocab_size,
        room=_room(scorer),
        terminal=scorer.terminal,
        scores_vocabulary=scorer.scores_vocabulary,
        bos_token_id=scorer.bos_token_id,
        eos_token_id=scorer.eos_token_id,
    )


def _reference(reference: LogProbs, scorer: Scorer) -> Model:
    packed = getattr(reference, "model", None)
    vocab = getattr(packed, "vocab_size", scorer.vocab_size)
    return Model(name=_name(packed, reference), vocab_size=vocab, room=_room(reference))


def _name(packed: Any, model: Any) -> str:
    return str(getattr(packed, "name", None) or type(model).__name__)


def _dtype(packed: Any) -> str | None:
    dtype = getattr(getattr(packed, "model", None), "dtype", None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _bos(scorer: Scorer) -> str | None:
    if not hasattr(scorer, "skip_token") or scorer.bos_token_id is None:
        return None
    return "keep" if scorer.skip_token is None else "drop"


def _room(model: Scorer | LogProbs) -> int:
    """The most tokens, prefix and candidates together, that any row may have."""

    def fits(tokens: int) -> bool:
        return model.refusal([0] * tokens, 0) is None and (
            tokens == 1 or model.refusal([0] * (tokens - 1), 1) is None
        )

    if not fits(1):
        return 0
    least, most = 1, 2
    while most <= _MOST_ROOM and fits(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def _digest(tokens: Tokens) -> str:
    every = [sorted(tokens.vocabulary.items()), tokens.bos_token_id, tokens.eos_token_id]
    return blake2b(repr(every).encode(), digest_size=16).hexdigest()
