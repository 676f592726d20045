"""The processor's edges: scorers that fail, ranks that take over, engines that are refused."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch

from guided_decode import GuidanceConfig
from guided_decode.scores import Scores
from tests import models, oracle, vllm_parts

from guided_decode.integrations.vllm import ValueGuidedLogitsProcessor  # isort: skip
from guided_decode.integrations.vllm.build import build_engine, refuse_unsupported  # isort: skip
from guided_decode.integrations.vllm.engine import GuidedEngine  # isort: skip
from guided_decode.integrations.vllm.request import Pruning, Request  # isort: skip
from guided_decode.integrations.vllm.rows import LiveRow, Placed  # isort: skip
from guided_decode.integrations.vllm.server_config import parse_config  # isort: skip
from guided_decode.prefix import PrefixHandle  # isort: skip

CPU = torch.device("cpu")
CONFIG = GuidanceConfig(beta=1.0, top_k=4)
PROMPTS = models.prompts([4, 9, 6, 12], seed=2)


class Failing:
    """The tiny critic, which fails on some of its calls."""

    def __init__(self, scorer: Any, fault: str) -> None:
        self._scorer, self._fault = scorer, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def score(self, prefixes, candidates):
        if self._fault == "raises":
            raise RuntimeError("the scorer broke")
        values, baseline = self._scorer.score(prefixes, candidates)
        spoiled = torch.tensor([len(prefix) == 9 for prefix in prefixes])
        bad = torch.nan if self._fault == "nan" else torch.inf
        if self._fault == "nan baseline":
            return Scores(values, baseline.masked_fill(spoiled, torch.nan))
        return Scores(values.masked_fill(spoiled[:, None], bad), baseline)


def built(**own):
    return build_engine(vllm_parts.vllm_config(vllm_parts.scorer_config(**own)), CPU)


def engine(scorer, broadcast=None, **own):
    config = vllm_parts.scorer_config(**own)["guided_decode"]
    return GuidedEngine(parse_config(config, "the test"), scorer, broadcast=broadcast)


@pytest.fixture(scope="module")
def scorer():
    return built().scorer


def rows(pruning=None, unguided=()):
    return [
        Placed(i, LiveRow(Request(CONFIG, (models.EOS,), pruning), PrefixHandle(p), len(p)))
        for i, p in enumerate(PROMPTS)
        if i not in unguided
    ]


def step_logits():
    return torch.randn(len(PROMPTS), models.VOCAB, generator=torch.Generator().manual_seed(0))


def brute_rows(logits):
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    return [brute.row(p, own, CONFIG, [models.EOS]) for p, own in zip(PROMPTS, logits, strict=True)]


@pytest.mark.parametrize("fault", ["nan", "inf", "nan baseline"])
def test_a_row_whose_scores_are_no_numbers_goes_on_as_it_came(scorer, fault, caplog):
    logits = step_logits()
    scorer.stats.reset()
    failing = engine(Failing(scorer, fault))
    for _ in range(3):
        guided = failing.step(logits.clone(), rows())
        assert torch.equal(guided[1], logits[1])
        for i, expected in enumerate(brute_rows(logits)):
            if i != 1:
                oracle.assert_row_equal(guided[i], expected)
    assert scorer.stats.passthroughs == 3
    assert caplog.text.count("rows go on unguided because scoring failed") == 1


def test_a_scorer_that_raises_leaves_every_row_as_it_came(scorer, caplog):
    logits = step_logits()
    scorer.stats.reset()
    failing = engine(Failing(scorer, "raises"))
    for _ in range(3):
        assert torch.equal(failing.step(logits.clone(), rows(unguided=[2])), logits)
    assert scorer.stats.passthroughs == 9
    assert caplog.text.count("rows go on unguided because scoring failed: the scorer broke") == 1


def test_siblings_whose_value_is_no_number_are_not_compared(scorer):
    pruning = Pruning("a-group-name", 4, 1, 2, 77)
    live = rows(pruning)
    failing = engine(Failing(scorer, "raises"))
    logits = step_logits()
    for _ in range(2):
        for placed in live:
            placed.row.history.append(11)
    assert torch.equal(failing.step(logits.clone(), live), logits)
    assert not any(placed.row.sibling.is_pruned for placed in live)


def test_a_server_may_want_failures_to_end_it(scorer):
    with pytest.raises(RuntimeError, match="the scorer broke"):
        engine(Failing(scorer, "raises"), on_error="raise", max_beta=5.0).step(
            step_logits(), rows()
        )
    with pytest.raises(ValueError, match="NaN or infinity for rows \\[1\\]"):
        engine(Failing(scorer, "nan"), on_error="raise", max_beta=5.0).step(step_logits(), rows())


def test_an_error_of_the_device_ends_the_engine(scorer):
    class Broken(Failing):
        def score(self, prefixes, candidates):
            raise torch.AcceleratorError("an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        engine(Broken(scorer, "")).step(step_logits(), rows())


class Ranks:
    """Two ranks in two threads: what rank 0 broadcasts is what rank 1 gets."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=30)
        self.sent: torch.Tensor | None = None

    def lead(self, tensor):
        assert tensor.is_contiguous()
        self.sent = tensor.clone()
        self.barrier.wait()
        self.barrier.wait()
        return tensor

    def follow(self, tensor):
        self.barrier.wait()
        assert tensor.shape == self.sent.shape
        tensor.copy_(self.sent)
        self.barrier.wait()
        return tensor

    def run(self, scorer, every=False, **own):
        """What each rank's step gave: its logits, or its error."""
        results: list[Any] = [None, None]

        def rank(number, engine):
            try:
                # vLLM hands over a slice where it padded the vocabulary.
                padded = torch.nn.functional.pad(step_logits(), (0, 27))
                live = rows(unguided=() if every else [2])
                results[number] = engine.step(padded[:, : models.VOCAB], live)
            except Exception as error:
                results[number] = error

        leader = engine(scorer, self.lead, **own)
        follower = engine(None, self.follow, **own)
        threads = [
            threading.Thread(target=rank, args=args) for args in ((0, leader), (1, follower))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_ranks_have_one_result(scorer):
    logits = step_logits()
    first, second = Ranks().run(scorer)
    assert torch.equal(first, second)
    for i, expected in enumerate(brute_rows(logits)):
        if i != 2:
            oracle.assert_row_equal(second[i], expected)
    assert torch.equal(second[2], logits[2])


def test_a_failure_is_decided_once_for_all_ranks(scorer):
    for every in (False, True):
        first, second = Ranks().run(Failing(scorer, "raises"), every)
        assert torch.equal(first, step_logits())
        assert torch.equal(second, step_logits())
    first, second = Ranks().run(Failing(scorer, "raises"), on_error="raise", max_beta=5.0)
    assert "the scorer broke" in str(first)
    assert "the rank that scores failed" in str(second)


def test_tokens_that_vllm_does_not_hand_over_leave_the_row_alone(scorer, caplog):
    from vllm.v1.sample.logits_processor import BatchUpdate

    config = vllm_parts.vllm_config(vllm_parts.scorer_config())
    processor = ValueGuidedLogitsProcessor(config, CPU, False)
    asks = vllm_parts.params(8, {"guide": 1, "guide_top_k": 4})
    placeholders = [-1]
    added = [(0, asks, None, []), (1, asks, PROMPTS[1], placeholders), (2, asks, PROMPTS[2], [])]
    processor.update_state(BatchUpdate(batch_size=4, removed=[], added=added, moved=[]))
    logits = step_logits()
    guided = processor.apply(logits.clone())
    assert torch.equal(guided[[0, 1, 3]], logits[[0, 1, 3]])
    oracle.assert_row_equal(guided[2], brute_rows(logits)[2])
    assert processor.engine.counts.unguided_rows == 2
    assert "load the processor by --logits-processors" in caplog.text
    placeholders[0] = 14  # repaired
    guided = processor.apply(logits.clone())
    assert not torch.equal(guided[1], logits[1])


def test_what_a_request_contains_never_raises_in_the_worker(caplog):
    caplog.set_level(logging.WARNING)
    own = built(top_k=8, max_top_k=8)
    odd = [{"guide_top_k": "many"}, {"guide_rule": []}, {"guide": {}}, {"guide_keep": -1},
           {"guide_x": None}, {"guide_top_k": 9}]  # fmt: skip
    for extra in odd:
        own.admit(vllm_parts.params(4, extra))
    assert own.counts.clamps == len(odd)
    assert caplog.text.count("a request asked for more than it gets") == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: setattr(c, "speculative_config", object()), "speculative decoding is on"),
        (lambda c: setattr(c.model_config, "enable_prompt_embeds", True), "--enable-prompt-embeds"),
        (
            lambda c: setattr(c.parallel_config, "enable_batch_sharded_sampling", True),
            "batch-sharded sampling is on",
        ),
    ],
)
def test_engines_that_are_refused(change, reason):
    config = vllm_parts.vllm_config(vllm_parts.scorer_config())
    refuse_unsupported(config)
    change(config)
    with pytest.raises(ValueError, match=reason):
        refuse_unsupported(config)


