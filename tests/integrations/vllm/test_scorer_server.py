"""vLLM with its scorer on a scorer server: the same tokens, also when that comes and goes."""

from __future__ import annotations

import re
import signal
import threading
import time
from dataclasses import asdict

import pytest
import torch

from tests import PATIENCE, models, oracle
from tests.integrations.vllm import vllm_parts
from tests.integrations.vllm.mixed_requests import ASKED, PROMPTS, SAMPLING
from tests.integrations.vllm.vllm_steps import (
    CPU,
    brute_rows,
    built,
    engine,
    rows,
    step_logits,
)
from tests.integrations.vllm.vllm_steps import (
    PROMPTS as STEP_PROMPTS,
)
from tests.serving import process
from tests.serving.process import free_port
from tests.serving.served import client, critic, every_kind, served

from guided_decode.guidance.config import GuidanceConfig  # isort: skip
from guided_decode.integrations.vllm.build import build_engine  # isort: skip
from guided_decode.integrations.vllm.server_config import parse_config  # isort: skip
from guided_decode.scoring.remote import RemoteScorer, ScorerServerError  # isort: skip

# Engines take their time to load where other work shares the machine.
pytestmark = pytest.mark.timeout(900)
SCORER = (models.saved("llama", "token"), "--kind", "verl-critic")
ADDRESS = "tcp://10.0.0.1:7070"


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"device": "cuda:1"}, "device came with scorer='tcp://10.0.0.1:7070', whose server loaded "
                               "its scorer itself, on its own device: give that to guided-decode"),
        ({"reward": "x", "reference": "y"}, "reward and reference came with scorer='tcp://"),
        ({"revision": "main"}, "revision came with"),
        ({"rope_theta": 1e4}, "rope_theta came with"),
        ({"allow_pickle": True, "trust_remote_code": True}, "allow_pickle and trust_remote_code c"),
        ({"cache_tokens": 9, "max_forward_tokens": 9}, "cache_tokens and max_forward_tokens came"),
        ({"kind": "trunk-head"}, "a head on the policy's own hidden states is a file; set scorer"),
        ({"timeout": 0.0}, "timeout=0.0: input should be greater than 0"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused_in_words(own, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_config({"scorer": ADDRESS, **own}, "the test")


def test_options_of_a_server_alone_are_refused_with_a_model():
    reason = "came with scorer='critic', which is no scorer server's address: expected tcp://HOST"
    for name, value in (("key_file", "x"), ("timeout", 3.0)):
        with pytest.raises(ValueError, match=f"{name} {reason}"):
            parse_config({"scorer": "critic", name: value}, "the test")
    # What its server knows is not asked for here.
    parse_config({"scorer": ADDRESS, "kl_coef": 0.1, "dtype": "float32", "timeout": 3.0}, "it")
    parse_config({"scorer": ADDRESS, "terminal": "reward", "key_file": "x"}, "the test")


def test_a_worker_has_a_client_of_its_server():
    with served(critic(), kind="verl-critic") as server:
        made = built(scorer=server.address, bos="keep", terminal="baseline", dtype="float32")
        assert isinstance(made.scorer, RemoteScorer)
        for own, reason in (
            ({"top_k": None}, "top_k=null was given with RemoteScorer"),
            ({"kl_coef": 0.1}, "kl_coef was given, but the scorer at .* has no reference model"),
            ({"bos": "drop"}, "bos='drop' was given, but the scorer at .* has 'keep'"),
            ({"kind": "ppo-critic"}, "kind='ppo-critic' was given, but the scorer at"),
        ):
            with pytest.raises(ValueError, match=reason):
                built(scorer=server.address, **own)
    with served(every_kind()["implicit"]()) as server:
        made = built(scorer=server.address, kind="implicit", top_k=None)
        # An implicit reward has no value of a prefix.
        assert not made._compares


def test_a_mismatched_tokenizer_stops_the_worker():
    from transformers import AutoTokenizer

    from guided_decode import load_scorer
    from guided_decode.tiny_tulu import model_path
    from tests.integrations.vllm.test_build import other_tokenizer

    own = AutoTokenizer.from_pretrained(model_path("value"))
    scorer = load_scorer("tiny-tulu-value", policy_tokenizer=own)
    with served(scorer, kind="ppo-critic", tokenizer=own) as server:
        config = vllm_parts.vllm_config(
            {"guided_decode": {"scorer": server.address}},
            model=str(model_path("sft")), skip_tokenizer_init=False, max_model_len=128,
        )  # fmt: skip
        assert build_engine(config, CPU).scorer.vocab_size == scorer.vocab_size
        config.model_config.tokenizer = other_tokenizer()
        with pytest.raises(ValueError, match="policy and scorer at tcp://.* have different tokeni"):
            build_engine(config, CPU)


def stepped(made, logits):
    return made.step(logits.clone(), rows())


@pytest.mark.parametrize("on_error", ["passthrough", "raise"])
def test_a_step_without_its_server_passes_through_or_raises_and_then_guides_again(on_error):
    logits = step_logits()
    with served(critic()) as server:
        address = server.address
        made = engine(client(server), on_error=on_error, max_beta=5.0)
        for guided, row in zip(stepped(made, logits), brute_rows(logits), strict=True):
            oracle.assert_row_equal(guided, row)
    if on_error == "raise":
        with pytest.raises(ScorerServerError, match="went away"):
            stepped(made, logits)
    else:
        assert torch.equal(stepped(made, logits), logits)
        begun = time.perf_counter()
        for _ in range(20):
            assert torch.equal(stepped(made, logits), logits)
        assert time.perf_counter() - begun < 1.0
        assert made.scorer.stats.passthroughs == 21 * len(STEP_PROMPTS)
    before = made.scorer.stats.passthroughs
    with served(critic(), address):
        answered(lambda: made.scorer.refusal([5] * models.POSITIONS, 1))
        for guided, row in zip(stepped(made, logits), brute_rows(logits), strict=True):
            oracle.assert_row_equal(guided, row)
    assert made.scorer.stats.passthroughs == before


def answered(work, seconds=60):
    """What `work` returns once a server answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            return work()
        except ScorerServerError:
            assert time.monotonic() < end
            time.sleep(0.05)


def remote_report(worker):
    """The counters of the worker, and of its client."""
    own = vllm_parts.processor(worker).engine
    counts = asdict(own.counts) | own.scorer.stats.as_dict() | own.scorer.wire_counters()
    return counts | {"up": own.scorer._client.line.is_up}


@pytest.mark.slow
def test_an_engines_tokens_are_brute_forces_also_after_its_scorer_was_killed(brute_force):
    """A real engine and a real scorer process, which is killed in the middle and started again."""
    listen = f"tcp://127.0.0.1:{free_port()}"
    config = {"guided_decode": {"scorer": listen, "kind": "verl-critic", "log_every": 0}}
    long = [
        vllm_parts.params(200, None if asked is None else vllm_parts.asked(asked), ignore_eos=True)
        for asked in ASKED
    ]
    wide = {"async_scheduling": True, "max_num_batched_tokens": 20_000}
    with (
        process.started(*SCORER, listen=listen) as scorer,
        vllm_parts.engine(config, **wide) as llm,
    ):

        def report():
            vllm_parts.generate(llm, [[5, 6, 7]], vllm_parts.params(2, ignore_eos=True))
            return llm.collective_rpc(remote_report)[0]

        tokens = vllm_parts.generate(llm, PROMPTS, SAMPLING)
        oracle.assert_greedy_equal(tokens, brute_force)
        before = report()
        assert before["passthroughs"] == before["rows_asked_again"] == 0
        assert before["rows_scored"] > 100

        # It dies while rows are being decoded: they go on, and end.
        killer = threading.Thread(target=kill_at_work, args=(scorer, listen))
        killer.start()
        unguided = vllm_parts.generate(llm, PROMPTS, long)
        killer.join()
        assert [len(each) for each in unguided] == [200] * len(PROMPTS)
        without = report()
        assert without["passthroughs"] > before["passthroughs"]
        assert without["rows_scored"] > before["rows_scored"]
        assert not without["up"]

        with process.started(*SCORER, listen=listen):
            one = vllm_parts.params(1, vllm_parts.asked(GuidanceConfig(beta=1.0)))
            end = time.monotonic() + PATIENCE
            while not report()["up"] and time.monotonic() < end:
                vllm_parts.generate(llm, PROMPTS[:1], one)
            lost = report()["passthroughs"]
            tokens = vllm_parts.generate(llm, PROMPTS, SAMPLING)
            oracle.assert_greedy_equal(tokens, brute_force)
            assert report()["passthroughs"] == lost


def kill_at_work(scorer, address):
    """Kills a server once it has scored rows that were not there when this began."""
    watch = RemoteScorer(address)
    before = watch.server_counters()["rows"]
    while watch.server_counters()["rows"] < before + 100:
        time.sleep(0.005)
    scorer.end(signal.SIGKILL)
