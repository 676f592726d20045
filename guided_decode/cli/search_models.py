"""The models of `search`: which they are, what they are known by, and what they answer with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from guided_decode.checkpoints.registry import find
from guided_decode.cli.chat_rows import Messages
from guided_decode.cli.chats import format_of, prompt_ids, prompt_text, raw_ids
from guided_decode.cli.checkpoints import (
    DEFAULT_POLICY,
    Policy,
    known_as,
    load_policy,
    load_tokenizer,
    location,
    open_scorer,
    pair,
    parse_dtype,
)
from guided_decode.cli.errors import Refusal
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.prompt_formats import warn_of_another_format
from guided_decode.cli.remote_options import RemoteOptions
from guided_decode.cli.run_identity import fingerprint, run_identity
from guided_decode.cli.score_run import identity
from guided_decode.cli.search_plan import Plan
from guided_decode.cli.search_run import SearchJob
from guided_decode.scoring.remote.address import is_address

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from guided_decode.scorer import Scorer


def named(
    plan: Plan, policy: str | None, scorer: str | None, reading: ScorerOptions
) -> tuple[str, str | None]:
    """Policy and scorer as `checkpoints.pair`; no scorer where the method asks none.

    Raises Refusal: as `pair`; a scorer was given that nothing would ask.
    """
    if (kl_coef := plan.settings.get("kl_coef")) and reading.reference is None:
        raise Refusal(f"--kl-coef {kl_coef} needs --reference, the model that the policy was tuned "
                      "from")  # fmt: skip
    if plan.method.judged:
        return pair(policy, scorer, head=reading.head)
    given = [f"--scorer {scorer}"] if scorer is not None else []
    given += [f"--{name.replace('_', '-')}" for name in reading.given() if name != _OF_BOTH]
    if given:
        raise Refusal(f"{given[0]} came with --method {plan.method.name}, which asks no scorer: "
                      "drop it")  # fmt: skip
    policy = policy or DEFAULT_POLICY
    location(policy)
    return policy, None


# The one of the scorer's options that a policy is loaded with, too.
_OF_BOTH = "trust_remote_code"


@dataclass(frozen=True, slots=True)
class SearchModels:
    """What was asked for. text_format: of prompts, as `chats.prompt_ids`; raw: they are text."""

    policy: str
    scorer: str | None
    reading: ScorerOptions
    remote: RemoteOptions
    device: str | None
    scorer_device: str | None
    dtype: str
    text_format: str | None
    raw: bool

    def served(self) -> Scorer | None:
        """The scorer of a server; None where it is none. Raises as `open_scorer`."""
        if self.scorer is None or not is_address(self.scorer):
            return None
        own = load_tokenizer(
            self.policy, f"policy {self.policy}", trust_remote_code=self.reading.trust_remote_code
        )
        policy = Policy(self.policy, None, own, None)
        return open_scorer(self.scorer, self.reading, policy=policy, remote=self.remote)

    def identity(self, plan: Plan, served: Scorer | None) -> str:
        """What the output's lines follow from; finds out that a model is not there."""
        settings: dict[str, Any] = {
            **plan.identity(),
            "policy": fingerprint(self.policy),
            "policy_dtype": str(parse_dtype(self.dtype)),
            "format": self.text_format,
            "raw": self.raw,
        }
        if served is not None:
            # Of its weights a server says their name.
            settings["served"] = getattr(served, "described", None)
        if self.scorer is None or served is not None:
            return run_identity({}, settings, None)
        device = self.scorer_device or self.device
        return identity(self.scorer, self.reading, device, self.dtype, settings)

    def job(self, plan: Plan, served: Scorer | None, run: str, skip: bool) -> SearchJob:
        """Loads what is not there yet. Raises Refusal or ValueError: it cannot be loaded."""
        # A head on the policy's hidden states reads them with the adapter in it.
        own = self.reading.head is not None and self.policy == self.scorer
        loaded = load_policy(
            self.policy, self.device, self.dtype,
            adapter=self.reading.adapter if own else None,
            trust_remote_code=self.reading.trust_remote_code,
        )  # fmt: skip
        from guided_decode.scoring.step_scorer import StepScorer
        from guided_decode.search.judges import ScorerJudge
        from guided_decode.search.local import load_generator
        from guided_decode.search.step_judge import StepJudge

        reading, reference = self.reading, None
        if plan.settings.get("kl_coef"):
            # The method's KL term has it, and not the scorer's.
            reference, reading = reading.reference, replace(reading, reference=None)
        generator = load_generator(
            loaded.model, tokenizer=loaded.tokenizer, reference=reference,
            device=loaded.model.device,
        )  # fmt: skip
        judge: ScorerJudge | StepJudge | None = None
        ids_of = partial(_ids, loaded.tokenizer, self.text_format, self.raw)
        if self.scorer is not None:
            scorer = served or open_scorer(
                self.scorer, reading, device=self.scorer_device or self.device,
                dtype=self.dtype, policy=loaded,
            )  # fmt: skip
            if isinstance(scorer, StepScorer):
                reread = self._rereader()
                judge = StepJudge(scorer, loaded.tokenizer, reread.text_of)
                return SearchJob(plan, generator, judge, partial(reread.noted, ids_of), run, skip)
            if not self.raw:
                warn_of_another_format(
                    loaded.tokenizer, self.text_format, known_as(scorer, self.scorer),
                    self.reading.bos,
                )  # fmt: skip
            judge = ScorerJudge(scorer, terminals=generator.eos_token_ids)
        return SearchJob(plan, generator, judge, ids_of, run, skip)

    def _rereader(self) -> Rereader:
        """The prompts as a process reward model reads them."""
        assert self.scorer is not None
        if self.raw:
            raise Refusal(f"--raw came with --scorer {self.scorer}, a process reward model, which "
                          "reads chats in its own format: drop it")  # fmt: skip
        reading = self.reading
        own = load_tokenizer(
            self.scorer, self.scorer, adapter=reading.adapter, revision=reading.revision,
            trust_remote_code=reading.trust_remote_code, gguf_file=reading.gguf_file,
        )  # fmt: skip
        return Rereader(own, format_of(None, find(self.scorer)))


@dataclass(frozen=True, slots=True)
class Rereader:
    """The prompts of a run in a judge's own format, by the policy's token ids.

    text_format: the judge's, as `chats.prompt_text` takes it.
    """

    tokenizer: PreTrainedTokenizerBase
    text_format: str | None
    texts: dict[tuple[int, ...], str] = field(default_factory=dict)

    def noted(self, ids_of: Callable[[Messages], list[int]], messages: Messages) -> list[int]:
        """The policy's token ids of a conversation; from then on the judge has it, too."""
        ids = ids_of(messages)
        self.texts[tuple(ids)] = prompt_text(self.tokenizer, self.text_format, messages)
        return ids

    def text_of(self, prompt: tuple[int, ...]) -> str:
        """The text that the judge reads of a prompt."""
        return self.texts[prompt]


def _ids(
    tokenizer: PreTrainedTokenizerBase, text_format: str | None, raw: bool, messages: Messages
) -> list[int]:
    """The token ids that the policy continues. Raises Refusal: several messages as raw text."""
    if not raw:
        return prompt_ids(tokenizer, text_format, messages)
    if len(messages) > 1:
        raise Refusal(f"--raw takes text, and this chat has {len(messages)} messages")
    return raw_ids(tokenizer, text_format, messages[0]["content"])