def test_a_scorer_that_does_not_fit_is_refused_with_what_can_be_done():
    with pytest.raises(ValueError, match=r"does not fit on cpu.*bfloat16.*cache_tokens"):
        built(cache_tokens=1 << 42)


def test_the_whole_vocabulary_is_refused_for_a_critic_at_start():
    with pytest.raises(ValueError, match="top_k=null was given with CriticScorer"):
        built(top_k=None)


def test_the_cache_is_as_large_as_the_batch_needs():
    config = vllm_parts.vllm_config(vllm_parts.scorer_config(), max_num_seqs=4, max_model_len=100)
    assert build_engine(config, CPU).scorer.cache.capacity == 4 * (100 + 64)


def test_a_mismatched_tokenizer_stops_the_server():
    from guided_decode.tiny_tulu import model_path

    tulu = vllm_parts.vllm_config(
        vllm_parts.scorer_config(),
        model=str(model_path("sft")),
        skip_tokenizer_init=False,
        max_model_len=128,
    )
    tulu.additional_config["guided_decode"]["scorer"] = str(model_path("value"))
    assert build_engine(tulu, CPU).scorer is not None
    tulu.model_config.tokenizer = other_tokenizer()
    with pytest.raises(ValueError, match="different"):
        build_engine(tulu, CPU)


