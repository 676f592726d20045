"""What `generate` hands to no custom loop is honoured or refused all the same."""

import threading

import pytest
import torch
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from guided_decode import GuidanceConfig
from guided_decode.integrations.transformers import GuidedDecoding, TrunkLookahead
from tests import PATIENCE, models, trunk_heads

PROMPT = torch.tensor([[5, 6, 7]])
CONFIG = GuidanceConfig(beta=1.5, top_k=6)
LOOPS = [GuidedDecoding, TrunkLookahead]


class Collect(BaseStreamer):
    """Everything that is streamed."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


class Spelled:
    """As much of a tokenizer as a text streamer asks for."""

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


def generate(guided, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "custom_generate": guided} | options
    return trunk_heads.policy().generate(PROMPT, **options)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_streamer_of_generate_gets_the_prompt_the_tokens_and_the_end(loop):
    streamer = Collect()
    out = generate(loop(trunk_heads.scorer(), CONFIG), streamer=streamer)
    assert streamer.tokens == [*out[0].tolist(), "end"]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_streamer_is_found_from_within_a_callable_of_the_users(loop):
    guided, streamer = loop(trunk_heads.scorer(), CONFIG), Collect()
    out = generate(lambda *own, **named: guided(*own, **named), streamer=streamer)
    assert streamer.tokens == [*out[0].tolist(), "end"]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_reader_of_a_streamer_comes_to_its_end(loop):
    streamer = TextIteratorStreamer(Spelled(), skip_prompt=True, timeout=PATIENCE)
    guided = loop(trunk_heads.scorer(), CONFIG)
    thread = threading.Thread(target=generate, args=(guided,), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == [str(token) for token in generate(guided)[0, 3:].tolist()]


@pytest.mark.parametrize("loop", LOOPS)
def test_two_streamers_are_refused(loop):
    guided = loop(trunk_heads.scorer(), CONFIG, streamer=Collect())
    with pytest.raises(ValueError, match=r"streamer was given to generate and to the custom loop"):
        generate(guided, streamer=Collect())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_streamer_without_an_end_is_refused_before_a_token_is_put(loop):
    streamer = Collect()
    endless = type("Endless", (), {"put": streamer.put})()
    with pytest.raises(ValueError, match=r"an? Endless: expected a streamer with put.* and end"):
        generate(loop(trunk_heads.scorer(), CONFIG, streamer=endless))
    assert streamer.tokens == []


def test_a_streamer_of_generate_is_refused_with_beams():
    with pytest.raises(ValueError, match=r"a streamer was given with 3 beams"):
        generate(GuidedDecoding(trunk_heads.scorer(), CONFIG), streamer=Collect(), num_beams=3)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_assistant_is_refused(loop):
    assistant = models.tiny("llama", "lm", seed=4)
    with pytest.raises(ValueError, match=r"assistant_model=LlamaForCausalLM.*drop assistant_model"):
        generate(loop(trunk_heads.scorer(), CONFIG), assistant_model=assistant)


def test_synced_gpus_reach_the_stock_loop(monkeypatch):
    seen = []
    policy = type(trunk_heads.policy())
    unfinished = policy._has_unfinished_sequences

    def spy(self, this_peer_finished, synced_gpus, **options):
        seen.append(synced_gpus)
        return unfinished(self, this_peer_finished, False, **options)

    monkeypatch.setattr(policy, "_has_unfinished_sequences", spy)
    generate(GuidedDecoding(trunk_heads.scorer(), CONFIG), synced_gpus=True)
    assert seen == [True] * 7
    with pytest.raises(ValueError, match=r"synced_gpus=True was given: .*use GuidedDecoding"):
        generate(TrunkLookahead(trunk_heads.scorer(), CONFIG), synced_gpus=True)


def test_nothing_is_taken_from_a_call_that_has_ended():
    streamer = Collect()
    guided = GuidedDecoding(trunk_heads.scorer(), CONFIG)
    generate(guided, streamer=streamer)
    before = list(streamer.tokens)
    generate(guided)
    assert streamer.tokens == before
