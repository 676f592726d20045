"""A real vLLM engine: guided requests equal brute force, all others the engine without the flag."""

from __future__ import annotations

import pytest
import torch

from guided_decode import GuidanceConfig, load_scorer
from tests import models, oracle
from tests.integrations.vllm import saving_requests, shown_values, v2_on_cpu, vllm_parts
from tests.integrations.vllm.first_tokens import assert_guided_distribution
from tests.integrations.vllm.mixed_requests import (
    ASKED,
    CONFIGS,
    NEW,
    PROMPTS,
    SAMPLING,
    assert_answers,
)
from tests.integrations.vllm.vllm_parts import params

from guided_decode.integrations.vllm.client_values.worker import EXTENSION  # isort: skip

# Engines take their time to load where other work shares the machine.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def roomy(plain_tokens):
    # Wide enough to prefill whole prompts: on a CPU vLLM cannot resume a seeded one.
    wide = {"async_scheduling": True, "max_num_batched_tokens": 20_000,
            "worker_extension_cls": EXTENSION}  # fmt: skip
    with vllm_parts.engine(vllm_parts.scorer_config(), **wide) as llm:
        yield llm


def test_a_mixed_batch(roomy, brute_force, plain_tokens):
    tokens = vllm_parts.generate(roomy, PROMPTS, SAMPLING)
    assert_answers(tokens, brute_force, plain_tokens)
    report = vllm_parts.worker_report(roomy)
    assert report["pinned"] == report["live"] == report["groups"] == 0
    assert report["passthroughs"] == report["unguided_rows"] == report["clamps"] == 0
    assert report["rows_gated"] > 0
    changed = sum(a != b for a, b in zip(tokens, plain_tokens, strict=True))
    assert changed >= 15, "the guided requests took the policy's own tokens"


def test_a_mixed_batch_again_from_the_prefix_cache(roomy, brute_force, plain_tokens):
    vllm_parts.generate(roomy, PROMPTS, SAMPLING)
    before = vllm_parts.worker_report(roomy)
    assert_answers(vllm_parts.generate(roomy, PROMPTS, SAMPLING), brute_force, plain_tokens)
    after = vllm_parts.worker_report(roomy)
    # The scorer had all of it, prompts, tokens and candidates.
    assert after["prefix_tokens"] - before["prefix_tokens"] == 0


def test_the_brute_force_loop_is_hugging_face_guided_generation(brute_force):
    from guided_decode.integrations.transformers import GuidedDecoding

    scorer = load_scorer(models.saved("llama", "token"), kind="verl-critic")
    for i, config in enumerate(ASKED):
        if config is None or SAMPLING[i].ignore_eos:
            continue
        out = vllm_parts.policy().generate(
            torch.tensor([PROMPTS[i]]),
            custom_generate=GuidedDecoding(scorer, config),
            max_new_tokens=NEW,
            do_sample=False,
        )
        tokens = out[0, len(PROMPTS[i]) :].tolist()
        oracle.assert_greedy_equal([tokens], [brute_force[i]])


@pytest.mark.parametrize("rule", ["reweight", pytest.param("prune", marks=pytest.mark.slow)])
def test_the_first_token_at_temperature_1_has_the_guided_distribution(roomy, rule):
    prune = GuidanceConfig(rule="prune", margin=1.0, top_k=8)
    prompt, config = {"reweight": (PROMPTS[1], CONFIGS[0]), "prune": (PROMPTS[19], prune)}[rule]
    assert_guided_distribution(roomy, models.tiny("llama", "token"), prompt, config)


def test_rows_end_and_gates_open_where_they_do_in_generate(roomy):
    """Abstention and value gates: on the engine, by brute force, in Hugging Face's generate."""
    from guided_decode.integrations.transformers import GuidedDecoding

    saving = saving_requests.made(models.tiny("llama", "token"))
    saving_requests.assert_engine(roomy, saving)
    scorer = load_scorer(models.saved("llama", "token"), kind="verl-critic")
    for i, (prompt, config) in enumerate(zip(saving.prompts, saving.asked, strict=True)):
        out = vllm_parts.policy().generate(
            torch.tensor([prompt]), custom_generate=GuidedDecoding(scorer, config), do_sample=False,
            max_new_tokens=saving_requests.NEW, eos_token_id=saving.ends,
            return_dict_in_generate=True,
        )  # fmt: skip
        tokens = out.sequences[0, len(prompt) :].tolist()
        oracle.assert_greedy_equal([tokens], [saving.expected[i]])
        at = -1 if config.abstain is None else int(out.abstained_at[0])
        assert at == (len(tokens) if saving.abstains(i) else -1)


