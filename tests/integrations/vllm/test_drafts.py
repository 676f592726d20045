"""Guidance of drafted tokens: random drafts, any of which are accepted, against brute force."""

from __future__ import annotations

import json
import random
import sys

import pytest
import torch

from guided_decode import GuidanceConfig
from tests import models, oracle
from tests.integrations.vllm import vllm_parts
from tests.integrations.vllm.draft_runner import DRAFTS, DraftRunner, Job, config

from guided_decode.integrations.vllm.client_values.records import Record, decoded  # isort: skip
from guided_decode.integrations.vllm.client_values.store import of_this_process  # isort: skip
from guided_decode.integrations.vllm.client_values.texts import GrowingText  # isort: skip
from guided_decode.integrations.vllm.request import Request  # isort: skip

ROWS, LONGEST, STOP, END = 5, 60, 99, 98
# Of the policy's logits: padded further than the scorer's vocabulary.
WIDTH = models.VOCAB + 4
BRUTE = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
# Few tokens and few prompts: sequences come again, so brute force is quick and rows share prefixes.
TOKENS = [10, 11, 12, 13]
PROMPTS = [models.prompts([n], seed=n)[0] for n in (1, 2, 5, 9, 14)]
CONFIGS = [
    GuidanceConfig(beta=1.0, top_k=3),
    GuidanceConfig(beta=-2.0, top_k=2, tail="keep"),
    GuidanceConfig(rule="prune", margin=0.5, top_k=4),
    GuidanceConfig(beta=1.5, top_k=4, gate=0.5),
    GuidanceConfig(beta=1.0, top_k=4, value_gate=0.0, value_gate_fall=0.3),
    GuidanceConfig(beta=1.0, top_k=4, abstain=-0.6, abstain_after=2),
]


