"""The models of `search`: which they are, what they are known by, and what they answer with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from guided_decode.checkpoints.registry import find
from guided_decode.cli.ahead_file import Ahead
from guided_decode.cli.chat_rows import Messages
from guided_decode.cli.chats import prompt_ids, raw_ids
from guided_decode.cli.checkpoints import (
    DEFAULT_POLICY,
    Policy,
    load_policy,
    location,
    pair,
    parse_dtype,
)
from guided_decode.cli.engine_options import EngineOptions
from guided_decode.cli.errors import Refusal
from guided_decode.cli.judge_options import JudgeOptions, pooling_urls
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.remote_options import RemoteOptions
from guided_decode.cli.run_identity import fingerprint, run_identity
from guided_decode.cli.score_run import identity
from guided_decode.cli.search_engines import connect, policy_tokenizer, start_vllm
from guided_decode.cli.search_judges import JudgeModels, Tell
from guided_decode.cli.search_plan import Plan
from guided_decode.cli.search_run import SearchJob
from guided_decode.scoring.remote.address import is_address

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from guided_decode.cli.search_run import AnyGenerator
    from guided_decode.scorer import Scorer
    from guided_decode.search.pooling_judge import PoolingJudge
    from guided_decode.search.servers.generator import ServerGenerator


class Identified(Protocol):
    """What is done for each prompt, as far as lines follow from it."""

    @property
    def settings(self) -> dict[str, Any]:
        """Of a search's method; kl_coef alone is looked at."""
        ...

    def identity(self) -> dict[str, Any]:
        """From what a line follows, by name."""
        ...


def named(
    plan: Plan, policy: str | None, scorer: str | None, reading: ScorerOptions
) -> tuple[str, str | None]:
    """Policy and scorer as `checkpoints.pair`; no scorer where the method asks none.

    Raises Refusal: as `pair`; a scorer was given that nothing would ask.
    """
    if (kl_coef := plan.settings.get("kl_coef")) and reading.reference is None:
        raise Refusal(f"--kl-coef {kl_coef} needs --reference, the model that the policy was tuned "
                      "from")  # fmt: skip
    if reading.reference is not None and not kl_coef and not _may_be_implicit(scorer, reading):
        raise Refusal(f"--reference {reading.reference} is of a KL term (--kl-coef), or of an "
                      "implicit reward, which the scorer is not: drop it")  # fmt: skip
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


def _may_be_implicit(scorer: str | None, reading: ScorerOptions) -> bool:
    """Whether the scorer may be a pair of language models, as far as its name and kind say."""
    if scorer is None or reading.given().get("kind") is not None:
        return reading.kind in (None, "auto", "implicit")
    record = None if _on_a_server(scorer) else find(scorer)
    return not _on_a_server(scorer) and (record is None or record.kind in (None, "implicit"))


def loads_scorer(scorer: str | None, reading: ScorerOptions) -> bool:
    """Whether this process loads a scorer, or a reward model beside one that is served."""
    names = (scorer, reading.reward)
    return any(each is not None and not _on_a_server(each) for each in names)


def _on_a_server(name: str) -> bool:
    return bool(pooling_urls(name)) or is_address(name)


# The one of the scorer's options that a policy is loaded with, too.
_OF_BOTH = "trust_remote_code"


