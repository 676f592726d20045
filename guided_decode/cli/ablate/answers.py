"""What decodes the units of an ablation: single tokens in `generate`, and searches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from guided_decode.cli.ablate.cell import Cell, TokenPlan
from guided_decode.cli.ahead_file import Ahead
from guided_decode.cli.decoding import Sampling, generation_config, terminal_ids
from guided_decode.cli.score_run import STDOUT
from guided_decode.cli.search_models import policy_ids
from guided_decode.cli.search_plan import Plan
from guided_decode.cli.search_rows import SearchRow
from guided_decode.cli.token_values import rounded
from guided_decode.lab.ablate.divergence import most_divergence
from guided_decode.lab.ablate.grid import PLAIN, Unit
from guided_decode.search.seeds import derive

if TYPE_CHECKING:
    from guided_decode.cli.checkpoints import Policy
    from guided_decode.cli.search_run import SearchJob
    from guided_decode.lab.ablate.decoding import Decoded, Guides
    from guided_decode.scorer import Scorer


@dataclass(frozen=True, slots=True)
class TokenAnswers:
    """Decodes single tokens, plain or guided."""

    policy: Policy
    scorer: Scorer | None
    text_format: str | None
    raw: bool

    def answer(self, cell: Cell, unit: Unit, rows: Sequence[SearchRow]) -> dict[str, Any]:
        """What a unit keeps. Raises Refusal or ValueError: names a prompt, or what failed."""
        from guided_decode.lab.ablate.decoding import decode_block

        plan = cell.plan
        assert isinstance(plan, TokenPlan)
        prompts = [
            policy_ids(self.policy.tokenizer, self.text_format, self.raw, row.messages)
            for row in rows
        ]
        empty(self.scorer)
        model, ends = self.policy.model, terminal_ids(self.policy.model)
        generation = generation_config(model, Sampling(plan.temperature, 1, plan.max_tokens))
        begun = time.perf_counter()
        block = decode_block(
            model, prompts, generation, ends, seed=derive(unit.seed, rows[0].index),
            scorer=self.scorer,
            guidance=None if plan.config is None else
            lambda scorer, mask: self._guides(
                scorer, plan.config, generation, ends, mask
            ),
        )  # fmt: skip
        seconds = time.perf_counter() - begun
        texts = self.policy.tokenizer.batch_decode(
            [each.tokens for each in block], skip_special_tokens=True
        )
        return {"seconds": seconds, "answers": [
            {
                "text": text,
                "tokens": len(each.tokens),
                "ended": _end_of(each, ends),
                "stopped": None,
                "log_prob": rounded(each.log_prob),
                "kl": rounded(each.kl),
                "bound": None,
                # What a reference reads counts with the policy's, as in a search.
                "policy_tokens": len(prompt) + len(each.tokens) + each.reference_tokens,
                "scorer_tokens": each.scorer_tokens,
                "generated_tokens": len(each.tokens),
                "prompt_tokens": len(prompt),
                "calls": None,
            }
            for text, each, prompt in zip(texts, block, prompts, strict=True)
        ]}  # fmt: skip

    def _guides(
        self, scorer: Any, config: Any, generation: Any, ends: list[int], mask: Any
    ) -> Guides:  # fmt: skip
        from transformers import EosTokenCriteria, MaxLengthCriteria

        from guided_decode.integrations.transformers import AbstentionCriteria
        from guided_decode.integrations.transformers.logits_processor import (
            ValueGuidedLogitsProcessor,
            WatchedCriteria,
        )
        from guided_decode.lab.ablate.decoding import Guides

        own = {"eos_token_id": ends, "pad_token_id": generation.pad_token_id,
               "attention_mask": mask}  # fmt: skip
        if config.abstain is None:
            return Guides(ValueGuidedLogitsProcessor(scorer, config, **own))
        # As `generate` ends rows: of these no value is asked.
        longest = mask.shape[1] + generation.max_new_tokens
        watched = WatchedCriteria([EosTokenCriteria(ends), MaxLengthCriteria(longest)])
        processor = ValueGuidedLogitsProcessor(scorer, config, stopped=watched, **own)
        watched.abstention = AbstentionCriteria(scorer, config, follower=processor)
        return Guides(processor, watched)


def _end_of(decoded: Decoded, ends: Sequence[int]) -> str:
    if decoded.abstained:
        return "abstained"
    return "eos" if decoded.tokens and decoded.tokens[-1] in ends else "length"


@dataclass(frozen=True, slots=True)
class SearchAnswers:
    """Searches, as `guided-decode search` does. here: no model is on a server."""

    job: SearchJob
    here: bool

    def answer(self, cell: Cell, unit: Unit, rows: Sequence[SearchRow]) -> dict[str, Any]:
        """What a unit keeps. Raises Refusal or ValueError: names a prompt, or what failed."""
        assert isinstance(cell.plan, Plan)
        if self.here:
            empty(getattr(self.job.judge, "scorer", None))
            empty(getattr(self.job.generator, "policy", None))
            empty(getattr(self.job.generator, "reference", None))
        # What is ahead is of this unit alone: others are under way on the same prompts.
        job = replace(
            self.job, plan=replace(cell.plan, seed=unit.seed), ahead=Ahead(STDOUT, "")
        )  # fmt: skip
        begun = time.perf_counter()
        lines = [line for part in job.lines(list(rows)) for line in part]
        seconds = time.perf_counter() - begun
        lengths = [len(job.ids_of(row.messages)) for row in rows]
        return {"seconds": seconds, "answers": [
            self._answer(cell, line, length) for line, length in zip(lines, lengths, strict=True)
        ]}  # fmt: skip

    def _answer(self, cell: Cell, line: dict[str, Any], prompt_tokens: int) -> dict[str, Any]:
        assert isinstance(cell.plan, Plan)
        chosen = line["chosen"]
        best = {} if chosen is None else line["candidates"][chosen]
        tokens, log_prob = best.get("tokens", 0), best.get("log_prob")
        settings = cell.plan.method.checked(cell.plan.settings)
        kl = None
        if not cell.setting.draws and log_prob is not None:
            # A point mass.
            kl = -log_prob
        elif cell.setting.method == PLAIN and settings["temperature"] == 1.0:
            kl = 0.0
        return {
            "text": line["response"],
            "tokens": tokens,
            "ended": best.get("ended"),
            "stopped": line["stopped"],
            "log_prob": log_prob,
            "kl": kl,
            "bound": rounded(most_divergence(cell.plan.method.name, settings, tokens)),
            "policy_tokens": line["cost"]["policy_tokens"],
            "scorer_tokens": line["cost"]["scorer_tokens"],
            "generated_tokens": line["cost"]["generated_tokens"],
            "prompt_tokens": prompt_tokens,
            "calls": line["cost"]["calls"],
        }


def empty(model: Any) -> None:
    """Empties what a model remembers, so that a unit costs what it costs by itself."""
    for cache in getattr(model, "caches", None) or [getattr(model, "cache", None)]:
        if hasattr(cache, "clear"):
            cache.clear()
    if getattr(model, "reward", None) is not None:
        empty(model.reward)
