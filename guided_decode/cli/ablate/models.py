"""What answers the units of an ablation: cells that share models are loaded once, together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from guided_decode.cli.ablate.answers import SearchAnswers, TokenAnswers
from guided_decode.cli.ablate.cell import Cell, TokenPlan
from guided_decode.cli.ablate.schema import Model
from guided_decode.cli.ahead_file import Ahead
from guided_decode.cli.checkpoints import load_policy, open_scorer
from guided_decode.cli.engine_options import EngineOptions
from guided_decode.cli.judge_options import JudgeOptions
from guided_decode.cli.remote_options import RemoteOptions
from guided_decode.cli.run_identity import digest
from guided_decode.cli.score_run import STDOUT
from guided_decode.cli.search_models import SearchModels
from guided_decode.cli.search_rows import SearchRow
from guided_decode.lab.ablate.bare import bare
from guided_decode.lab.ablate.grid import Unit
from guided_decode.scoring.remote.address import is_address

# Of what units hold: another version's are computed again.
_VERSION = 3


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
            self.engine, cell.kl_reference,
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
        # Searches draw from the policy itself: of what its checkpoint asks `generate` for, such as
        # a repetition penalty, single tokens know nothing either.
        policy.model.generation_config = bare(policy.model.generation_config)
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