def test_who_asked_is_shown_the_values_of_generate(roomy):
    scorer = load_scorer(models.saved("llama", "token"), kind="verl-critic")
    shown_values.assert_those_of_generate(roomy, scorer)


def test_samples_of_a_prompt_are_shown_their_own_values(roomy):
    shown_values.assert_those_of_brute_force(roomy, models.tiny("llama", "token"))


def test_one_seed_gives_one_answer(roomy):
    sampling = params(NEW, vllm_parts.asked(CONFIGS[0]), temperature=1.0, seed=5)
    first, second = (vllm_parts.generate(roomy, PROMPTS[:6], sampling) for _ in range(2))
    assert first == second
    other = params(NEW, vllm_parts.asked(CONFIGS[0]), temperature=1.0, seed=6)
    assert vllm_parts.generate(roomy, PROMPTS[:6], other) != first


# Steps that a sample may lag behind its siblings: they reach the scheduler one by one.
LATE = 2


def survivors(output, length):
    """The samples that nobody ended, by their index."""
    return {o.index: list(o.token_ids) for o in output.outputs if len(o.token_ids) == length}


def values_after(prompt, tokens):
    """V of the prompt with each beginning of the response."""
    values = oracle.Values(models.tiny("llama", "token"))
    return {n: values([[*prompt, *tokens[:n]]])[0] for n in range(len(tokens) + 1)}


def test_siblings_in_lockstep(roomy):
    prompt, other, size, keep, every = PROMPTS[2], PROMPTS[4], 8, 2, 5
    extra = {"guide_group": "group-of-the-test", "guide_group_size": size, "guide_keep": keep,
             "guide_every": every}  # fmt: skip
    alone = params(20, None, temperature=1.0, n=size, seed=3, ignore_eos=True)
    request = [{"prompt_token_ids": p} for p in (prompt, prompt, other)]
    whole, *_ = roomy.generate(request[:1], alone, use_tqdm=False)
    samples = [list(o.token_ids) for o in sorted(whole.outputs, key=lambda o: o.index)]
    written = {token for tokens in samples for token in tokens}
    stop = next(token for token in range(models.VOCAB - 1, 0, -1) if token not in written)
    pruned = params(20, extra, temperature=1.0, n=size, seed=3, ignore_eos=True,
                    stop_token_ids=[stop])  # fmt: skip
    another = params(20, {**extra, "guide_group": "another-group"}, temperature=1.0, n=1, seed=4,
                     ignore_eos=True, stop_token_ids=[stop])  # fmt: skip
    (lonely,) = roomy.generate(request[2:], pruned, use_tqdm=False)
    before = vllm_parts.worker_report(roomy)
    # The scheduler, in another process, is kept busy until all samples have reached it.
    busy = [{"prompt_token_ids": p} for p in models.prompts([450] * 28, seed=99)]
    *_, group, single, elsewhere = roomy.generate(
        [*busy, *request], [*[params(1)] * len(busy), pruned, another, pruned], use_tqdm=False
    )
    after = vllm_parts.worker_report(roomy)

    # Brute force: who is left at each boundary, from the samples that nobody pruned.
    values = [values_after(prompt, tokens) for tokens in samples]
    live, ended = list(range(size)), {}
    for boundary in range(every, 20, every):
        live.sort(key=lambda i: (-values[i][boundary], i))
        ended |= dict.fromkeys(live[keep:], boundary)
        live = live[:keep]
    for output in group.outputs:
        tokens = list(output.token_ids)
        if output.index in ended:
            late = len(tokens) - 1 - ended[output.index]
            assert 0 <= late <= LATE
            assert tokens == [*samples[output.index][: len(tokens) - 1], stop]
            assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        else:
            assert tokens == samples[output.index]
            assert output.finish_reason == "length"
    spent = sum(len(o.token_ids) for o in group.outputs)
    assert 0 <= spent - (keep * 20 + 6 * (every + 1)) <= 6 * LATE
    # Another group of the prompt, and the group's name on another prompt, are others.
    assert len(single.outputs[0].token_ids) == 20
    assert survivors(elsewhere, 20) == survivors(lonely, 20)
    assert survivors(group, 20) == {i: tokens for i, tokens in enumerate(samples) if i in live}
    assert after["pruned_siblings"] - before["pruned_siblings"] >= len(ended)
    assert after["groups"] == 0


def test_what_combines(roomy):
    """Guidance acts on what logit bias leaves, and never revives what is masked."""
    prompt = PROMPTS[5]
    first = vllm_parts.generate(roomy, [prompt], params(1, {"guide": 1}))[0][0]
    biased = params(4, {"guide": 1}, logit_bias={first: -100.0})
    assert first != vllm_parts.generate(roomy, [prompt], biased)[0][0]
    allowed = params(8, {"guide": 1}, allowed_token_ids=[10, 11, 12])
    assert set(vllm_parts.generate(roomy, [prompt], allowed)[0]) <= {10, 11, 12}
    longer = params(12, {"guide": 1}, min_tokens=12, stop_token_ids=[first])
    tokens = vllm_parts.generate(roomy, [prompt], longer)[0]
    assert len(tokens) == 12
    assert first not in tokens[:11]