class Drafting:
    """Random requests, drafts, logits and acceptances; each live row is compared."""

    def __init__(self, runner: DraftRunner, seed: int) -> None:
        self.runner = runner
        self.random = random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.count = self.compared = self.verified = self.accepted = self.ended = 0
        self.waiting: list[Job] = []
        # What the last step kept of requests whose clients asked for values: by text.
        self.kept: dict[str, dict[bytes, Record]] = {}
        self.shown = self.advantages = 0

    def new(self) -> Job:
        self.count += 1
        asked = self.random.choice([*CONFIGS, None])
        extra = None if asked is None else vllm_parts.asked(asked)
        if extra is not None and asked.abstain is not None:
            extra["guide_prune_token"] = END
        if self.random.random() < 0.7:
            extra = {**(extra or {}), "guide_values": 1, "guide_values_id": named(f"{self.count}")}
        sampling = vllm_parts.params(40, extra, stop_token_ids=[STOP, END])
        return Job(f"{self.count}", self.random.choice(PROMPTS), asked, sampling)

    def logits(self, rows: int) -> torch.Tensor:
        """The few tokens are likely, and after the likeliest those that no scorer knows."""
        logits = torch.randn(rows, WIDTH, generator=self.noise)
        logits[:, TOKENS] += 3 + torch.randn(rows, len(TOKENS), generator=self.noise)
        logits[:, models.VOCAB :] = logits[:, : models.VOCAB].amax(-1, keepdim=True) - 0.01
        return logits

    def come_and_go(self) -> None:
        for job in list(self.runner.jobs.values()):
            if self.random.random() < 0.1 or len(job.ids) > LONGEST - 10:
                self.runner.remove(job)
                if self.random.random() < 0.5 and len(job.ids) <= LONGEST - 10:
                    self.waiting.append(job)  # preempted
        while len(self.runner.jobs) < ROWS and self.random.random() < 0.7:
            back = bool(self.waiting) and self.random.random() < 0.5
            self.runner.add(self.waiting.pop(0) if back else self.new())

    def step(self) -> None:
        self.come_and_go()
        order = [job for job in self.runner.jobs.values() if self.random.random() < 0.9]
        self.random.shuffle(order)
        if not order:
            return
        for job in order:
            was_whole = job.prefilled >= job.filled
            left = len(job.ids) - job.prefilled
            job.prefilled += left if was_whole else self.random.choice([left, min(left, 3)])
            self.draft(job, was_whole=was_whole)
        before = self.logits(sum(job.rows for job in order))
        after = self.runner.apply(
            order,
            before,
            late=self.random.choice([0, DRAFTS]),
            in_parts=self.random.random() < 0.3,
        )
        names = [named(job.name) for job in order]
        self.kept = {
            name: {each.text: each for each in records}
            for name, records in decoded(of_this_process().take(names)).items()
        }
        at = 0
        for job in order:
            rows = slice(at, at + job.rows)
            self.verify(job, before[rows], after[rows])
            at += job.rows

    def draft(self, job: Job, *, was_whole: bool) -> None:
        """Drafts come after the first token; before it they are placeholders, if any."""
        if job.prefilled < len(job.ids):
            job.drafts = []
        elif not was_whole:
            job.drafts = self.random.choice([[], [-1] * DRAFTS])
        else:
            often = [*TOKENS * 4, STOP, 50]
            job.drafts = self.random.choices(often, k=self.random.randint(0, DRAFTS))

    def verify(self, job: Job, before: torch.Tensor, after: torch.Tensor) -> None:
        """Every row that may be sampled from is brute force's; then some drafts are accepted."""
        if job.prefilled < len(job.ids):
            assert torch.equal(before, after), "a row that is still being prefilled changed"
            assert named(job.name) not in self.kept
            return
        self.compare_texts(job)
        accepts = self.random.choice([0, 1, 2, *[DRAFTS] * 5])
        written: list[int] = []
        self.verified += bool(job.drafts)
        for row in range(job.rows):
            self.compare(job, written, before[row], after[row])
            if shows(job):
                self.compare_values([*job.ids, *written], job, before[row])
            draft = job.drafts[row] if row < len(job.drafts) else -1
            may = draft >= 0 and after[row, draft] > -torch.inf
            if may and len(written) < accepts:
                written.append(draft)
                self.accepted += 1
                if draft in (STOP, END):
                    break
                continue
            alive = (after[row] > -torch.inf).nonzero().flatten().tolist()
            few = [token for token in alive if token in (*TOKENS, END)] or alive
            written.append(self.random.choice(few))
            break
        self.runner.write(job, written)
        if written[-1] in (STOP, END):
            self.ended += bool(len(written) > 1 and self.forced(job, job.ids[:-1]))
            self.runner.remove(job)

    def forced(self, job: Job, ids: list[int]) -> bool:
        """Whether the value ends the request there."""
        asked, tokens = job.config, len(ids) - len(job.prompt)
        if asked is None or asked.abstain is None or tokens < (asked.abstain_after or 1):
            return False
        return BRUTE.values([ids])[0] < asked.abstain

    def compare(self, job: Job, written: list[int], before, after) -> None:
        self.compared += 1
        ids = [*job.ids, *written]
        if job.config is None:
            assert torch.equal(before, after)
        elif self.forced(job, ids):
            assert after[END] == 0.0
            assert int((after == -torch.inf).sum()) == len(after) - 1
        else:
            known = slice(0, models.VOCAB)
            row = BRUTE.row(ids, before[known], job.config, [STOP, END], len(job.prompt))
            oracle.assert_row_equal(after[known], row)
            beyond = before if job.config.tail == "keep" else torch.full_like(before, -torch.inf)
            assert torch.equal(after[models.VOCAB :], beyond[models.VOCAB :])

    def compare_texts(self, job: Job) -> None:
        """Of every text that may be sampled from the step kept something, and of no other."""
        texts, ids = [job.ids], list(job.ids)
        for draft in job.drafts:
            if draft in (-1, STOP, END) or self.forced(job, ids):
                break
            ids = [*ids, draft]
            texts.append(ids)
        expected = set(map(digest, texts)) if shows(job) else set()
        assert set(self.kept.get(named(job.name), {})) == expected

    def compare_values(self, ids: list[int], job: Job, before: torch.Tensor) -> None:
        """V and the candidates' advantages, behind drafts as anywhere else."""
        kept, ends = self.kept[named(job.name)][digest(ids)], [STOP, END]
        assert kept.value == pytest.approx(BRUTE.values([ids])[0], abs=1e-4)
        is_forced = self.forced(job, ids)
        assert kept.final is not is_forced
        logits, asked = before[: models.VOCAB], job.config
        gated = asked is not None and asked.gate is not None
        if asked is None or is_forced or (gated and logits.softmax(-1).max() >= asked.gate):
            assert not kept.tokens
            return
        if not BRUTE.is_open(ids, asked, len(job.prompt)):
            assert not kept.tokens
            return
        chosen = BRUTE.row(ids, logits, asked, ends, len(job.prompt)).candidates
        inner = [token for token in chosen if token not in ends]
        expected = dict.fromkeys(chosen, 0.0) | BRUTE.advantages(ids, inner, [], asked, ends)
        assert {a: kept.advantage(a) for a in expected} == pytest.approx(expected, abs=1e-4)
        assert len(kept.tokens) == 8 * len(expected)
        self.shown += len(ids) > len(job.ids)
        self.advantages += len(expected)


def named(name: str) -> str:
    """The guide_values_id of a job of this name."""
    return f"{'the values of':16}{name}"


def shows(job: Job) -> bool:
    return "guide_values" in (job.sampling.extra_args or {})


def digest(ids: list[int]) -> bytes:
    return GrowingText(ids).digest()


