"""The local generator: the stock model's tokens, whatever the batch, and no token twice."""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from guided_decode import tiny_tulu
from guided_decode.search import (
    Blocks,
    CallableJudge,
    Sampling,
    best_of_n,
    block_search,
    load_generator,
    prune_and_refill,
    run,
    sequential_monte_carlo,
)
from guided_decode.search.local import outside_mass
from guided_decode.search.seeds import derive
from tests import models

PROMPTS = models.prompts([9, 4, 17], seed=1)
GREEDY = Sampling(temperature=0.0)


def generator(arch="llama", **options):
    return load_generator(models.tiny(arch, "lm", seed=1), eos_token_ids=[2], **options)


def extend(policy, prefixes, n=1, most=8, how=GREEDY, seeds=None):
    count = len(prefixes)
    return policy.extend(
        prefixes, [n] * count, max_tokens=[most] * count, sampling=[how] * count,
        seeds=seeds or list(range(count)),
    )  # fmt: skip


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "gemma2"])
@torch.inference_mode()
def test_greedy_continuations_are_the_stock_models(arch):
    policy, stock = generator(arch), models.tiny(arch, "lm", seed=1)
    for prompt, (own,) in zip(PROMPTS, extend(policy, PROMPTS, most=12), strict=True):
        ids = torch.tensor([prompt])
        out = stock.generate(
            ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert list(own.tokens) == out[0, len(prompt) :].tolist()[: len(own.tokens)]
        assert own.finished == (own.tokens[-1] == 2)
        assert own.reason == ("eos" if own.finished else "length")
        whole = torch.tensor([[*prompt, *own.tokens]])
        log_probs = stock(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(-1, torch.tensor(own.tokens)[:, None])[:, 0]
        assert own.log_probs == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_sample_depends_on_its_seed_and_number_alone():
    how = Sampling(temperature=0.9, top_p=0.95)
    together = extend(generator(), PROMPTS, n=3, how=how, seeds=[5, 6, 7])
    for i in (2, 0, 1):
        for number in range(3):
            alone = extend(generator(), [PROMPTS[i]], n=number + 1, how=how, seeds=[5 + i])
            assert alone[0][number].tokens == together[i][number].tokens
    assert len({each.tokens for each in together[0]}) == 3


@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(temperature=0.6), Sampling(top_p=0.7), Sampling(1.4, 0.9)]
)
@torch.inference_mode()
def test_samples_have_the_policys_distribution(how):
    draws = 3000
    own = extend(generator(), [PROMPTS[1]], n=draws, most=1, how=how)[0]
    logits = models.tiny("llama", "lm", seed=1)(torch.tensor([PROMPTS[1]])).logits[0, -1]
    p = (logits / how.temperature).softmax(-1)
    if how.top_p < 1:
        ordered, order = p.sort(descending=True)
        kept = order[: int((ordered.cumsum(-1) < how.top_p).sum()) + 1]
        inside = torch.zeros_like(p)
        inside[kept] = p[kept]
        p = inside / inside.sum()
    counts = Counter(each.tokens[0] for each in own)
    assert all(p[token] > 0 for token in counts)
    common = [i for i in range(len(p)) if p[i] * draws >= 8]
    expected = [p[i].item() * draws for i in common]
    observed = [counts[i] for i in common]
    expected, observed = [*expected, draws - sum(expected)], [*observed, draws - sum(observed)]
    if expected[-1] < 1e-3:
        expected, observed = expected[:-1], observed[:-1]
    scale = sum(observed) / sum(expected)
    assert chisquare(observed, [each * scale for each in expected]).pvalue > 1e-3


def test_the_mass_keeps_the_token_that_reaches_it():
    logits = torch.tensor([[0.5, 0.3, 0.2, 1e-9]]).log()
    kept = [(~outside_mass(logits, torch.tensor([[p]]))).sum().item()
            for p in (0.01, 0.5, 0.51, 0.8, 0.81, 1.0)]  # fmt: skip
    assert kept == [1, 1, 2, 2, 3, 4]


