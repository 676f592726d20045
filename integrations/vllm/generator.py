"""A policy on vLLM in this process, for searches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm import LLM, SamplingParams

from guided_decode.search.draws import Draw, Draws, checked
from guided_decode.search.engine_stats import EngineStats
from guided_decode.search.likeliest import likeliest_of
from guided_decode.search.policy_text import PolicyText
from guided_decode.search.requests import Continuation, NextTokens, Reason, Sampling, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MODE = "raw_logprobs"
_WHOLE = -1


class VllmGenerator(PolicyText):
    """A policy that vLLM decodes: one call of `LLM.generate` for all that a call asks for.

    Each continuation is a request with a seed of its own, so that what is asked beside it changes
    nothing but the rounding of logits. Branches share what they have in common by vLLM's prefix
    cache, block by block.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eos_token_ids: Collection[int] | None = None,
    ) -> None:
        """
        Args:
            llm: an engine that generates; whoever made it ends it.
            tokenizer: for text; None: the engine's own, where it has one.
            eos_token_ids: what ends a response; None: what the engine itself ends at.

        Raises ValueError: nothing ends a response; the engine's log-probabilities are not the
        policy's own.
        """
        config = llm.llm_engine.model_config
        if config.logprobs_mode != _MODE:
            raise ValueError(
                f"the engine has logprobs_mode={config.logprobs_mode!r}, and a search needs the "
                f"policy's own log-probabilities: build it with LLM(..., logprobs_mode={_MODE!r})"
            )
        if tokenizer is None and not config.skip_tokenizer_init:
            own: Any = llm.get_tokenizer()
            tokenizer = own
        if eos_token_ids is None:
            eos_token_ids = _ends(config, tokenizer)
        if not eos_token_ids:
            raise ValueError("the engine's model names no end-of-sequence token: pass "
                             "eos_token_ids=, the ids that end a response")  # fmt: skip
        super().__init__(tokenizer, eos_token_ids)
        self.stats = EngineStats()
        self._llm: LLM = llm
        self._reads_text = not config.skip_tokenizer_init
        self._vocabulary: int = config.get_vocab_size()
        self._longest: int = config.max_model_len
        self._most_log_probs: int = config.max_logprobs

    def extend(
        self,
        prefixes: Sequence[Sequence[int]],
        n: Sequence[int],
        *,
        max_tokens: Sequence[int],
        sampling: Sequence[Sampling],
        seeds: Sequence[int],
    ) -> list[list[Continuation]]:
        """As `requests.Generator.extend`.

        Raises ValueError: an empty prefix, a token outside the vocabulary, more tokens than the
        engine's max_model_len; stop strings, of an engine without a tokenizer.
        """
        draws = Draws.of(prefixes, n, max_tokens, sampling, seeds)
        outputs = self._generate(
            [draw.prefix for draw in draws.each], [self._params(draw) for draw in draws.each]
        )
        answers = [
            self._continuation(draw, output)
            for draw, output in zip(draws.each, outputs, strict=True)
        ]
        return draws.answered(answers)

    def next_tokens(
        self,
        prefixes: Sequence[Sequence[int]],
        k: Sequence[int],
        *,
        temperatures: Sequence[float],
        references: Sequence[bool],
        entropies: Sequence[bool] | None = None,
    ) -> list[NextTokens]:
        """As `requests.TokenGenerator.next_tokens`.

        A temperature other than 1 and an entropy follow from the whole distribution, which an
        engine with max_logprobs=-1 tells.

        Raises ValueError: as `extend`; a reference is wanted; the engine tells fewer than needed.
        """
        if any(references):
            raise ValueError(
                "a KL term needs the reference's log-probabilities, which vLLM does not have: run "
                "the policy by load_generator(..., reference=)"
            )
        rows = [checked(prefix, row) for row, prefix in enumerate(prefixes)]
        wanted = [False] * len(rows) if entropies is None else entropies
        whole = [
            heat != 1.0 or entropy or most >= self._vocabulary
            for most, heat, entropy in zip(k, temperatures, wanted, strict=True)
        ]
        self._check_log_probs(k, whole)
        outputs = self._generate(rows, [
            SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, flat_logprobs=True,
                           logprobs=_WHOLE if all_of_it else most)
            for most, all_of_it in zip(k, whole, strict=True)
        ])  # fmt: skip
        return [
            likeliest_of(_told(output), most, heat, self.eos_token_ids, whole=all_of_it)
            for output, most, heat, all_of_it in zip(outputs, k, temperatures, whole, strict=True)
        ]

    def _params(self, draw: Draw) -> SamplingParams:
        how = draw.sampling
        if how.stop and not self._reads_text:
            raise ValueError(f"stop={how.stop!r}: the engine was built with skip_tokenizer_init, "
                             "and reads no text")  # fmt: skip
        return SamplingParams(
            temperature=how.temperature, top_p=how.top_p, seed=draw.seed,
            max_tokens=draw.max_tokens, stop_token_ids=sorted(self.eos_token_ids), logprobs=0,
            stop=list(how.stop), detokenize=bool(how.stop), skip_special_tokens=False,
        )  # fmt: skip

    def _generate(self, rows: Sequence[Tokens], params: Sequence[SamplingParams]) -> list[Any]:
        """One finished output each. Raises ValueError: a prefix that the engine has no place for.

        Before anything is asked: the engine would go on with what came before it.
        """
        for row, prefix in enumerate(rows):
            if max(prefix) >= self._vocabulary:
                raise ValueError(f"row {row} has token id {max(prefix)}, outside the policy's "
                                 f"vocabulary of {self._vocabulary}")  # fmt: skip
            if len(prefix) >= self._longest:
                raise ValueError(
                    f"row {row} has {len(prefix)} tokens, and the engine's max_model_len "
                    f"{self._longest} leaves no room for one more"
                )
        if not rows:
            return []
        prompts: list[Any] = [{"prompt_token_ids": list(prefix)} for prefix in rows]
        found = [one.outputs[0] for one in self._llm.generate(prompts, params, use_tqdm=False)]
        self.stats.add(requests=len(rows), prompt_tokens=sum(map(len, rows)),
                       generated_tokens=sum(len(one.token_ids) for one in found))  # fmt: skip
        return found

    def _continuation(self, draw: Draw, output: Any) -> Continuation:
        tokens = tuple(output.token_ids)
        log_probs = tuple(
            float(told[token].logprob) for token, told in zip(tokens, output.logprobs, strict=True)
        )
        return Continuation(tokens, log_probs, self._reason(draw, tokens, output))

    def _reason(self, draw: Draw, tokens: Tokens, output: Any) -> Reason:
        if tokens and tokens[-1] in self.eos_token_ids:
            return "eos"
        if output.finish_reason == "stop" and output.stop_reason in draw.sampling.stop:
            return "stop"
        if output.finish_reason == "stop":
            raise ValueError(
                f"vLLM ended a response at token {tokens[-1]}, which ends none here "
                f"({', '.join(map(str, sorted(self.eos_token_ids)))} do): pass eos_token_ids=, all "
                "that do"
            )
        if output.finish_reason != "length":
            raise RuntimeError(f"vLLM ended a response by {output.finish_reason!r}")
        if len(tokens) < draw.max_tokens:
            raise ValueError(
                f"{len(draw.prefix)} tokens and {draw.max_tokens} more do not fit: the engine's "
                f"max_model_len is {self._longest}"
            )
        return "length"

    def _check_log_probs(self, k: Sequence[int], whole: Sequence[bool]) -> None:
        most = self._vocabulary if self._most_log_probs == -1 else self._most_log_probs
        if any(whole) and most < self._vocabulary:
            raise ValueError(
                f"this needs whole next-token distributions, and the engine has "
                f"max_logprobs={self._most_log_probs}: build it with LLM(..., max_logprobs=-1)"
            )
        if not any(whole) and max(k, default=0) > most:
            raise ValueError(
                f"the {max(k)} likeliest next tokens are asked for, and the engine has "
                f"max_logprobs={self._most_log_probs}: build it with LLM(..., max_logprobs=-1)"
            )