@pytest.mark.parametrize("cache_tokens", [None, pytest.param(90, marks=pytest.mark.slow)])
def test_300_random_acceptances(monkeypatch, cache_tokens):
    own = {} if cache_tokens is None else {"cache_tokens": cache_tokens}
    runner = DraftRunner(monkeypatch, config(**own), ROWS, LONGEST, WIDTH)
    drafting = Drafting(runner, seed=5)
    counts = runner.processor.engine.counts
    cache, stats = runner.processor.engine.scorer.cache, runner.processor.engine.scorer.stats
    while drafting.verified < 300:
        drafting.step()
        cache.check()
        assert cache.pinned == 0
    assert drafting.accepted > 100
    assert drafting.compared > 500
    assert drafting.shown > 50
    assert counts.draft_rows > 150
    assert counts.wasted_rows == counts.unguided_rows == counts.clamps == stats.passthroughs == 0
    assert counts.steps < counts.tokens
    for _ in range(20):
        runner.processor.apply_staged_writes()
    assert drafting.ended > 0
    assert counts.abstained_rows >= drafting.ended
    assert not runner.processor.live


def guided_job(name: str, prompt: list[int], asked=CONFIGS[0], **extra) -> Job:
    sampling = vllm_parts.params(40, {**vllm_parts.asked(asked), **extra}, stop_token_ids=[STOP])
    return Job(name, list(prompt), asked, sampling)


def step(runner: DraftRunner, job: Job) -> None:
    """One row, as it is by brute force."""
    job.prefilled, job.drafts = len(job.ids), []
    before = torch.randn(1, models.VOCAB, generator=torch.Generator().manual_seed(len(job.ids)))
    after = runner.apply([job], before.clone())
    row = BRUTE.row(job.ids, before[0], job.config, [STOP], len(job.prompt))
    oracle.assert_row_equal(after[0], row)


@pytest.mark.parametrize("is_known", [False, True], ids=["found out", "told"])
def test_histories_that_others_rewrite_are_read_again(monkeypatch, caplog, is_known):
    """As beam search does: as long as before, and another sequence."""
    made = config()
    if is_known:
        caplog.set_level("INFO", logger="guided_decode")
        made.scheduler_config.scheduler_cls = "mine.BeamScheduler"
    runner = DraftRunner(monkeypatch, made, ROWS, LONGEST, models.VOCAB)
    job = guided_job("beam", PROMPTS[4])
    runner.add(job)
    step(runner, job)
    runner.write(job, [10])
    step(runner, job)
    assert ("the scheduler is mine.BeamScheduler, not vLLM's own" in caplog.text) is is_known
    if not is_known:
        job.output[-1] = 11
        runner.write(job, [12])
        step(runner, job)
        assert "a history was rewritten" in caplog.text
    # Further back than any comparison of ends reaches.
    runner.write(job, [13] * 12)
    step(runner, job)
    job.output[0] = 13
    runner.write(job, [10])
    step(runner, job)
    assert runner.processor.engine.scorer.stats.passthroughs == 0


def test_the_sampler_is_not_vllms_own_where_something_else_chooses_it(monkeypatch):
    from types import ModuleType

    from transformers import LlamaForCausalLM

    from guided_decode.integrations.vllm.foreign import may_rewrite

    import vllm.v1.worker.gpu.model_states.default as states  # isort: skip
    import vllm.model_executor.model_loader.utils as loader  # isort: skip

    plain = config()
    assert not may_rewrite(plain)
    plain.scheduler_config.scheduler_cls = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
    runner = ModuleType("vllm.v1.worker.gpu.model_runner")
    runner.init_model_state = states.DefaultModelState
    monkeypatch.setitem(sys.modules, runner.__name__, runner)
    assert not may_rewrite(plain)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "init_model_state", lambda *args: None)
        assert may_rewrite(plain)
    with monkeypatch.context() as patch:
        patch.setattr(states.DefaultModelState, "custom_sampler", lambda *args: None)
        assert may_rewrite(plain)

    class Own(LlamaForCausalLM):
        @staticmethod
        def get_model_state_cls():
            return None

    monkeypatch.setattr(loader, "get_model_architecture", lambda model: (Own, ""))
    assert may_rewrite(plain)


def test_the_value_behind_a_draft_is_none_of_what_was_written_in_its_place(monkeypatch):
    """As a sampler of others may."""
    runner = DraftRunner(monkeypatch, config(), ROWS, LONGEST, models.VOCAB)
    job = guided_job("other", PROMPTS[3], GuidanceConfig(beta=1.0, top_k=3, value_gate_fall=0.1))
    runner.add(job)
    step(runner, job)
    (row,) = runner.processor.live
    for draft, written in ((10, 10), (11, 12)):
        runner.write(job, [13])
        job.prefilled, job.drafts = len(job.ids), [draft]
        runner.apply([job], torch.zeros(2, models.VOCAB))
        runner.write(job, [written, 13])
        step(runner, job)
        known = row.trail.at(row.history, len(job.ids) - 1)
        assert known == pytest.approx(BRUTE.values([job.ids[:-1]])[0], abs=1e-5)


