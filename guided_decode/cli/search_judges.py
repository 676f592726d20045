"""The judge of `search`: a scorer here, on a scorer server, on pooling servers; through text."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from guided_decode.checkpoints.registry import find
from guided_decode.cli.chat_rows import Messages
from guided_decode.cli.chats import format_of, prompt_text
from guided_decode.cli.checkpoints import Policy, known_as, load_tokenizer, location, open_scorer
from guided_decode.cli.errors import Refusal, one_line
from guided_decode.cli.judge_options import JudgeOptions, pooling_urls, refuse_format
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.prompt_formats import warn_of_another_format
from guided_decode.cli.remote_options import RemoteOptions
from guided_decode.scoring.remote.address import is_address

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from guided_decode.scorer import Scorer
    from guided_decode.scoring.step_scorer import StepScorer
    from guided_decode.search.judges import ScorerJudge
    from guided_decode.search.pooling_judge import PoolingJudge
    from guided_decode.search.step_judge import StepJudge
    from guided_decode.search.text_judge import TextJudge

    AnyJudge = ScorerJudge | PoolingJudge | TextJudge | StepJudge

# Says what a prompt's token ids stand for, to a judge that reads text.
Tell = Callable[[list[int], Messages], None]

_NO_FORMAT = (
    "{} is not registered and its tokenizer has no chat template: pass --judge-format, the format "
    "that it was trained on"
)
_HINT = "or pass --judge-through-text, with which the scorer reads responses as text"


@dataclass(frozen=True, slots=True)
class JudgeModels:
    """What was asked for about the scorer. text_format, raw: of the policy's prompts."""

    scorer: str
    reading: ScorerOptions
    remote: RemoteOptions
    judging: JudgeOptions
    device: str | None
    dtype: str
    text_format: str | None
    raw: bool

    def served(self, policy: str) -> Scorer | PoolingJudge | None:
        """What a server has, asked before the policy is loaded; None where it is none.

        Raises as `open_scorer`, or as `connect_judge`.
        """
        urls = pooling_urls(self.scorer)
        if not urls and not is_address(self.scorer):
            return None
        own = load_tokenizer(
            policy, f"policy {policy}", trust_remote_code=self.reading.trust_remote_code
        )
        if urls:
            return self._connected(urls, own)
        return self._opened(Policy(policy, None, own, None))

    def judge(
        self, served: Scorer | PoolingJudge | None, policy: Policy, reading: ScorerOptions,
        terminals: Collection[int],
    ) -> tuple[AnyJudge, Tell | None]:  # fmt: skip
        """The judge, and what it is to be told of prompts; what is not there yet is loaded.

        Args:
            served: as `served` found it. policy: whose responses are judged.
            reading: how the scorer is read, without what the method has itself.
            terminals: token ids that end a response.
        """
        from guided_decode.scoring.step_scorer import StepScorer
        from guided_decode.search.judges import ScorerJudge
        from guided_decode.search.pooling_judge import PoolingJudge
        from guided_decode.search.text_judge import TextJudge

        through = self.judging.judge_through_text
        own: Collection[int] = () if through else terminals
        if isinstance(served, PoolingJudge):
            served.add_terminals(own)
            judge: ScorerJudge | PoolingJudge = served
            known, tokenizer = served.described.name, served.described.tokenizer
        else:
            scorer = served or self._opened(policy, reading)
            if isinstance(scorer, StepScorer):
                return self._of_steps(scorer, policy)
            judge = ScorerJudge(scorer, terminals=own)
            known = self.judging.scorer_checkpoint or known_as(scorer, self.scorer)
            tokenizer = self._tokenizer(known) if through else None
        if not through:
            refuse_format(self.judging.judge_format)
            if not self.raw:
                warn_of_another_format(policy.tokenizer, self.text_format, known, self.reading.bos)
            return judge, None
        if tokenizer is None:
            raise Refusal(f"{known} has no tokenizer, in whose tokens it would read text: pass "
                          "--scorer-checkpoint, a folder or Hub id that has it")  # fmt: skip
        its_format = format_of(self.judging.judge_format, find(known))
        if its_format is None and not tokenizer.chat_template and not self.raw:
            raise Refusal(_NO_FORMAT.format(known))
        reader = TextJudge(
            judge, tokenizer, policy_tokenizer=policy.tokenizer, terminals=terminals,
            prompt_format=its_format,
        )  # fmt: skip
        return reader, partial(_tell, reader, self.raw)

    def _of_steps(self, scorer: StepScorer, policy: Policy) -> tuple[AnyJudge, Tell]:
        """A process reward model, which reads text in any case."""
        from guided_decode.search.step_judge import StepJudge

        for given, flag in ((self.raw, "--raw"),
                            (self.judging.judge_through_text, "--judge-through-text")):  # fmt: skip
            if given:
                raise Refusal(f"{flag} came with --scorer {self.scorer}, a process reward model, "
                              "which reads chats as text in its own format: drop it")  # fmt: skip
        tokenizer = self._tokenizer(self.scorer)
        its_format = format_of(self.judging.judge_format, find(self.scorer))
        if its_format is None and not tokenizer.chat_template:
            raise Refusal(_NO_FORMAT.format(self.scorer))
        prompts = Rereader(tokenizer, its_format)
        return StepJudge(scorer, policy.tokenizer, prompts.text_of), prompts.tell

    def _opened(self, policy: Policy, reading: ScorerOptions | None = None) -> Scorer:
        from guided_decode.checkpoints.tokenizer_match import TokenizersDiffer

        remote: dict[str, Any] = {"remote": self.remote} if is_address(self.scorer) else {}
        try:
            return open_scorer(
                self.scorer, reading or self.reading, device=self.device, dtype=self.dtype,
                policy=None if self.judging.judge_through_text else policy, **remote,
            )  # fmt: skip
        except TokenizersDiffer as error:
            raise Refusal(f"{one_line(error)}; {_HINT}") from error

    def _tokenizer(self, known: str) -> PreTrainedTokenizerBase:
        given = self.reading
        return load_tokenizer(
            known, f"scorer {known}", adapter=given.adapter, revision=given.revision,
            trust_remote_code=given.trust_remote_code, gguf_file=given.gguf_file,
        )  # fmt: skip

    def _connected(self, urls: list[str], policy: PreTrainedTokenizerBase) -> PoolingJudge:
        from guided_decode.checkpoints.tokenizer_match import TokenizersDiffer
        from guided_decode.search.http_access import api_key_of
        from guided_decode.search.judges import ScorerJudge
        from guided_decode.search.pooling_connection import connect_judge

        if self.remote.key_file is not None:
            raise Refusal("--key-file is of a scorer server (tcp://HOST:PORT): pooling servers "
                          "take an API key, --scorer-api-key-env")  # fmt: skip
        judging, reading = self.judging, self.reading.given()
        reward, checkpoint = reading.pop("reward", None), judging.scorer_checkpoint
        # Of a KL term, which the method has.
        reading.pop("reference", None)
        key = api_key_of(judging.scorer_api_key_env)
        how: dict[str, Any] = {"api_key": key}
        if self.remote.timeout is not None:
            how["timeout"] = self.remote.timeout
        if judging.scorer_concurrency is not None:
            how["concurrency"] = judging.scorer_concurrency
        if checkpoint is not None:
            location(checkpoint)
        of_ends: ScorerJudge | PoolingJudge | None = None
        tokenizer = None if judging.judge_through_text else policy
        try:
            if reward is not None and pooling_urls(reward):
                of_ends = connect_judge(pooling_urls(reward), policy_tokenizer=tokenizer, **how)
            elif reward is not None:
                of_ends = ScorerJudge(
                    open_scorer(
                        reward, ScorerOptions(), device=self.device, dtype=self.dtype,
                        policy=None if tokenizer is None else Policy("", None, tokenizer, None),
                    )
                )  # fmt: skip
            return connect_judge(
                urls, checkpoint, model=judging.scorer_served_name, reward=of_ends,
                policy_tokenizer=tokenizer, **how, **reading,
            )  # fmt: skip
        except TokenizersDiffer as error:
            raise Refusal(f"{one_line(error)}; {_HINT}") from error


@dataclass(frozen=True, slots=True)
class Rereader:
    """The prompts of a run in a judge's own format, by the policy's token ids.

    text_format: the judge's, as `chats.prompt_text` takes it.
    """

    tokenizer: PreTrainedTokenizerBase
    text_format: str | None
    texts: dict[tuple[int, ...], str] = field(default_factory=dict)

    def tell(self, ids: list[int], messages: Messages) -> None:
        """What the policy's token ids stand for."""
        self.texts[tuple(ids)] = prompt_text(self.tokenizer, self.text_format, messages)

    def text_of(self, prompt: tuple[int, ...]) -> str:
        """The text that the judge reads of a prompt."""
        return self.texts[prompt]


def _tell(judge: TextJudge, raw: bool, ids: list[int], messages: Messages) -> None:
    judge.tell(ids, messages[0]["content"] if raw else messages)
