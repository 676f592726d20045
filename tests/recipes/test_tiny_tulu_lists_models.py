"""The released models of the lists: format, size, how they judge, and what guidance by each buys.

beta was chosen on the validation prompts (recipes/tiny_tulu_lists/results.json); here are held-out
ones.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from guided_decode import load_scorer, tiny_tulu
from guided_decode.checkpoints.registry import find
from guided_decode.tiny_tulu import lists
from recipes.tiny_tulu.metrics import paired_bootstrap
from recipes.tiny_tulu_lists import measure
from recipes.tiny_tulu_lists.judge import RewardJudge
from recipes.tiny_tulu_lists.measure import Family, config_of
from recipes.tiny_tulu_lists.samples import exact

ROOT = lists.model_path("sft").parent
RESULTS = json.loads((Path(measure.__file__).parent / "results.json").read_text())
NAMES = {"sft": "tiny-tulu-lists-sft", "reward": "tiny-tulu-reward", "dpo": "tiny-tulu-dpo",
         "kto": "tiny-tulu-kto"}  # fmt: skip
PROMPTS = lists.held_out_prompts(80)


@functools.cache
def family() -> Family:
    return Family(ROOT)


@functools.cache
def plain() -> list[float]:
    return family().rewards(family().policy("sft"), PROMPTS)


@pytest.mark.parametrize("name", lists.MODELS)
def test_layout_is_a_tulu_checkpoints(name):
    config = AutoConfig.from_pretrained(lists.model_path(name))
    kind = "SequenceClassification" if name == "reward" else "CausalLM"
    assert config.architectures == [f"LlamaFor{kind}"]
    assert (config.bos_token_id, config.eos_token_id, config.vocab_size) == (1, 2, 287)
    tokenizer = AutoTokenizer.from_pretrained(lists.model_path(name))
    first = AutoTokenizer.from_pretrained(tiny_tulu.model_path("sft"))
    assert tokenizer.get_vocab() == first.get_vocab()
    assert tokenizer.chat_template == first.chat_template
    record = find(NAMES[name])
    assert record is not None
    assert record.location == str(lists.model_path(name))
    assert record.policy == (None if name == "sft" else "tiny-tulu-lists-sft")
    weights = lists.model_path(name) / "model.safetensors"
    # The file has its names, shapes and places beside the weights.
    assert record.weight_bytes < weights.stat().st_size < record.weight_bytes + 10_000


def test_both_tasks_together_are_at_most_10_megabytes():
    files = [
        file for root in (tiny_tulu.model_path("sft").parent, ROOT) for file in root.rglob("*")
    ]
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 10_000_000


def test_the_names_load_as_what_they_are():
    tokenizer = family().tokenizer
    reward = load_scorer("tiny-tulu-reward", "auto", policy_tokenizer=tokenizer)
    assert find("tiny-tulu-reward").kind == "reward-model"
    assert (reward.terminal, reward.eos_token_id) == ("critic", tokenizer.eos_token_id)
    # By its folder, too: what the recipe wrote there says it.
    assert load_scorer(lists.model_path("reward"), policy_tokenizer=tokenizer).terminal == "critic"
    for name in ("tiny-tulu-dpo", "tiny-tulu-kto"):
        # Against the registered reference.
        assert (find(name).kind, find(name).reference) == ("implicit", "tiny-tulu-lists-sft")
        assert load_scorer(name, policy_tokenizer=tokenizer).terminal == "included"


def test_the_reward_model_scores_as_transformers_own_forward_does():
    tokenizer = family().tokenizer
    model = AutoModelForSequenceClassification.from_pretrained(
        lists.model_path("reward"), dtype=torch.float32
    )
    pairs = lists.held_out_pairs()[:5]
    for pair, scores in zip(pairs, family().pair_scores("reward", pairs), strict=True):
        for text, score in zip((pair.chosen, pair.rejected), scores, strict=True):
            messages = [{"role": "user", "content": pair.prompt},
                        {"role": "assistant", "content": text}]  # fmt: skip
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt").input_ids
            assert ids[0, -1] == tokenizer.eos_token_id
            with torch.no_grad():
                assert model(ids).logits.item() == pytest.approx(score, abs=1e-4)
    judge = RewardJudge(model, tokenizer)
    own = judge([p.prompt for p in pairs], [p.chosen for p in pairs])
    expected = [chosen for chosen, _ in family().pair_scores("reward", pairs)]
    assert own == pytest.approx(expected, abs=1e-4)


def test_held_out_pairs_are_those_of_held_out_prompts_and_ordered_by_the_reward():
    pairs = lists.held_out_pairs()
    assert len(pairs) >= 800
    assert {pair.prompt for pair in pairs} <= set(lists.held_out_prompts())
    assert len({pair.prompt for pair in pairs}) == len(pairs)
    for pair in pairs:
        chosen, rejected = exact([pair.prompt] * 2, [pair.chosen, pair.rejected])
        assert chosen - rejected == pytest.approx(pair.margin, abs=1e-3)
        assert pair.margin > 0


@pytest.mark.parametrize(("name", "least"), [("reward", 0.9), ("dpo", 0.85), ("kto", 0.65)])
def test_scorers_order_held_out_pairs(name, least):
    scores = family().pair_scores(name, lists.held_out_pairs()[:120])
    right = sum(chosen > rejected for chosen, rejected in scores)
    assert right >= least * len(scores)


@pytest.mark.parametrize("name", ["reward", "dpo", "kto"])
def test_guidance_by_each_raises_the_exact_reward_of_held_out_prompts(name):
    beta = RESULTS[f"by_{name}"]["beta"]
    policy, scorer = family().policy("sft"), family().scorer(name)
    guided = family().rewards(policy, PROMPTS, scorer, config_of(name, beta))
    gain, low, high = paired_bootstrap(guided, plain())
    assert low > 0.2, f"gain {gain:.3f}, 95% interval {low:.3f} to {high:.3f}"


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_tuned_policies_do_better_than_the_one_that_they_started_from(name):
    tuned = family().rewards(family().policy(name), PROMPTS)
    gain, low, high = paired_bootstrap(tuned, plain())
    assert low > 0.2, f"gain {gain:.3f}, 95% interval {low:.3f} to {high:.3f}"