METHODS = {
    "best of n": lambda prompt: best_of_n(prompt, n=6, max_tokens=10),
    "blocks": lambda prompt: block_search(prompt, Blocks(2, 3, block=3), max_tokens=10),
    "beam": lambda prompt: block_search(prompt, Blocks.value_beam(3, 2), max_tokens=10),
    "refill": lambda prompt: prune_and_refill(prompt, n=5, block=3, margin=0.2, max_tokens=10),
    "smc": lambda prompt: sequential_monte_carlo(
        prompt, particles=6, block=3, beta=3.0, threshold=0.9, max_tokens=10
    ),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_token_of_the_tree_is_forwarded_twice(method):
    policy, prompt = generator(), PROMPTS[0]
    extended = set()

    class Watched:
        def extend(self, prefixes, n, **how):
            answers = policy.extend(prefixes, n, **how)
            for prefix, own in zip(prefixes, answers, strict=True):
                for each in own:
                    # A piece's last token is forwarded when something follows it.
                    whole = (*prefix, *each.tokens)[:-1]
                    extended.update(whole[: i + 1] for i in range(len(whole)))
            return answers

    judge = CallableJudge(lambda texts: [derive(sum(t.response), 1) / 2**62 for t in texts])
    run(method(prompt), Watched(), judge)
    assert policy.stats.prefix_tokens == len(extended)


def test_a_full_cache_changes_the_cost_and_no_token():
    how = Sampling(temperature=0.8)
    free = extend(generator(), PROMPTS, n=4, how=how)
    tight = generator(cache_tokens=60)
    assert [[each.tokens for each in own] for own in extend(tight, PROMPTS, n=4, how=how)] == [
        [each.tokens for each in own] for own in free
    ]
    assert tight.stats.evictions > 0


def test_pieces_end_with_a_stop_string_wherever_tokens_are_cut():
    policy = load_generator(tiny_tulu.model_path("sft"))
    tokenizer = policy._tokenizer
    prompt = tokenizer.encode(
        tiny_tulu.render(tiny_tulu.held_out_prompts(1)[0]), add_special_tokens=False
    )
    ((whole,),) = extend(policy, [prompt], most=80)
    text = tokenizer.decode(whole.tokens)
    assert whole.finished
    assert "\n" in text
    for stop in (("\n",), ("nothing", "Answer"), ("c1\n", "c0\n")):
        ((own,),) = extend(policy, [prompt], most=80, how=Sampling(0.0, stop=stop))
        piece = tokenizer.decode(own.tokens)
        assert own.reason == "stop"
        assert whole.tokens[: len(own.tokens)] == own.tokens
        assert any(each in piece for each in stop)
        before = tokenizer.decode(own.tokens[:-1])
        assert not any(each in before for each in stop)


def test_a_stop_string_ends_a_response_of_best_of_n():
    policy = load_generator(tiny_tulu.model_path("sft"))
    prompt = policy.encode(tiny_tulu.render(tiny_tulu.held_out_prompts(1)[0]))
    search = best_of_n(prompt, n=6, max_tokens=6, sampling=Sampling(stop=("=",)))
    result = run(search, policy, CallableJudge(lambda texts: [float(t.finished) for t in texts]))
    ended = [policy.decode(each.tokens).endswith("=") for each in result.candidates]
    assert any(ended)
    assert [each.finished for each in result.candidates] == ended
    assert [each.score for each in result.candidates] == [float(each) for each in ended]


def test_what_cannot_be_continued_is_refused():
    with pytest.raises(ValueError, match="this generator has no tokenizer"):
        extend(generator(), [PROMPTS[0]], how=Sampling(stop=("x",)))
    with pytest.raises(ValueError, match="empty prefix"):
        extend(generator(), [[]])
    policy = models.tiny("llama", "lm", seed=1)
    policy.generation_config.eos_token_id, own = None, policy.generation_config.eos_token_id
    try:
        with pytest.raises(ValueError, match="names no end-of-sequence token: pass eos_token_ids"):
            load_generator(policy)
    finally:
        policy.generation_config.eos_token_id = own
