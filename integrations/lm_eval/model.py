"""The harness's Hugging Face model, whose texts are guided by a scorer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from lm_eval.models.huggingface import HFLM

from guided_decode.checkpoints.loading import load_scorer
from guided_decode.checkpoints.prompts import find_format
from guided_decode.checkpoints.registry import CHAT_TEMPLATE, find, location_of
from guided_decode.guidance.config import GuidanceConfig
from guided_decode.guidance.presets import find_preset
from guided_decode.integrations.transformers import GuidedDecoding

_GUIDANCE = tuple(field.name for field in fields(GuidanceConfig))
# Arguments of `load_scorer`. Those that the policy has too are called scorer_NAME.
_SCORER = ("kind", "head", "adapter", "reward", "reference", "cache_tokens", "max_forward_tokens",
           "bos", "terminal", "transform", "quantization", "key_file", "timeout")  # fmt: skip
_SCORERS_OWN = ("device", "dtype", "revision", "allow_pickle", "trust_remote_code", "gguf_file")
_GENERATES = (
    "guided-decode answers generate_until tasks: {} was asked for, which is a likelihood of the "
    "unguided policy; take --model hf for it"
)


class GuidedLM(HFLM):  # type: ignore[misc, unused-ignore]
    """`hf` of lm-evaluation-harness with guided generation; other arguments are those of `hf`.

    Prompts, batches, stop strings and what is cut of an answer are the harness's own, so that
    `--model hf` with the same policy is the plain baseline.
    """

    def __init__(
        self,
        pretrained: Any,
        scorer: Any = None,
        *,
        preset: str | None = None,
        add_bos_token: bool | None = None,
        **arguments: Any,
    ) -> None:
        """
        Args:
            pretrained: the policy: a registered name, a folder, a Hub id, or a causal LM of
                transformers in memory.
            scorer: as `load_scorer` takes it; None with a head on the policy's hidden states.
            preset: a published method's settings, which fields of guidance below change.
            add_bos_token: None is what a registered policy was trained with, else the
                tokenizer's own way.
            arguments: fields of `GuidanceConfig` (a top_k of 0 is the whole vocabulary); arguments
                of `load_scorer` (kind, head, adapter, reward, reference, ..., and scorer_device,
                scorer_dtype, scorer_revision, ... for those that the policy has too); all others
                go to `hf`.

        Raises:
            ValueError: as GuidanceConfig or `load_scorer`; neither a scorer nor a head.
        """
        guidance = {name: arguments.pop(name) for name in _GUIDANCE if name in arguments}
        reading = {name: arguments.pop(name) for name in _SCORER if name in arguments}
        own = {name: arguments.pop(f"scorer_{name}") for name in _SCORERS_OWN
               if f"scorer_{name}" in arguments}  # fmt: skip
        if scorer is None and "head" not in reading:
            raise ValueError(
                "no scorer came in --model_args: expected scorer=CRITIC (a folder, a registered "
                "name, a Hub id or a scorer server's address), or head=PATH on the policy itself"
            )
        self.guidance = _config(preset, guidance)
        if isinstance(pretrained, str):
            if add_bos_token is None:
                add_bos_token = _trained_with_bos(pretrained)
            pretrained = location_of(pretrained)
        super().__init__(pretrained, add_bos_token=add_bos_token, **arguments)
        if preset is not None:
            reading.setdefault("transform", find_preset(preset).transform)
        self.scorer = load_scorer(
            self.model if scorer is None else scorer, policy_tokenizer=self.tokenizer,
            **reading, **own,
        )  # fmt: skip
        self._guided = GuidedDecoding(self.scorer, self.guidance)

    def _model_generate(self, context: Any, max_length: int, stop: Any, **options: Any) -> Any:
        return super()._model_generate(
            context, max_length, stop, custom_generate=self._guided, **options
        )

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError(_GENERATES.format("loglikelihood"))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Raises NotImplementedError."""
        raise NotImplementedError(_GENERATES.format("loglikelihood_rolling"))

    def get_model_info(self) -> dict[str, Any]:
        """As of `hf`, with the guidance and what the scorer forwarded."""
        info: dict[str, Any] = super().get_model_info()
        tokens = {"scorer_tokens": self.scorer.stats.tokens}
        return info | {"guidance": asdict(self.guidance)} | tokens


def _config(preset: str | None, given: Mapping[str, Any]) -> GuidanceConfig:
    """The preset, else the defaults, with what was given in its place."""
    base = GuidanceConfig() if preset is None else find_preset(preset).config
    named = {name: value for name, value in given.items() if value is not None}
    if named.get("top_k") == 0:
        named["top_k"] = None
    return base.changed(**named)


def _trained_with_bos(policy: str) -> bool | None:
    """Whether a registered policy's training text began with BOS; None: it is not known."""
    record = find(policy)
    if record is None or record.prompt_format in (None, CHAT_TEMPLATE):
        return None
    return find_format(record.prompt_format).bos
