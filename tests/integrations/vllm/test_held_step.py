"""The held step and its blocks on a runner of a few lines: what nobody asked for is answered by
nobody, and nothing of a request is written."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.integrations.vllm import vllm_parts  # noqa: F401 - skips where there is no vLLM

from guided_decode.integrations.vllm import own_forward  # isort: skip
from guided_decode.integrations.vllm.held_step import HeldStep  # isort: skip
from guided_decode.integrations.vllm.own_forward import LookAhead, OwnForward  # isort: skip
from guided_decode.integrations.vllm.runner_seat import RunnerSeat  # isort: skip
from guided_decode.prefix import PrefixHandle  # isort: skip

BLOCK, OWN, SET_ASIDE = 4, 8, 4


class Model(torch.nn.Module):
    """A cache slot holds the token's id, and so does its hidden state, with its position."""

    def __init__(self):
        super().__init__()
        self.cache = torch.zeros(OWN + SET_ASIDE, 1, BLOCK, 1)
        self.calls = 0

    def forward(self, input_ids, positions, **_):
        self.calls += 1
        self.cache[self.slots // BLOCK, 0, self.slots % BLOCK, 0] = input_ids.float()
        return input_ids.float()[:, None].repeat(1, 2) + 1000 * positions[:, None]


class Attention:
    layer_names = ("layer",)
    kv_cache_spec = SimpleNamespace()

    def __init__(self, model):
        self.model = model

    def get_metadata_builder(self):
        return None

    def build_metadata(self, common):
        self.model.slots = common.slot_mapping


@pytest.fixture
def setting(monkeypatch):
    """Model Runner V2's shape: a request of three tokens in block 1, and its handle."""
    import contextlib

    import vllm.forward_context

    monkeypatch.setattr(
        vllm.forward_context, "set_forward_context", lambda *_, **__: contextlib.nullcontext()
    )
    model = Model()
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK), layer_names=["layer"])
    layers = {"layer": SimpleNamespace(kv_cache=model.cache)}
    runner = SimpleNamespace(
        device=torch.device("cpu"), model=model, prepare_attn=lambda batch: None,
        reload_weights=lambda: None,
        block_tables=SimpleNamespace(
            input_block_tables=[torch.tensor([[1, 2, 3, 0]], dtype=torch.int32)]
        ),
        kv_cache_config=SimpleNamespace(kv_cache_groups=[group], num_blocks=OWN + SET_ASIDE),
        compilation_config=SimpleNamespace(static_forward_context=layers),
        attn_groups=[[Attention(model)]],
    )  # fmt: skip
    scheduler = SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=16)
    config = SimpleNamespace(scheduler_config=scheduler)
    forward = OwnForward(config, RunnerSeat(SET_ASIDE, runner, OWN))
    held = HeldStep(forward)
    handle = PrefixHandle([11, 12, 13])
    model.cache[1, 0, :3, 0] = torch.tensor([11.0, 12.0, 13.0])
    held.standing = lambda batch: [handle]
    return SimpleNamespace(model=model, runner=runner, forward=forward, held=held, handle=handle)


def looked(setting, length, *tokens):
    setting.held.begin()
    setting.forward.begin()
    hidden = setting.forward.hidden([LookAhead(0, 0, length, token) for token in tokens])
    setting.held.hold({0: setting.handle})
    return hidden


def step(setting, position):
    setting.runner.prepare_attn(
        SimpleNamespace(num_reqs=1, num_tokens=1, num_computed_tokens_np=np.array([position]))
    )


def forwarded(setting, token, position):
    setting.model.slots = torch.tensor([1 * BLOCK + position])
    return setting.runner.model(input_ids=torch.tensor([token]), positions=torch.tensor([position]))


def test_a_candidate_that_is_chosen_answers_the_next_forward(setting):
    looked(setting, 3, 20, 21)
    calls = setting.model.calls
    step(setting, 3)
    assert forwarded(setting, 21, 3).tolist() == [[3021.0, 3021.0]]
    assert setting.model.calls == calls
    assert setting.model.cache[1].flatten().tolist() == [11.0, 12.0, 13.0, 21.0]


@pytest.mark.parametrize(("token", "position"), [(22, 3), (21, 2)])
def test_another_token_or_place_is_forwarded(setting, token, position):
    looked(setting, 3, 20, 21)
    calls = setting.model.calls
    step(setting, position)
    assert forwarded(setting, token, position)[0, 0] == 1000 * position + token
    assert setting.model.calls == calls + 1


def test_a_step_that_a_whole_graph_replayed_answers_no_look_ahead(setting):
    looked(setting, 3, 20, 21)
    step(setting, 3)
    # The graph wrote the token's keys itself, and never called the model.
    setting.model.cache[1, 0, 3, 0] = 21.0
    setting.handle.append(21)
    calls = setting.model.calls
    assert looked(setting, 4, 20, 33).tolist() == [[4020.0, 4020.0], [4033.0, 4033.0]]
    assert setting.model.calls == calls + 1
    assert setting.model.cache[1].flatten().tolist() == [11.0, 12.0, 13.0, 21.0]


def test_what_was_held_of_other_weights_is_forgotten(setting):
    looked(setting, 3, 20, 21)
    setting.runner.reload_weights()
    calls = setting.model.calls
    step(setting, 3)
    forwarded(setting, 21, 3)
    assert setting.model.calls == calls + 1


def test_more_candidates_than_blocks_are_forwarded_in_parts_and_the_last_are_held(setting):
    hidden = looked(setting, 3, *range(20, 27))
    assert hidden[:, 0].tolist() == [3000.0 + token for token in range(20, 27)]
    assert setting.model.calls == 2
    assert setting.model.cache[1].flatten().tolist() == [11.0, 12.0, 13.0, 0.0]
    step(setting, 3)
    assert forwarded(setting, 20, 3)[0, 0] == 3020.0
    assert setting.model.calls == 3, "its block is another candidate's by now"


def test_caches_that_have_no_room_are_refused(setting):
    assert setting.forward.unfit is None
    for change in ({"uses_slot_mapping": False},):
        Attention.kv_cache_spec = SimpleNamespace(**change)
        try:
            other = OwnForward(setting.forward._config, setting.forward._seat)
            assert "blocks are not its tokens' own" in other.unfit
        finally:
            Attention.kv_cache_spec = SimpleNamespace()
    none = OwnForward(setting.forward._config, RunnerSeat(0, setting.runner, OWN))
    assert "no block of the KV cache could be set aside" in none.unfit


def test_a_builder_of_graphs_is_told_that_there_is_none():
    builder = SimpleNamespace(enable_cuda_graph=True)
    with own_forward._without_graphs(builder):
        assert not builder.enable_cuda_graph
    assert builder.enable_cuda_graph