def load_vllm_generator(
    model: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eos_token_ids: Collection[int] | None = None,
    **engine: Any,
) -> VllmGenerator:
    """A policy on a new engine, which `close` ends.

    Args:
        model: a folder or Hub id.
        tokenizer, eos_token_ids: as of `VllmGenerator`.
        engine: arguments of `vllm.LLM`: tensor_parallel_size, gpu_memory_utilization, ... It tells
            whole distributions and has a prefix cache unless these say otherwise.

    Raises ValueError: as `VllmGenerator`, or as `LLM`.
    """
    settings = {"max_logprobs": -1, "enable_prefix_caching": True, "disable_log_stats": True}
    llm = LLM(model=model, **{**settings, **engine})
    try:
        return _Owner(llm, tokenizer=tokenizer, eos_token_ids=eos_token_ids)
    except BaseException:
        _end(llm)
        raise


class _Owner(VllmGenerator):
    """One that made its engine."""

    def close(self) -> None:
        """Ends the engine."""
        _end(self._llm)


def _end(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()


def _ends(config: Any, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """What vLLM ends a response at: the generation config's ids, and the tokenizer's."""
    own = config.try_get_generation_config().get("eos_token_id")
    ids = [*own] if isinstance(own, (list, tuple)) else [own]
    ids.append(None if tokenizer is None else tokenizer.eos_token_id)
    return {each for each in ids if each is not None}


def _told(output: Any) -> Mapping[int, float]:
    """The log-probabilities of the next token, by id, those of no probability left out."""
    flat = output.logprobs
    first = slice(flat.start_indices[0], flat.end_indices[0])
    told = zip(flat.token_ids[first], flat.logprobs[first], strict=True)
    return {token: value for token, value in told if value > float("-inf")}
