"""One prompt decoded, plain or guided, with what it cost."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guided_decode.cli.chat_rows import Messages
from guided_decode.cli.chats import prompt_ids, raw_ids
from guided_decode.cli.errors import Refusal

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from guided_decode.cli.checkpoints import Policy
    from guided_decode.guidance.config import GuidanceConfig
    from guided_decode.scorer import Scorer


# Beyond these, logits over the temperature leave float32.
_COLDEST, _HOTTEST = 1e-6, 1e6
_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; temperature 0 is greedy."""

    temperature: float = 0.0
    num_samples: int = 1
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature == 0.0 or _COLDEST <= self.temperature <= _HOTTEST):
            raise Refusal(f"--temperature {self.temperature:g}: expected 0 (greedy) or more: "
                          f"{_COLDEST:g} to {_HOTTEST:g}")  # fmt: skip
        if not (1 <= self.num_samples <= _MOST and 1 <= self.max_new_tokens <= _MOST):
            raise Refusal(
                f"--num-samples {self.num_samples}, --max-new-tokens {self.max_new_tokens}: "
                f"expected at least 1 of each, and at most {_MOST}"
            )
        if self.num_samples > 1 and self.temperature == 0.0:
            raise Refusal(
                f"--num-samples {self.num_samples} with greedy decoding gives one answer "
                f"{self.num_samples} times: pass a --temperature"
            )


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything but the prompt.

    raw: prompts are text, not chats. prompt_format: of chats; None is the policy's own template.
    """

    policy: Policy
    scorer: Scorer
    config: GuidanceConfig
    sampling: Sampling
    raw: bool
    prompt_format: str | None


@dataclass(frozen=True, slots=True)
class Decoded:
    """The samples of one prompt.

    responses: token ids, the terminal included. abstained: those that were ended because their
    value fell too low; None where nobody asked for that. policy_tokens, scorer_tokens: tokens that
    went through the models for them, the prompt counted once. seconds: on the clock.
    """

    responses: list[list[int]]
    texts: list[str]
    finished: list[bool]
    policy_tokens: int
    scorer_tokens: int
    seconds: float
    abstained: list[bool] | None = None

    def cost(self) -> dict[str, float]:
        """What it cost, by name, for JSON."""
        return {
            "policy_tokens": self.policy_tokens,
            "scorer_tokens": self.scorer_tokens,
            "seconds": round(self.seconds, 4),
        }


def ids_of(setup: Setup, messages: Messages) -> list[int]:
    """The token ids that the policy continues."""
    tokenizer = setup.policy.tokenizer
    if not setup.raw:
        return prompt_ids(tokenizer, setup.prompt_format, messages)
    if len(messages) > 1:
        raise Refusal(f"--raw takes text, and this chat has {len(messages)} messages")
    return raw_ids(tokenizer, setup.prompt_format, messages[0]["content"])


def decode(
    policy: Policy,
    prompt: list[int],
    sampling: Sampling,
    scorer: Scorer | None = None,
    config: GuidanceConfig | None = None,
    streamer: Any = None,
) -> Decoded:
    """Samples of one prompt, int ids [n]; guided where a scorer and its config are given.

    streamer: gets the tokens as they are decoded; one sample only.
    """
    import torch

    model = policy.model
    options: dict[str, Any] = {"generation_config": generation_config(model, sampling)}
    if scorer is not None and config is not None:
        from guided_decode.integrations.transformers import GuidedDecoding

        options["custom_generate"] = GuidedDecoding(scorer, config, streamer=streamer)
        options["return_dict_in_generate"] = config.abstain is not None
    elif streamer is not None:
        options["streamer"] = streamer
    inputs = torch.tensor([prompt], device=model.device)
    torch.manual_seed(sampling.seed)
    scored = scorer.stats.tokens if scorer is not None else 0
    begun = time.perf_counter()
    output = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), **options)
    rows, abstained = _rows(output, len(prompt))
    seconds = time.perf_counter() - begun
    ends = terminal_ids(model)
    responses = [until_terminal(row, ends) for row in rows]
    return Decoded(
        responses=responses,
        texts=policy.tokenizer.batch_decode(responses, skip_special_tokens=True),
        finished=[bool(row) and row[-1] in ends for row in responses],
        # The last token of a response is never forwarded.
        policy_tokens=len(prompt) + sum(len(row) - 1 for row in responses),
        scorer_tokens=scorer.stats.tokens - scored if scorer is not None else 0,
        seconds=seconds,
        abstained=abstained,
    )


def _rows(output: Any, width: int) -> tuple[list[list[int]], list[bool] | None]:
    """New tokens of each row up to where its value ended it, and which rows that was."""
    ended_at = getattr(output, "abstained_at", None)
    if ended_at is None:
        return output[:, width:].tolist(), None
    rows = output.sequences[:, width:].tolist()
    lengths = ended_at.tolist()
    kept = [row if n < 0 else row[:n] for row, n in zip(rows, lengths, strict=True)]
    return kept, [n >= 0 for n in lengths]


def terminal_ids(model: Any) -> list[int]:
    """The token ids at which the policy's answers end."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def until_terminal(tokens: list[int], ends: list[int]) -> list[int]:
    """A response up to its first terminal, that one included."""
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def generation_config(model: Any, sampling: Sampling) -> GenerationConfig:
    """The checkpoint's own, with nothing that reshapes the distribution but the temperature."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample = sampling.temperature > 0.0
    config.temperature = sampling.temperature or 1.0
    config.top_k, config.top_p, config.num_beams = 0, 1.0, 1
    config.num_return_sequences = sampling.num_samples
    config.max_length, config.max_new_tokens = None, sampling.max_new_tokens
    if config.pad_token_id is None:
        config.pad_token_id = (terminal_ids(model) or [0])[0]
    return config