@dataclass(frozen=True, slots=True)
class SearchModels:
    """What was asked for. text_format: of prompts, as `chats.prompt_ids`; raw: they are text.

    kl_reference: of the method's KL term, where it is another than the reading's reference.
    """

    policy: str
    scorer: str | None
    reading: ScorerOptions
    remote: RemoteOptions
    device: str | None
    scorer_device: str | None
    dtype: str
    text_format: str | None
    raw: bool
    judging: JudgeOptions
    engine: EngineOptions
    kl_reference: str | None = None

    @property
    def _judges(self) -> JudgeModels:
        assert self.scorer is not None
        return JudgeModels(
            self.scorer, self.reading, self.remote, self.judging, self.scorer_device or self.device,
            self.dtype, self.text_format, self.raw,
        )  # fmt: skip

    def served(self) -> Scorer | PoolingJudge | None:
        """The scorer of servers; None where it is none. Raises as `JudgeModels.served`."""
        return None if self.scorer is None else self._judges.served(self.policy)

    def connected(self) -> ServerGenerator | None:
        """The policy on its servers; None where it is on none. Raises as `connect`."""
        return connect(self.engine, self.policy, trust_remote_code=self.reading.trust_remote_code)

    def _without_weights(self) -> Policy:
        """The policy's name and tokenizer; what has its weights is another."""
        own = policy_tokenizer(self.policy, trust_remote_code=self.reading.trust_remote_code)
        return Policy(self.policy, None, own, None)

    def identity(
        self,
        plan: Identified,
        served: Scorer | PoolingJudge | None,
        connected: ServerGenerator | None,
    ) -> str:
        """What the output's lines follow from; finds out that a model is not there."""
        settings: dict[str, Any] = {
            **plan.identity(),
            "policy": fingerprint(self.policy),
            "policy_dtype": str(parse_dtype(self.dtype)),
            "format": self.text_format,
            "raw": self.raw,
        }
        if connected is not None:
            # Which servers, and how they are waited for, changes nothing.
            del settings["policy_dtype"]
            settings["served_policy"] = connected.served.model
        elif self.engine.on_vllm:
            settings["engine"] = sorted(self.engine.arguments().items())
        if served is not None:
            # Of its weights a server says their name.
            known = getattr(served, "read_as", None)
            settings["served"] = known or getattr(served, "described", None)
        if self.judging.judge_through_text:
            settings["through_text"] = (self.judging.judge_format, self.judging.scorer_checkpoint)
        elif self.judging.judge_format is not None:
            settings["judge_format"] = self.judging.judge_format
        if self.kl_reference is not None and plan.settings.get("kl_coef"):
            settings["kl_reference"] = fingerprint(self.kl_reference)
        if self.scorer is None or served is not None:
            return run_identity(self._beside(plan, served, settings), settings, None)
        device = self.scorer_device or self.device
        return identity(self.scorer, self.reading, device, self.dtype, settings)

    def _beside(
        self, plan: Identified, served: Scorer | PoolingJudge | None, settings: dict[str, Any]
    ) -> dict[str, str | None]:
        """The models by role that this process loads beside a scorer that is served.

        Of a reward model on servers it adds to the settings what is known.
        """
        beside = {"reference": self.reading.reference if plan.settings.get("kl_coef") else None}
        of_ends: Any = getattr(served, "reward", None)
        if hasattr(of_ends, "read_as"):
            settings["served_reward"] = of_ends.read_as
        else:
            beside["reward"] = self.reading.reward
        return beside

    def job(
        self,
        plan: Plan,
        served: Scorer | PoolingJudge | None,
        connected: ServerGenerator | None,
        ahead: Ahead,
        run: str,
        skip: bool,
    ) -> SearchJob:
        """Loads what is not there yet. Raises Refusal or ValueError: it cannot be loaded."""
        reading, reference = self.reading, None
        if plan.settings.get("kl_coef"):
            reference = self.kl_reference or reading.reference
            if not _may_be_implicit(self.scorer, reading):
                # The method's KL term has it, and not the scorer's.
                reading = replace(reading, reference=None)
        loaded, generator = self._generator(connected, reference)
        judge, tell = None, None
        if self.scorer is not None:
            judge, tell = self._judges.judge(served, loaded, reading, generator.eos_token_ids)
        ids_of = partial(policy_ids, loaded.tokenizer, self.text_format, self.raw)
        if tell is not None:
            ids_of = partial(_told, tell, ids_of)
        return SearchJob(plan, generator, judge, ids_of, run, ahead, skip)

    def _generator(
        self, connected: ServerGenerator | None, reference: str | None
    ) -> tuple[Policy, AnyGenerator]:
        """The policy, with its weights where they are here, and what decodes it."""
        if connected is not None:
            return self._without_weights(), connected
        if self.engine.on_vllm:
            policy = self._without_weights()
            return policy, start_vllm(
                self.engine, self.policy, policy.tokenizer, self.dtype,
                trust_remote_code=self.reading.trust_remote_code,
            )  # fmt: skip
        # A head on the policy's hidden states reads them with the adapter in it.
        own = self.reading.head is not None and self.policy == self.scorer
        loaded = load_policy(
            self.policy, self.device, self.dtype,
            adapter=self.reading.adapter if own else None,
            trust_remote_code=self.reading.trust_remote_code,
        )  # fmt: skip
        from guided_decode.search.local import load_generator

        return loaded, load_generator(
            loaded.model, tokenizer=loaded.tokenizer, reference=reference,
            device=loaded.model.device,
        )  # fmt: skip


def policy_ids(
    tokenizer: PreTrainedTokenizerBase, text_format: str | None, raw: bool, messages: Messages
) -> list[int]:
    """The token ids that the policy continues. Raises Refusal: several messages as raw text."""
    if not raw:
        return prompt_ids(tokenizer, text_format, messages)
    if len(messages) > 1:
        raise Refusal(f"--raw takes text, and this chat has {len(messages)} messages")
    return raw_ids(tokenizer, text_format, messages[0]["content"])


def _told(tell: Tell, ids_of: Callable[[Messages], list[int]], messages: Messages) -> list[int]:
    """The same, of which the judge knows what they stand for. Raises ValueError: it cannot."""
    ids = ids_of(messages)
    tell(ids, messages)
    return ids