def other_tokenizer() -> str:
    """tiny-tulu's tokenizer with two tokens exchanged."""
    import json

    from transformers import AutoTokenizer

    from guided_decode.tiny_tulu import model_path

    folder = models.scratch() / "other-tokenizer"
    AutoTokenizer.from_pretrained(model_path("sft")).save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["3"], vocab["4"] = vocab["4"], vocab["3"]
    path.write_text(json.dumps(content))
    return str(folder)


def test_importing_the_processor_is_light():
    import subprocess
    import sys

    code = (
        "import sys, vllm.v1.sample.logits_processor; before = set(sys.modules);"
        "import guided_decode.integrations.vllm; new = set(sys.modules) - before;"
        "assert 'guided_decode.loading' not in new and 'guided_decode.critic' not in new;"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_request_that_the_scorer_refuses_does_not_end_a_server_that_may_raise(scorer):
    live = rows()
    live[1].row.history.extend([7] * models.POSITIONS)
    logits = step_logits()
    guided = engine(scorer, on_error="raise", max_beta=5.0).step(logits.clone(), live)
    assert torch.equal(guided[1], logits[1])
    oracle.assert_row_equal(guided[0], brute_rows(logits)[0])


def test_raising_needs_a_limit_of_beta():
    with pytest.raises(ValueError, match='on_error="raise" was given without max_beta'):
        engine(None, on_error="raise")


def test_nobody_asks_for_more_candidates_than_there_are_tokens():
    assert built(max_top_k=10_000).config.max_top_k == models.VOCAB
    with pytest.raises(ValueError, match="top_k=102 is larger than the policy's vocabulary of 101"):
        built(top_k=102, max_top_k=200)


def test_a_neighbour_with_more_candidates_changes_nothing():
    small = built(cache_tokens=80).scorer
    prompt = models.prompts([70])[0]
    narrow, wide = GuidanceConfig(top_k=4), GuidanceConfig(top_k=64)
    logits = step_logits()[:2]
    from guided_decode.step import guide_rows

    alone = guide_rows(small, logits[:1], [prompt], narrow)
    both = guide_rows(small, logits, [prompt, prompt], [narrow, wide], on_error="passthrough")
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-5)
    assert torch.equal(both[1], logits[1])


def test_a_log_of_values_that_cannot_be_written_stops_nothing(scorer, caplog):
    logging_engine = engine(scorer, value_log="/dev/full", value_log_every=1)
    logits = step_logits()
    for _ in range(2):
        guided = logging_engine.step(logits.clone(), rows())
        oracle.assert_row_equal(guided[0], brute_rows(logits)[0])
    assert caplog.text.count("values are no longer logged to /dev/full") == 1


def test_ranks_admit_the_same_requests():
    """An implicit reward compares no siblings: the ranks without one must know it, too."""
    implicit = {"scorer": models.saved("llama", "lm"), "kind": "implicit",
                "reference": models.saved("llama", "lm", seed=1), "log_every": 0}  # fmt: skip
    config = vllm_parts.vllm_config({"guided_decode": implicit})
    asks = vllm_parts.params(8, {"guide_group": "a-group-name", "guide_group_size": 2,
                                 "guide_keep": 1, "guide_every": 2},
                             stop_token_ids=[77])  # fmt: skip
    leader = build_engine(config, CPU)
    follower = GuidedEngine(leader.config, None, groups=leader._compares)
    assert leader.admit(asks) is None
    assert follower.admit(asks) is None
