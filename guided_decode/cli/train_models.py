"""The models of `train-critic`: the policy, what draws with it, and who judges."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guided_decode.checkpoints.registry import find
from guided_decode.cli.answer_option import read_answer
from guided_decode.cli.checkpoints import Policy, load_policy, load_tokenizer, open_scorer
from guided_decode.cli.engine_options import EngineOptions
from guided_decode.cli.errors import Refusal
from guided_decode.cli.judge_options import JudgeOptions, check_judging
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.cli.remote_options import RemoteOptions
from guided_decode.cli.rollout_ids import RolloutReader
from guided_decode.cli.rollout_judges import AnswerKey, FunctionJudge, ModelJudge, RewardJudge
from guided_decode.cli.score_run import identity
from guided_decode.cli.search_engines import connect, ends_of, start_vllm
from guided_decode.cli.search_judges import JudgeModels
from guided_decode.cli.train_options import RewardOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from guided_decode.cli.search_run import AnyGenerator
    from guided_decode.scorer import Scorer


@dataclass(slots=True)
class TrainModels:
    """What was asked for, loaded when it is first needed.

    text_format, raw: of the policy's prompts, as of `RolloutReader`. reading, remote, judging: of
    the reward model.
    """

    policy: str
    device: str | None
    dtype: str
    text_format: str | None
    raw: bool
    engine: EngineOptions
    reading: ScorerOptions
    remote: RemoteOptions
    judging: JudgeOptions
    _loaded: Policy | None = field(default=None, init=False)
    _tokenizer: PreTrainedTokenizerBase | None = field(default=None, init=False)

    @property
    def known_as(self) -> str:
        """What the policy is loaded by, wherever one stands."""
        record = find(self.policy)
        if Path(self.policy).exists():
            return str(Path(self.policy).resolve())
        return self.policy if record is None else record.name

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's. Raises Refusal: it has none."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(
                self.policy, f"policy {self.policy}", trust_remote_code=self._trusted
            )
        return self._tokenizer

    @property
    def loaded(self) -> Policy:
        """The policy, with its weights. Raises Refusal: it cannot be loaded."""
        if self._loaded is None:
            self._loaded = load_policy(
                self.policy, self.device, self.dtype, trust_remote_code=self._trusted
            )
        return self._loaded

    @property
    def terminals(self) -> set[int]:
        """What ends the policy's responses."""
        return ends_of(self.policy, self.tokenizer, trust_remote_code=self._trusted)

    def reader(self) -> RolloutReader:
        """What makes token ids of lines."""
        size = len(self.tokenizer)
        if self._loaded is not None:
            size = int(self._loaded.model.config.get_text_config().vocab_size)
        return RolloutReader(self.tokenizer, self.text_format, self.raw, self.terminals, size)

    def generator(self) -> AbstractContextManager[AnyGenerator]:
        """What draws responses. Raises Refusal, ValueError or EndpointError: it is not there."""
        connected = connect(self.engine, self.policy, trust_remote_code=self._trusted)
        if connected is not None:
            return connected
        if self.engine.on_vllm:
            return start_vllm(
                self.engine, self.policy, self.tokenizer, self.dtype,
                trust_remote_code=self._trusted,
            )  # fmt: skip
        from guided_decode.search.local import load_generator

        return load_generator(
            self.loaded.model, tokenizer=self.tokenizer, eos_token_ids=self.terminals,
            device=self.loaded.model.device,
        )  # fmt: skip

    def judge(self, rewards: RewardOptions) -> RewardJudge:
        """Who values responses. Raises Refusal or ValueError: there is no such judge."""
        if rewards.judge is not None:
            return FunctionJudge.of(rewards.judge)
        if rewards.answer is not None:
            return AnswerKey(read_answer(rewards.answer))
        assert rewards.reward_model is not None
        name = rewards.reward_model
        asked = self._judge_models(name)
        served = asked.served(self.policy)
        policy = Policy(self.policy, None, self.tokenizer, find(self.policy))
        judge, tell = asked.judge(served, policy, self.reading, self.terminals)
        return ModelJudge(name, judge, tell, self.reader(), self.judge_identity(rewards))

    def _judge_models(self, name: str) -> JudgeModels:
        return JudgeModels(
            name, self.reading, self.remote, self.judging, self.device, "auto", self.text_format,
            self.raw,
        )  # fmt: skip

    def check_judging(self, rewards: RewardOptions) -> None:
        """Raises Refusal: an option of scorers has nothing to say."""
        given = [f"--{name.replace('_', '-')}" for name in self.reading.given()
                 if name != "trust_remote_code"] + self.judging.given()  # fmt: skip
        if rewards.reward_model is None:
            if given:
                raise Refusal(f"{given[0]} says how a reward model is read, and none was given: "
                              "pass --reward-model, or drop it")  # fmt: skip
            return
        try:
            check_judging(rewards.reward_model, self.reading, self.judging)
        except Refusal as error:
            raise Refusal(str(error).replace("--scorer ", "--reward-model ")) from error

    def judge_identity(self, rewards: RewardOptions, *, ask: bool = False) -> str:
        """What rewards follow from, by name, before any model is loaded.

        Of a reward model on a server it is the address; with `ask` also the name that the server
        has for its weights, for which it has to be there.

        Raises as `open_scorer`, or as `connect_judge`: it was to be asked, and there is none.
        """
        if rewards.judge is not None:
            return FunctionJudge.of(rewards.judge).known_as
        if rewards.answer is not None:
            return AnswerKey(read_answer(rewards.answer)).known_as
        assert rewards.reward_model is not None
        from guided_decode.cli.judge_options import pooling_urls
        from guided_decode.scoring.remote.address import is_address

        name, through = rewards.reward_model, [self.judging.judge_through_text,
                                               self.judging.judge_format]  # fmt: skip
        if is_address(name) or pooling_urls(name):
            own = f"{name} {through} {sorted(self.reading.given().items())}"
            if not ask:
                # What it has judged outlives it: a training goes on without it.
                return own
            served: Any = self._judge_models(name).served(self.policy)
            known = getattr(served, "read_as", None) or getattr(served, "described", None)
            served.close()
            return f"{own} {known}"
        return identity(name, self.reading, self.device, "auto", {"through_text": through})

    def reward_scorer(self, rewards: RewardOptions) -> Scorer:
        """The reward model as a scorer of the policy's own token ids, for scores of prefixes."""
        assert rewards.reward_model is not None
        policy = Policy(self.policy, None, self.tokenizer, None)
        return open_scorer(
            rewards.reward_model, self.reading, device=self.device, policy=policy,
            remote=self.remote,
        )  # fmt: skip

    @property
    def _trusted(self) -> bool:
        return self.reading.trust_remote_code

    def drawn_by(self) -> dict[str, Any]:
        """What draws, from which responses follow."""
        if self.engine.on_servers:
            return {"served": self.engine.served_model or "the only model"}
        if self.engine.on_vllm:
            return {"engine": sorted(self.engine.arguments().items()), "dtype": self.dtype}
        return {"dtype": self.dtype}