def test_the_engine_truncates_what_guidance_hands_on(roomy, monkeypatch):
    """top_k, top_p and min_p keep the likeliest of the guided distribution, not of the policy's."""
    if v2_on_cpu.IS_CHOSEN:
        # The interpreter cannot run vLLM's kernel, whose `tl.range` gives it plain numbers: its own
        # torch operations take the place.
        monkeypatch.setattr("vllm.v1.sample.ops.topk_topp_sampler.HAS_TRITON", False)
    prompt, config = PROMPTS[1], GuidanceConfig(beta=8.0, top_k=12)
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    logits = oracle.LogProbs(vllm_parts.policy()).logits(prompt)
    guided = torch.tensor(brute.row(prompt, logits, config, [models.EOS]).logits).softmax(-1)
    ordered = guided.argsort(descending=True).tolist()
    assert set(ordered[:2]) != set(logits.topk(2).indices.tolist())
    # Between the masses of the first two, and between the second and the third.
    top_p = float(guided[ordered[0]] + guided[ordered[1]] / 2)
    min_p = float(guided[ordered[1]] + guided[ordered[2]]) / 2 / float(guided[ordered[0]])
    for own in ({"top_k": 2}, {"top_p": top_p}, {"min_p": min_p}):
        sampling = params(1, vllm_parts.asked(config), temperature=1.0, seed=1, n=100, **own)
        (output,) = roomy.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        assert {sample.token_ids[0] for sample in output.outputs} == set(ordered[:2]), own


def test_each_of_several_stop_ids_is_a_terminal(roomy):
    prompt, config = PROMPTS[1], CONFIGS[0]
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    lm = oracle.LogProbs(vllm_parts.policy())
    free, _ = brute.greedy(lm, prompt, config, [], NEW)
    stops = [free[NEW // 2], free[NEW // 3], models.EOS]
    expected = brute.greedy(lm, prompt, config, stops, NEW)
    sampling = params(NEW, vllm_parts.asked(config), stop_token_ids=stops[:2])
    (output,) = roomy.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    tokens = list(output.outputs[0].token_ids)
    oracle.assert_greedy_equal([tokens], [expected])
    assert len(tokens) < NEW
    assert output.outputs[0].finish_reason == "stop"


@pytest.mark.slow  # vLLM compiles what ranks the log-probabilities
def test_log_probabilities_are_those_of_the_policy(roomy):
    prompt = PROMPTS[5]
    first = vllm_parts.generate(roomy, [prompt], params(1, {"guide": 1}))[0][0]
    shown = params(2, {"guide": 1}, logprobs=3)
    (output,) = roomy.generate([{"prompt_token_ids": prompt}], shown, use_tqdm=False)
    assert output.outputs[0].token_ids[0] == first
    assert len(output.outputs[0].logprobs) == 2
    policy = oracle.LogProbs(vllm_parts.policy())(prompt)
    for token, each in output.outputs[0].logprobs[0].items():
        assert each.logprob == pytest.approx(policy[token], abs=1e-4)


def test_penalties_act_where_the_runner_has_them(roomy):
    """V1 penalises what guidance hands on, V2 the logits of which the candidates are chosen."""
    prompt, config, penalty = PROMPTS[1], CONFIGS[0], 2.0
    brute = oracle.Oracle(oracle.Values(models.tiny("llama", "token")))
    lm = oracle.LogProbs(vllm_parts.policy())
    sequence, gaps = list(prompt), []
    for _ in range(12):
        logits, written = lm.logits(sequence), sorted(set(sequence[len(prompt) :]))
        if v2_on_cpu.IS_CHOSEN:
            logits[written] -= penalty
        row = torch.tensor(brute.row(sequence, logits, config).logits)
        if not v2_on_cpu.IS_CHOSEN:
            row[written] -= penalty
        top = row.topk(2)
        gaps.append(float(top.values[0] - top.values[1]))
        sequence.append(int(top.indices[0]))
    sampling = params(12, vllm_parts.asked(config), presence_penalty=penalty, ignore_eos=True)
    tokens = vllm_parts.generate(roomy, [prompt], sampling)
    oracle.assert_greedy_equal(tokens, [(sequence[len(prompt) :], gaps)])
    free = params(12, vllm_parts.asked(config), ignore_eos=True)
    assert vllm_parts.generate(roomy, [prompt], free) != tokens