def test_a_value_is_logged_once_also_of_a_request_that_comes_back(monkeypatch, tmp_path):
    log = tmp_path / "values"
    made = config(value_log=str(log), value_log_every=1)
    runner = DraftRunner(monkeypatch, made, ROWS, LONGEST, models.VOCAB)
    job = guided_job("comes back", PROMPTS[2])
    runner.add(job)
    for written in ([10], [11, 12, 13], [10, 10]):
        step(runner, job)
        runner.write(job, written)
    step(runner, job)
    runner.remove(job)
    job.output.append(11)
    runner.add(job)
    step(runner, job)
    logged = [json.loads(line)["response"] for line in log.read_text().splitlines()]
    assert logged == list(range(8))


def test_histories_that_others_rewrite_are_read_again_on_v1():
    from vllm.v1.sample.logits_processor import BatchUpdate

    from guided_decode.integrations.vllm.rows import BatchRows

    for rewrites in (False, True):
        batch = BatchRows(lambda params: Request(CONFIGS[0], (STOP,)), rewrites=rewrites)
        output: list[int] = []
        added = [(0, None, PROMPTS[1], output)]
        batch.update(BatchUpdate(batch_size=1, removed=[], added=added, moved=[]))
        output += [10, 11]
        batch.rows()
        # Of the end any engine is sure, of the rest one with another scheduler.
        output[:] = [12, 11, 13] if rewrites else [10, 12, 13]
        (placed,) = batch.rows()
        assert placed.row.history.tokens.tolist() == [*PROMPTS[1], *output]


def test_siblings_are_compared_where_they_passed_a_boundary(monkeypatch):
    """Several tokens a step: what is compared is the text that ended at the boundary."""
    runner = DraftRunner(monkeypatch, config(), ROWS, LONGEST, models.VOCAB)
    extra = {"guide_group": "group-that-drafts", "guide_group_size": 3, "guide_keep": 1,
             "guide_every": 4}  # fmt: skip
    jobs = [guided_job(f"{i}", PROMPTS[4], **extra) for i in range(3)]
    texts = [[10, 11, 12, 13, 10, 11], [13, 13, 12, 10, 10, 10], [12, 11, 10, 10, 12, 11]]
    for job in jobs:
        runner.add(job)
    for start, end in ((0, 0), (0, 3), (3, 6)):
        for job, text in zip(jobs, texts, strict=True):
            runner.write(job, text[start:end])
            job.prefilled = len(job.ids)
            job.drafts = [12, 12] if end == 3 else []
        logits = torch.zeros(sum(job.rows for job in jobs), models.VOCAB)
        after = runner.apply(jobs, logits)
    forced = [row[STOP] == 0.0 and bool((row == -torch.inf).sum() == len(row) - 1) for row in after]
    values = BRUTE.values([[*PROMPTS[4], *text[:4]] for text in texts])
    assert forced == [value < max(values) for value in values]
    assert runner.processor.engine.counts.pruned_siblings == 2


def test_every_draft_is_followed_that_the_policys_own_limits_allow(monkeypatch):
    """Whether it is no candidate, or its row goes on as it came: it may be accepted all the same.

    What comes after guidance may let even a forbidden one through.
    """
    made = config()
    for later in ([], ["mine:Forcing"]):
        runner = DraftRunner(monkeypatch, made, ROWS, LONGEST, WIDTH, later)
        for draft, is_forbidden, is_lost in ((50, False, False), (50, False, True),
                                             (50, True, False)):  # fmt: skip
            job = guided_job("drafts", PROMPTS[1])
            runner.add(job)
            step(runner, job)
            runner.write(job, [10])
            job.prefilled, job.drafts = len(job.ids), [draft]
            logits = torch.zeros(2, WIDTH)
            logits[:, TOKENS] = 5.0
            if is_forbidden:
                logits[0, draft] = -torch.inf
            if is_lost:
                logits[0, -1] = 9.0  # the scorer does not know the likeliest token
            before = runner.processor.engine.scorer.stats.passthroughs
            after = runner.apply([job], logits)
            row = BRUTE.row([*job.ids, draft], logits[1, : models.VOCAB], job.config, [STOP])
            if is_forbidden and not later:
                assert torch.equal(after[1], logits[1])
            else:
                oracle.assert_row_equal(after[1, : models.VOCAB], row)
            assert torch.equal(after[0], logits[0]) is is_lost
            lost = runner.processor.engine.scorer.stats.passthroughs - before
            assert lost == is_lost
            runner.remove(job)
