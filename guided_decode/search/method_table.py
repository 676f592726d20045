"""The methods by their published names, each with the settings that it has and their defaults."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any

from guided_decode.search.methods.best_of_n import best_of_n
from guided_decode.search.methods.blockwise import Blocks, block_search
from guided_decode.search.methods.mcts_tree import MCTS
from guided_decode.search.methods.ppo_mcts import ppo_mcts
from guided_decode.search.methods.refill import prune_and_refill
from guided_decode.search.methods.segment_rejection import Segments, segment_rejection
from guided_decode.search.methods.smc import sequential_monte_carlo
from guided_decode.search.methods.vote import Answer, vote
from guided_decode.search.requests import Sampling
from guided_decode.search.result import Search

# The default of a setting that has none.
NEEDED: Any = inspect.Parameter.empty
# What `Method.begin` takes by itself.
_OWN = ("prompt", "max_tokens", "seed", "answer", "sampling")


@dataclass(frozen=True, slots=True)
class Method:
    """A search method under a name.

    function: what it runs. shape: the record of settings that the function takes after the prompt:
    the class, or the preset itself. fixed: arguments that its name says. preset: other defaults
    than the function's. judged: whether it asks a judge.
    """

    name: str
    summary: str
    function: Callable[..., Search]
    shape: Any = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    preset: Mapping[str, Any] = field(default_factory=dict)
    judged: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings by name, with their defaults; NEEDED where there is none."""
        known: dict[str, Any] = {}
        if self.shape is not None:
            known = {each.name: self._default(each) for each in fields(self.shape)}
        own = self._parameters
        known |= {
            name: each.default for name, each in own.items()
            if each.kind is each.KEYWORD_ONLY and name not in (*_OWN, *self.fixed)
        }  # fmt: skip
        if "sampling" in own:
            known |= {each.name: each.default for each in fields(Sampling)}
        return {**known, **self.preset}

    @property
    def max_tokens(self) -> int:
        """The most tokens of a response, where nothing else is asked for."""
        most: int = self._parameters["max_tokens"].default
        return most

    @property
    def votes(self) -> bool | None:
        """Whether it needs the answers in responses; None: it can do with them and without."""
        answer = self._parameters.get("answer")
        return False if answer is None else True if answer.default is NEEDED else None

    def per_token(self, given: Mapping[str, Any]) -> bool:
        """Whether it values single tokens at these settings, which a judge of text refuses."""
        return self.function is ppo_mcts or self.checked(given).get("block") == 1

    def begin(
        self,
        prompt: Sequence[int],
        *,
        seed: int = 0,
        max_tokens: int | None = None,
        answer: Answer | None = None,
        **given: Any,
    ) -> Search:
        """The method on a prompt, with other settings than the defaults.

        Args:
            prompt: token ids.
            seed: of all draws.
            max_tokens: of one response; None is the method's default.
            answer: the answer in a response's token ids.
            given: of `settings`, by name.

        Raises ValueError: a setting that the method has not; one that it needs is missing. The
        search itself raises at its first step where one has no meaning.
        """
        settings = self.checked(given)
        if self.votes is False and answer is not None:
            raise ValueError(f"answer=...: {self.name} takes no vote: drop it")
        if self.votes and answer is None:
            raise ValueError(f"{self.name} votes on answers: pass answer=, a function that finds "
                             "the answer in a response")  # fmt: skip
        arguments: list[Any] = [prompt]
        if self.shape is not None:
            own = {each.name: settings.pop(each.name) for each in fields(self.shape)}
            arguments.append(
                self.shape(**own) if isinstance(self.shape, type) else replace(self.shape, **own)
            )
        if "sampling" in self._parameters:
            how = {each.name: settings.pop(each.name) for each in fields(Sampling)}
            settings["sampling"] = Sampling(**how)
        if self.votes is not False:
            settings["answer"] = answer
        most = self.max_tokens if max_tokens is None else max_tokens
        return self.function(*arguments, max_tokens=most, seed=seed, **self.fixed, **settings)

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings: those given, and the defaults of the others. Raises ValueError: `begin`."""
        known = self.settings
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"{name}={value!r}: {self.name} has no such setting; it has "
                                 f"{', '.join(known)}")  # fmt: skip
        settings = {**known, **given}
        for name, value in settings.items():
            if value is NEEDED:
                raise ValueError(f"{self.name} needs {name}=, which has no default")
        return settings

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    def _default(self, setting: Any) -> Any:
        if not isinstance(self.shape, type):
            return getattr(self.shape, setting.name)
        assert is_dataclass(self.shape)
        return NEEDED if setting.default is MISSING else setting.default


METHODS = {
    method.name: method
    for method in (
        Method("best-of-n", "n responses, the one with the highest value", best_of_n),
        Method("vote", "n responses, the answer that most of them have", vote,
               fixed={"weighted": False}, judged=False),
        Method("weighted-vote", "n responses, the answer with the largest sum of values", vote,
               fixed={"weighted": True}),
        Method("block", "beams of blocks, the best of which go on", block_search, Blocks()),
        Method("cd", "the best of K blocks by V (2310.17022)", block_search, Blocks.cd()),
        Method("vgs", "value-guided search (2505.17373)", block_search, Blocks.vgs()),
        Method("dvts", "diverse verifier tree search: trees of steps", block_search, Blocks.dvts(),
               preset={"temperature": 0.8, "stop": ("\n\n",)}),
        Method("chunk-beam", "beam search by chunks, for implicit rewards (2405.19262)",
               block_search, Blocks.chunk_beam()),
        Method("value-beam", "beam search by value, token by token", block_search,
               Blocks.value_beam()),
        Method("prune-and-refill", "what falls behind branches from what does well (2608.08020)",
               prune_and_refill),
        Method("smc", "particles weighted by exp(beta V), resampled (2404.17546)",
               sequential_monte_carlo),
        Method("cards", "segments drawn again until they pass a threshold (2406.16306)",
               segment_rejection, Segments),
        Method("ppo-mcts", "a tree search for each token (2309.15028)", ppo_mcts, MCTS()),
        Method("ppo-mcts-published", "the same as its published code has it", ppo_mcts,
               MCTS.published()),
    )
}  # fmt: skip


def find_method(name: str) -> Method:
    """The method of a name. Raises ValueError: there is none."""
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"method={name}: unknown{hint}; expected one of {', '.join(METHODS)}")
    return METHODS[name]
