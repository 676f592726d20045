"""What answers the units of an ablation: cells that share models are loaded once, together."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from guided_decode.cli.ablate.cells import Cell, TokenPlan
from guided_decode.cli.ablate.schema import Model
from guided_decode.cli.ahead_file import Ahead
from guided_decode.cli.checkpoints import load_policy, open_scorer
from guided_decode.cli.decoding import Sampling, generation_config, terminal_ids
from guided_decode.cli.engine_options import EngineOptions
from guided_decode.cli.judge_options import JudgeOptions
from guided_decode.cli.remote_options import RemoteOptions
from guided_decode.cli.run_identity import digest
from guided_decode.cli.score_run import STDOUT
from guided_decode.cli.search_models import SearchModels, policy_ids
from guided_decode.cli.search_plan import Plan
from guided_decode.cli.search_rows import SearchRow
from guided_decode.cli.token_values import rounded
from guided_decode.lab.ablate.divergence import most_divergence
from guided_decode.lab.ablate.grid import PLAIN, Unit
from guided_decode.scoring.remote.address import is_address
from guided_decode.search.seeds import derive

if TYPE_CHECKING:
    from guided_decode.cli.checkpoints import Policy
    from guided_decode.cli.search_run import SearchJob
    from guided_decode.scorer import Scorer

# Of what units hold: another version's are computed again.
_VERSION = 1


@dataclass(frozen=True, slots=True)
class _Nothing:
    """A plan of which nothing follows: what is left of an identity are the models."""

    settings: dict[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        return {}


@dataclass(slots=True)
class Group:
    """Cells that share a policy, a scorer and how it is read. raw: prompts are text as it is."""

    cells: list[Cell]
    raw: bool
    _served: Any = None
    _connected: Any = None

    @property
    def first(self) -> Cell:
        """Any of them."""
        return self.cells[0]

    @property
    def engine(self) -> EngineOptions:
        """What decodes the policy."""
        engine: EngineOptions = self.first.policy.group(EngineOptions)
        return engine

    @property
    def elsewhere(self) -> bool:
        """Whether a model of it is on a server."""
        scorer = self.first.scorer
        return self.engine.on_servers or (
            scorer is not None and (is_address(scorer.model) or "://" in scorer.model)
        )

    def connect(self) -> None:
        """Finds the servers, where there are any, before anything is loaded.

        Raises Refusal, ValueError or EndpointError: one is not there, or is not what it has to be.
        """
        self._connected, self._served = self._asked.connected(), self._asked.served()

    def close(self) -> None:
        """Lets go of the servers."""
        if self._connected is not None:
            self._connected.close()
        if self._served is not None:
            self._served.close()

    def keys(
        self, rows: Sequence[SearchRow], units: Sequence[tuple[Cell, int, int, int]]
    ) -> list[Unit]:
        """Units of (cell, seed, first prompt, count), by all that decides what comes of them.

        Raises Refusal: a model is not there.
        """
        models = {
            kl: self._asked.identity(_Nothing({"kl_coef": kl} if kl else {}), self._served,
                                     self._connected)
            for kl in {cell.plan.settings.get("kl_coef") for cell, *_ in units}
        }  # fmt: skip
        made = []
        for cell, seed, first, count in units:
            plan = {name: str(value) for name, value in cell.plan.identity().items()}
            own = [(row.index, row.key) for row in rows[first : first + count]]
            key = digest([_VERSION, models[cell.plan.settings.get("kl_coef")], plan, seed, own])
            made.append(Unit(cell.setting, seed, first, count, key))
        return made

    @property
    def _asked(self) -> SearchModels:
        cell = self.first
        policy, scorer = cell.policy, cell.scorer or Model("", 0, "")
        return SearchModels(
            policy.model, None if cell.scorer is None else scorer.model, cell.reading,
            scorer.group(RemoteOptions), policy.get("device"), scorer.get("device"),
            policy.get("dtype", "auto"), cell.text_format, self.raw, scorer.group(JudgeOptions),
            self.engine,
        )  # fmt: skip

    @contextlib.contextmanager
    def loaded(self) -> Iterator[TokenAnswers | SearchAnswers]:
        """The models, as long as they are needed. Raises Refusal or ValueError: as `search`."""
        if isinstance(self.first.plan, TokenPlan):
            yield self._tokens()
            return
        job = self._asked.job(
            self.first.plan, self._served, self._connected, Ahead(STDOUT, ""), "", False
        )
        with contextlib.ExitStack() as stack:
            if self._connected is None:
                stack.enter_context(job.generator)
            yield SearchAnswers(job, not self.elsewhere)

    def _tokens(self) -> TokenAnswers:
        cell = self.first
        policy = load_policy(
            cell.policy.model, cell.policy.get("device"), cell.policy.get("dtype", "auto"),
            adapter=self._adapter, trust_remote_code=cell.reading.trust_remote_code,
        )  # fmt: skip
        scorer = self._served
        if cell.scorer is not None and scorer is None:
            scorer = open_scorer(
                cell.scorer.model, cell.reading,
                device=cell.scorer.get("device") or cell.policy.get("device"),
                dtype=cell.policy.get("dtype", "auto"), policy=policy,
                remote=cell.scorer.group(RemoteOptions),
            )  # fmt: skip
        return TokenAnswers(policy, scorer, cell.text_format, self.raw)

    @property
    def _adapter(self) -> str | None:
        """A head on the policy's hidden states reads them with the adapter in it."""
        cell = self.first
        own = cell.reading.head is not None and cell.scorer is not None
        same = own and cell.scorer is not None and cell.scorer.model == cell.policy.model
        return cell.reading.adapter if same else None


def grouped(cells: Sequence[Cell], *, raw: bool) -> list[Group]:
    """The cells by what they share, in the order of the first of each."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    return [Group(own, raw) for own in groups.values()]


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
            processor=None if plan.config is None else
            lambda mask: self._processor(plan.config, generation.pad_token_id, ends, mask),
        )  # fmt: skip
        seconds = time.perf_counter() - begun
        texts = self.policy.tokenizer.batch_decode(
            [each.tokens for each in block.responses], skip_special_tokens=True
        )
        share = round(block.scorer_tokens / len(rows), 4)
        return {"seconds": seconds, "answers": [
            {
                "text": text,
                "tokens": len(each.tokens),
                "ended": "eos" if each.tokens and each.tokens[-1] in ends else "length",
                "stopped": None,
                "log_prob": rounded(each.log_prob),
                "kl": rounded(each.kl),
                "bound": None,
                "policy_tokens": len(prompt) + len(each.tokens),
                "scorer_tokens": share,
                "generated_tokens": len(each.tokens),
                "prompt_tokens": len(prompt),
                "calls": None,
            }
            for text, each, prompt in zip(texts, block.responses, prompts, strict=True)
        ]}  # fmt: skip

    def _processor(self, config: Any, pad: int, ends: list[int], mask: Any) -> Any:
        from guided_decode.integrations.transformers import ValueGuidedLogitsProcessor

        assert self.scorer is not None
        return ValueGuidedLogitsProcessor(
            self.scorer, config, pad_token_id=pad, eos_token_id=ends, attention_mask=mask
        )


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
        job = replace(self.job, plan=replace(cell.plan, seed=unit.seed))
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
