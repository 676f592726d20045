"""What an engine must not be, and what is loaded for one that may."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from guided_decode.checkpoints.quantised_layers import is_plain
from guided_decode.forward.weights import WeightWatch
from tests import PATIENCE, models
from tests.checkpoints.quantised_models import needs
from tests.integrations.vllm import vllm_parts
from tests.integrations.vllm.vllm_steps import CPU, built, engine

from guided_decode.integrations.vllm import warm_up  # isort: skip
from guided_decode.integrations.vllm.build import build_engine, refuse_unsupported  # isort: skip
from guided_decode.integrations.vllm.speculation import refuse_speculation  # isort: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: setattr(c, "speculative_config", object()), "speculative decoding is on"),
        (lambda c: setattr(c.model_config, "enable_prompt_embeds", True), "--enable-prompt-embeds"),
        (
            lambda c: setattr(c, "model_config", SimpleNamespace(is_diffusion=True)),
            "this policy is a diffusion model",
        ),
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


def test_a_policy_that_takes_images_is_refused(monkeypatch):
    config = vllm_parts.vllm_config(vllm_parts.scorer_config())
    takes = property(lambda model: True)
    monkeypatch.setattr(type(config.model_config), "supports_multimodal_inputs", takes, False)
    with pytest.raises(ValueError, match=r"takes images, sound or video.*--language-model-only"):
        refuse_unsupported(config)


def drafting(max_num_seqs: int = 32, vocab: int = models.VOCAB, **own):
    given = {"num_speculative_tokens": 3, "rejection_sample_method": "standard",
             "method": "ngram"}  # fmt: skip
    return SimpleNamespace(
        speculative_config=SimpleNamespace(**given | own),
        model_config=SimpleNamespace(get_vocab_size=lambda: vocab),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=8192),
    )


def test_speculation_that_is_refused_on_model_runner_v2():
    refuse_speculation(drafting(), is_v1=False, by_trunk=False)
    with pytest.raises(ValueError, match="this engine runs on vLLM's V1 runner, which refuses"):
        refuse_speculation(drafting(), is_v1=True, by_trunk=False)
    coins = drafting(rejection_sample_method="synthetic")
    with pytest.raises(ValueError, match="synthetic accepts drafts whatever their logits are"):
        refuse_speculation(coins, is_v1=False, by_trunk=False)
    refuse_speculation(drafting(), is_v1=False, by_trunk=True)
    with pytest.raises(ValueError, match="kind=trunk-head came with drafts by eagle3, whose model"):
        refuse_speculation(drafting(method="eagle3"), is_v1=False, by_trunk=True)


def test_a_trunk_head_is_refused_where_vllm_may_verify_in_parts():
    """Llama 3's vocabulary: a GiB of float32 logits has 2092 rows."""
    refuse_speculation(drafting(523, 128256), is_v1=False, by_trunk=True)
    refuse_speculation(drafting(1024, 128256), is_v1=False, by_trunk=False)
    with pytest.raises(
        ValueError, match=r"524 and 3 drafts each: a step has up to 2096 rows"
    ) as at:
        refuse_speculation(drafting(524, 128256), is_v1=False, by_trunk=True)
    assert "verifies more than 2092 in parts" in str(at.value)
    assert "--max-num-seqs 523, or with fewer drafts" in str(at.value)
    with pytest.raises(ValueError, match="up to 8192 rows, and with a vocabulary of 128256"):
        refuse_speculation(drafting(4096, 128256), is_v1=False, by_trunk=True)


def test_a_scorer_that_does_not_fit_is_refused_with_what_can_be_done():
    with pytest.raises(ValueError, match=r"does not fit on cpu.*bfloat16.*cache_tokens"):
        built(cache_tokens=1 << 42)


def test_the_whole_vocabulary_is_refused_for_a_critic_at_start():
    with pytest.raises(ValueError, match="top_k=null was given with CriticScorer"):
        built(top_k=None)


@needs("torchao")
def test_a_scorers_weights_are_quantised_and_placed_as_the_server_says():
    own = vllm_parts.scorer_config(quantization="int8", device_map={"": "cpu"})
    scorer = build_engine(vllm_parts.vllm_config(own), CPU).scorer
    assert not is_plain(scorer.model.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(ValueError, match="device='cpu' and device_map were both given: expected"):
        built(device="cpu", device_map="auto")


def test_the_cache_is_as_large_as_the_batch_needs():
    config = vllm_parts.vllm_config(vllm_parts.scorer_config(), max_num_seqs=4, max_model_len=100)
    assert build_engine(config, CPU).scorer.cache.capacity == 4 * (100 + 64)


def test_nobody_looks_again_at_weights_that_the_worker_alone_holds(monkeypatch):
    scorer = built().scorer
    monkeypatch.setattr(WeightWatch, "changed", lambda watch: pytest.fail("it looked"))
    assert not scorer.model.changed()


@pytest.mark.parametrize(
    "own", [{}, {"beta": 0.0}, {"rule": "prune", "margin": 0.1}, {"gate": 0.5}]
)
def test_what_is_run_before_the_first_request_leaves_nothing_behind(own):
    made = built(**own)
    warm_up.forward(made.scorer, 64, 40)
    warm_up.steps(made.scorer, made.config, models.VOCAB, CPU)
    assert made.scorer.stats.forwards == made.scorer.stats.rows_scored == 0
    made.scorer.cache.check()


def test_the_scorer_may_be_an_adapter():
    adapters = pytest.importorskip("tests.adapters", reason="peft is not installed")
    model = adapters.adapted("TOKEN_CLS")
    path = adapters.saved(model)
    for own in ({"scorer": path}, {"scorer": models.saved("llama", "lm"), "adapter": path}):
        config = vllm_parts.vllm_config(vllm_parts.scorer_config())
        config.additional_config["guided_decode"] |= own
        adapters.check(build_engine(config, CPU).scorer, adapters.values(model), steps=1)


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
        "assert 'guided_decode.checkpoints.loading' not in new;"
        "assert 'guided_decode.scoring.critic' not in new;"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


def test_raising_needs_a_limit_of_beta():
    with pytest.raises(ValueError, match='on_error="raise" was given without max_beta'):
        engine(None, on_error="raise")


def test_nobody_asks_for_more_candidates_than_there_are_tokens():
    assert built(max_top_k=10_000).config.max_top_k == models.VOCAB
    with pytest.raises(ValueError, match="top_k=102 is larger than the policy's vocabulary of 101"):
        built(top_k=102, max_top_k=200)


@pytest.mark.parametrize(
    ("own", "is_said"),
    [([vllm_parts.FLAG, "mine:Whitelist"], True), (["mine:Whitelist", vllm_parts.FLAG], False)],
)
def test_a_processor_that_comes_after_guidance_is_said_at_start(own, is_said, caplog):
    config = vllm_parts.vllm_config(vllm_parts.scorer_config(), logits_processors=own)
    build_engine(config, CPU)
    assert ("mine:Whitelist comes after guidance" in caplog.text) == is_said
