"""What of vLLM combines with guidance, where it takes a tokenizer or an engine of its own.

docs/vllm.md names the tests of each row of its table.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from guided_decode import tiny_tulu
from tests import oracle
from tests.integrations.vllm import v2_on_cpu, vllm_parts
from tests.integrations.vllm.vllm_parts import params

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

GUIDE = {"guide": 1}
BETA, TOP_K = 10.0, 4
PROMPT = tiny_tulu.render(tiny_tulu.validation_prompts(1)[0])
WHITELIST = f"tests.integrations.vllm.whitelist_v{2 if v2_on_cpu.IS_CHOSEN else 1}:Whitelist"


@pytest.fixture(scope="module")
def llm():
    """tiny-tulu with its tokenizer, a user's processor, and the guided log-probabilities."""
    config = {"guided_decode": {"scorer": str(tiny_tulu.model_path("value")), "dtype": "float32",
                                "beta": BETA, "top_k": TOP_K, "log_every": 0}}  # fmt: skip
    with vllm_parts.engine(
        config,
        model=str(tiny_tulu.model_path("sft")),
        skip_tokenizer_init=False,
        max_model_len=256,
        logprobs_mode="processed_logprobs",
        logits_processors=[WHITELIST, vllm_parts.FLAG],
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_tulu.model_path("sft"))


def answer(llm, new, extra=None, **own):
    sampling = params(new, GUIDE if extra is None else extra, detokenize=True, **own)
    (output,) = llm.generate([PROMPT], sampling, use_tqdm=False)
    return output.outputs[0]


def test_a_grammar_acts_before_guidance(llm):
    from vllm.sampling_params import StructuredOutputsParams

    free = answer(llm, 24)
    assert not re.fullmatch(r"[A-Za-z]+", free.text)
    only = StructuredOutputsParams(regex="[A-Za-z]{12}")
    assert re.fullmatch(r"[A-Za-z]{12}", answer(llm, 24, structured_outputs=only).text)


def test_bad_words_are_no_candidates(llm, tokenizer):
    first = answer(llm, 1).token_ids[0]
    word = tokenizer.decode([first])
    assert answer(llm, 1, bad_words=[word]).token_ids[0] != first
    assert first not in answer(llm, 16, bad_words=[word]).token_ids


def test_a_stop_string_ends_a_guided_response_and_changes_none_of_its_tokens(llm):
    free = answer(llm, 24)
    stop = free.text[10:13]
    cut = answer(llm, 24, stop=[stop])
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert list(cut.token_ids) == list(free.token_ids)[: len(cut.token_ids)]
    assert len(cut.token_ids) < len(free.token_ids)


def test_the_pieces_of_a_guided_response_are_the_whole(llm):
    from vllm.sampling_params import RequestOutputKind

    whole = answer(llm, 24)
    engine, text, tokens, pieces = llm.llm_engine, "", [], 0
    deltas = params(24, GUIDE, detokenize=True, output_kind=RequestOutputKind.DELTA)
    engine.add_request("in-pieces", PROMPT, deltas)
    while engine.has_unfinished_requests():
        for output in engine.step():
            text += output.outputs[0].text
            tokens += output.outputs[0].token_ids
            pieces += 1
    assert (text, tokens) == (whole.text, list(whole.token_ids))
    assert pieces > 10


def test_what_a_users_processor_forbids_before_is_never_a_candidate(llm):
    allowed = answer(llm, 6, {**GUIDE, "only": "40,41,42"}, ignore_eos=True)
    assert set(allowed.token_ids) <= {40, 41, 42}


def test_processed_log_probabilities_are_those_of_the_guided_distribution(llm, tokenizer):
    # As the engine reads a text.
    prompt = tokenizer(PROMPT).input_ids
    policy = AutoModelForCausalLM.from_pretrained(tiny_tulu.model_path("sft"))
    from guided_decode import GuidanceConfig, guide, load_scorer

    logits = oracle.LogProbs(policy).logits(prompt)[None]
    chosen = logits.topk(TOP_K).indices
    scores = load_scorer("tiny-tulu-value").score([prompt], chosen)
    config = GuidanceConfig(beta=BETA, top_k=TOP_K)
    guided = guide(logits, chosen, scores, config, exempt=chosen == tokenizer.eos_token_id)
    expected = torch.log_softmax(guided.float(), -1)[0]
    (shown,) = answer(llm, 1, logprobs=TOP_K).logprobs
    for token in chosen[0].tolist():
        assert shown[token].logprob == pytest.approx(expected[token].item(), abs=1e-3)
    assert math.isclose(sum(math.exp(each.logprob) for each in shown.values()), 1, abs_tol=1e-3)


def test_pooling_models_take_no_processor(llm):
    """vLLM's own refusal, on either runner."""
    from vllm.v1.sample.logits_processor import build_logitsprocs
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors

    config = llm.llm_engine.vllm_config
    own = [vllm_parts.FLAG]
    with pytest.raises(ValueError, match="(?i)pooling models"):
        build_logitsprocs(config, torch.device("cpu"), False, True, own)
    with pytest.raises(ValueError, match="(?i)pooling models"):
        build_custom_logits_processors(config, None, True, own)
