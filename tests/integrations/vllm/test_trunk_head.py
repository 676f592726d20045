"""A value head on the policy's own trunk: no second model, siblings pruned by its values."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from tests import models
from tests.integrations.vllm import vllm_parts
from tests.integrations.vllm.trunk_heads import WEIGHT, head_file, tap_config
from tests.integrations.vllm.vllm_parts import params

from guided_decode.integrations.vllm.build import build_engine  # isort: skip
from guided_decode.integrations.vllm.trunk_build import refuse_look_ahead  # isort: skip
from guided_decode.integrations.vllm.engine import GuidedEngine  # isort: skip
from guided_decode.integrations.vllm.request import (  # isort: skip
    UNGUIDED,
    Admitted,
    Pruning,
    Request,
    admit,
)
from guided_decode.integrations.vllm.rows import LiveRow, Placed  # isort: skip
from guided_decode.integrations.vllm.runner_seat import take_seat  # isort: skip
from guided_decode.integrations.vllm.server_config import parse_config  # isort: skip
from guided_decode.integrations.vllm.trunk_tap import TrunkTap  # isort: skip
from guided_decode.prefix import PrefixHandle  # isort: skip
from guided_decode.scoring.trunk_head import TrunkHead  # isort: skip

CPU = torch.device("cpu")


class Policy:
    """What vLLM calls: logits from hidden states."""

    def compute_logits(self, hidden_states):
        return hidden_states @ torch.eye(48)


def engine(tap, **own):
    config = {"scorer": "the head", "kind": "trunk-head", "log_every": 0, **own}
    return GuidedEngine(parse_config(config, "the test"), tap=tap)


def watched():
    policy = type("Watched", (Policy,), {})
    tap = TrunkTap(TrunkHead(WEIGHT))
    tap.watch(policy)
    return policy(), tap


def test_the_tap_reads_the_rows_whose_logits_came_last():
    policy, tap = watched()
    hidden = torch.randn(5, 48)
    policy.compute_logits(torch.randn(70, 48))  # of an earlier step
    assert torch.equal(policy.compute_logits(hidden), hidden)
    expected = (hidden[[4, 1]] @ WEIGHT[0]).tolist()
    for _ in range(2):
        assert tap.values([4, 1], 5) == pytest.approx(expected, abs=1e-5)
    tap.forget()
    with pytest.raises(RuntimeError, match="of the policy's hidden states none were seen"):
        tap.values([4, 1], 5)


def test_the_tap_refuses_another_steps_rows():
    policy, tap = watched()
    policy.compute_logits(torch.randn(70, 48))
    with pytest.raises(RuntimeError, match="70 rows were seen, for logits of 5 rows"):
        tap.values([4], 5)


def test_a_second_tap_takes_the_place_of_the_first():
    policy, first = watched()
    second = TrunkTap(TrunkHead(WEIGHT))
    second.watch(type(policy))
    policy.compute_logits(torch.randn(2, 48))
    assert len(second.values([0, 1], 2)) == 2
    with pytest.raises(RuntimeError, match="none were seen"):
        first.values([0], 2)


@pytest.mark.parametrize("own", [{}, {"on_error": "raise", "max_beta": 1.0}])
def test_siblings_are_pruned_by_the_policys_own_values(own):
    policy, tap = watched()
    guided = engine(tap, **own)
    pruning = Pruning("a-group-name", 3, 1, 2, 40)
    prompt = models.prompts([4])[0]
    live = [
        Placed(i, LiveRow(Request(UNGUIDED, (), pruning), PrefixHandle(prompt), 4))
        for i in range(3)
    ]
    for length in range(3):
        hidden = torch.randn(3, 48, generator=torch.Generator().manual_seed(length))
        logits = policy.compute_logits(hidden)
        after = guided.step(logits.clone(), live)
        if length < 2:
            assert torch.equal(after, logits)
        for at, row in live:
            row.history.append(10 + at)
    best = int((hidden @ WEIGHT[0]).argmax())
    for i in range(3):
        forced = torch.full((48,), -torch.inf)
        forced[40] = 0.0
        assert torch.equal(after[i], logits[i] if i == best else forced)


def test_a_row_that_may_be_in_the_middle_of_its_prompt_is_not_read():
    """V1 calls for prompts that it prefills in chunks, with hidden states of their middle."""
    policy, tap = watched()
    guided = engine(tap)
    row = LiveRow(Request(UNGUIDED, (), Pruning("a-group-name", 2, 1, 2, 40)),
                  PrefixHandle([5, 6, 7, 8]), 2)  # fmt: skip
    for _ in range(2):  # back from a preemption, at its boundary
        guided.step(policy.compute_logits(torch.randn(1, 48)), [Placed(0, row)])
    assert row.sibling is not None
    assert tap.stats.rows_scored == 0


def test_the_head_has_to_fit_the_policy():
    config = vllm_parts.vllm_config(tap_config(scorer=head_file(torch.zeros(1, 32))))
    with pytest.raises(ValueError, match="trained on a trunk with hidden_size=32.* has 48"):
        build_engine(config, CPU)


def test_lora_is_refused():
    config = vllm_parts.vllm_config(tap_config())
    config.lora_config = object()
    with pytest.raises(ValueError, match="which a LoRA adapter changes"):
        build_engine(config, CPU)


GROUP = {"guide_group": "a-group-name", "guide_group_size": 4, "guide_keep": 2, "guide_every": 2}


def test_where_the_engine_cannot_look_ahead_groups_are_kept_and_guidance_is_counted():
    config = parse_config({"scorer": "the head", "kind": "trunk-head"}, "the test")

    def granted(asked, guides, config=config):
        return admit(params(4, asked, stop_token_ids=[77]), config, [], groups=True, guides=guides)

    assert granted({"guide": 1}, guides=True).request.is_guided
    assert granted({"guide": 1}, guides=False).request is None
    request, clamps = granted({"guide": 1} | GROUP, guides=False)
    assert request.pruning is not None
    assert not request.is_guided
    assert "by the policy's own trunk is not to be had here" in clamps[0]
    # It asks to be written to the log there, too.
    logged = parse_config(
        {"scorer": "the head", "kind": "trunk-head", "value_log": "values.jsonl"}, "the test"
    )
    assert granted({"guide": 1}, False, logged) == Admitted(Request(UNGUIDED, (77,)), [])
    assert len(granted({"guide_beta": 1.0}, False, logged).clamps) == 1


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"top_k": None}, 'top_k=null came with kind="trunk-head", which forwards every candidate'),
        ({"reference": "r", "dtype": "float32"},
         'reference and dtype came with kind="trunk-head", a head that reads'),
        ({"scorer": "tcp://h:1"}, "is a file; set scorer to it, or drop kind"),
    ],
)  # fmt: skip
def test_what_a_head_on_the_trunk_has_no_use_for(own, message):
    given = {"scorer": "the head", "kind": "trunk-head", **own}
    with pytest.raises(ValueError, match=message):
        parse_config(given, "the test")


@pytest.mark.parametrize(
    ("where", "value", "what"),
    [
        ("parallel_config.pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config.data_parallel_size", 2, "data parallelism"),
        ("parallel_config.decode_context_parallel_size", 2, "decode context parallelism"),
        ("model_config.uses_mrope", True, "positions of several dimensions"),
        ("model_config.is_hybrid", True, "layers with a state in place of keys and values"),
        ("model_config.is_encoder_decoder", True, "an encoder"),
        ("kv_transfer_config", object(), "a KV connector, which every forward would tell"),
    ],
)
def test_engines_that_cannot_look_ahead(where, value, what):
    usual = {
        "parallel_config": {"pipeline_parallel_size": 1, "data_parallel_size": 1},
        "model_config": {},
    }
    part, _, name = where.rpartition(".")
    config = SimpleNamespace(**{key: SimpleNamespace(**fields) for key, fields in usual.items()})
    refuse_look_ahead(config)
    setattr(getattr(config, part) if part else config, name, value)
    with pytest.raises(ValueError, match=f"this engine has {what}"):
        refuse_look_ahead(config)


def test_a_vllm_that_was_not_read_is_not_patched(monkeypatch, caplog):
    from vllm.v1.worker import gpu_model_runner

    def initialize_kv_cache(self, something_else):
        pass

    runner = gpu_model_runner.GPUModelRunner
    monkeypatch.setattr(runner, "initialize_kv_cache", initialize_kv_cache)
    monkeypatch.delitem(sys.modules, "vllm.v1.worker.gpu.model_runner", raising=False)
    config = vllm_parts.vllm_config(tap_config())
    with pytest.raises(RuntimeError, match=r"another model runner than those .*\(0.32.0\)"):
        take_seat(config, 8)
    assert runner.initialize_kv_cache is initialize_kv_cache
    guided = build_engine(config, CPU)
    assert guided.scorer is None
    assert "compares siblings, and guides no one: this vLLM has another" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_engines_values_are_hugging_faces(tmp_path):
    log = tmp_path / "values.jsonl"
    config = tap_config(value_log=str(log), value_log_every=1)
    prompts = models.prompts(list(range(3, 35)), seed=12)
    with vllm_parts.engine(config, max_num_batched_tokens=64) as llm:
        asked = params(24, {"guide": 1}, ignore_eos=True)
        tokens = vllm_parts.generate(llm, prompts, asked)
        group = {"guide_group": "group-of-the-tap", "guide_group_size": 8, "guide_keep": 2,
                 "guide_every": 6}  # fmt: skip
        pruned = params(24, group, n=8, temperature=1.0, ignore_eos=True, stop_token_ids=[100],
                        logit_bias={100: -100.0})  # fmt: skip
        (output,) = llm.generate([{"prompt_token_ids": prompts[0]}], pruned, use_tqdm=False)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    values = {(line["prompt"], line["response"]): line["value"] for line in lines
              if line["group"] is None}  # fmt: skip
    trunk, compared = vllm_parts.policy().model, 0
    for prompt, response in zip(prompts, tokens, strict=True):
        hidden = trunk(torch.tensor([prompt + response])).last_hidden_state[0]
        expected = hidden @ WEIGHT[0]
        for length in range(1, len(response)):
            found = values[len(prompt), length]
            assert found == pytest.approx(float(expected[len(prompt) + length - 1]), abs=1e-4)
            compared += 1
    assert compared == 32 * 23
    ended = [o for o in output.outputs if o.stop_reason == 100]
    assert len(ended) == 6
    assert all(7 <= len(o.token_ids) < 24 for o in ended)
