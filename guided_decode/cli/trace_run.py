"""Prompts as `trace` shows them: decoded or read, each step looked at again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guided_decode.cli.chat_rows import Messages
from guided_decode.cli.decoding import Decoded, Setup, decode, ids_of, terminal_ids
from guided_decode.cli.errors import warn
from guided_decode.cli.rollout_ids import RolloutReader
from guided_decode.cli.side_by_side import ValuedText
from guided_decode.cli.token_texts import next_texts, token_texts
from guided_decode.cli.token_values import finite, token_values
from guided_decode.cli.trace_rows import Fact, Recorded, TraceRow

if TYPE_CHECKING:
    from guided_decode.lab.trace.record import Run, TracedPrompt

# Settings of a checkpoint's generation config that change logits before guidance sees them.
_BEFORE_GUIDANCE = (
    "bad_words_ids", "encoder_repetition_penalty", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "min_length", "min_new_tokens",
    "no_repeat_ngram_size", "repetition_penalty", "sequence_bias", "suppress_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tracer:
    """How prompts become what a page shows. reader: of responses that are there already."""

    setup: Setup
    reader: RolloutReader

    def prompt(self, row: TraceRow) -> TracedPrompt:
        """A prompt with its responses; those that are not there are decoded.

        Raises Refusal or ValueError: it cannot be read, or scored.
        """
        from guided_decode.lab.trace.record import TracedPrompt

        runs = [self._recorded(each) for each in row.recorded] or self._decoded(row.messages)
        messages = [(each["role"], each["content"]) for each in self._messages(row)]
        return TracedPrompt(row.name, messages, runs, row.method, row.chosen)

    def _messages(self, row: TraceRow) -> Messages:
        if row.messages:
            return row.messages
        return self.reader.with_texts(row.recorded[0].row).messages

    def _decoded(self, messages: Messages) -> list[Run]:
        setup = self.setup
        prompt = ids_of(setup, messages)
        # Both before any step is looked at: what that leaves in the cache is not what they cost.
        plain = decode(setup.policy, prompt, setup.sampling)
        guided = decode(setup.policy, prompt, setup.sampling, setup.scorer, setup.config)
        return [
            self._run(name, prompt, way.responses[0], _facts(way), guided=name == "guided")
            for name, way in (("plain", plain), ("guided", guided))
        ]

    def _recorded(self, recorded: Recorded) -> Run:
        rollout = self.reader.rollout(recorded.row)
        ids, visits = list(rollout.response), recorded.visits
        where = f"{recorded.row.where}: {recorded.name}"
        if recorded.tokens is not None and recorded.tokens != len(ids):
            warn(f"{where} had {recorded.tokens} tokens, and its text has {len(ids)} in this "
                 "policy's: those are shown")  # fmt: skip
        if visits and [len(visits)] + [True for _ in ids] != [len(ids)] + [
            token in each for token, each in zip(ids, visits, strict=False)
        ]:
            warn(f"{where}: the visits of its search are those of other tokens: they are left out")
            visits = ()
        return self._run(
            recorded.name, list(rollout.prompt), ids, recorded.facts, guided=recorded.guided,
            visits=visits,
        )  # fmt: skip

    def _run(
        self, name: str, prompt: list[int], ids: list[int], facts: Mapping[str, Fact], *,
        guided: bool, visits: Sequence[Mapping[int, int]] = (),
    ) -> Run:  # fmt: skip
        from guided_decode.lab.trace.record import Run
        from guided_decode.lab.trace.steps import replay

        setup = self.setup
        policy, scorer, ends = setup.policy, setup.scorer, terminal_ids(setup.policy.model)
        pieces = token_texts(policy.tokenizer, ids, special=True)
        values = [finite(value) for value in token_values(scorer, prompt, ids, ends)]
        valued = ValuedText(pieces, values, summed=scorer.terminal == "included")
        steps = replay(policy.model, scorer, setup.config, prompt, ids, terminals=ends)
        texts = [
            next_texts(policy.tokenizer, ids[:i], list(step.tokens)) for i, step in enumerate(steps)
        ]
        return Run(name, ids, pieces, steps, texts, valued.so_far, guided, visits, facts)


def warn_of_other_logits(model: Any) -> None:
    """Says which settings of the policy's generation config the steps on the page do not have."""
    from transformers import GenerationConfig

    config, default = model.generation_config, GenerationConfig()
    found = [
        f"{name} {getattr(config, name)}"
        for name in _BEFORE_GUIDANCE
        if getattr(config, name, None) not in (None, getattr(default, name, None))
    ]
    if found:
        warn(f"the policy's generation config has {', '.join(found)}, which changes what it "
             "decodes: the page has its probabilities without that")  # fmt: skip


def _facts(decoded: Decoded) -> dict[str, Fact]:
    return {
        "finished": decoded.finished[0],
        "policy_tokens": decoded.policy_tokens,
        "scorer_tokens": decoded.scorer_tokens,
    }
