"""The recipe: what it reads, that it learns, and the file that it leaves."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from guided_decode import GuidanceConfig, load_scorer, tiny_tulu
from guided_decode.checkpoints.checkpoint import load_checkpoint
from guided_decode.integrations.transformers import TrunkLookahead
from recipes.trunk_head import (
    Readings,
    Rollout,
    TrunkHeadConfig,
    critic_targets,
    load_rollouts,
    read_rollouts,
    reward_targets,
    train_head,
)
from recipes.trunk_head.__main__ import main

ROLLOUTS = [
    Rollout([5, 6, 7], [8, 9, 2], 1.0),
    Rollout([10, 11], [12, 2], 0.0),
    Rollout([20, 21, 22, 23, 24], [25, 26, 27, 28, 2], 1.0),
]


@pytest.fixture(scope="module")
def policy():
    return AutoModelForCausalLM.from_pretrained(tiny_tulu.model_path("ppo"))


def test_features_are_those_of_the_token_before_each_generated_one(policy):
    readings = read_rollouts(policy, ROLLOUTS, batch_size=2)
    assert readings.rollout.tolist() == [0] * 3 + [1] * 2 + [2] * 5
    at = 0
    for row in ROLLOUTS:
        ids = torch.tensor([row.prompt + row.response])
        hidden = policy.base_model(ids).last_hidden_state[0]
        wanted = hidden[len(row.prompt) - 1 : -1]
        found = readings.features[at : at + len(row.response)]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        at += len(row.response)


def test_a_critics_targets_are_its_values_of_the_same_prefixes():
    critic = load_checkpoint(tiny_tulu.model_path("value"))
    scorer = load_scorer(tiny_tulu.model_path("value"))
    rollouts = [*ROLLOUTS, Rollout([1, 5, 6], [7, 2])]  # the critic drops a leading BOS
    prefixes = [
        (row.prompt + row.response)[: len(row.prompt) + n]
        for row in rollouts
        for n in range(len(row.response))
    ]
    wanted = scorer.score(prefixes, torch.full((len(prefixes), 1), 3)).baseline
    found = critic_targets(critic, rollouts, batch_size=3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_a_reward_is_the_target_of_all_its_prefixes():
    assert reward_targets(ROLLOUTS[:2]).tolist() == [1.0] * 3 + [0.0] * 2
    with pytest.raises(ValueError, match="1 of 4 rollouts have no reward"):
        reward_targets([*ROLLOUTS, Rollout([1], [2])])


@pytest.mark.parametrize("width", [0, 16])
def test_a_head_learns_what_its_features_say(width):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4000, 12, generator=generator)
    targets = features[:, 0] - 0.5 * features[:, 3] + 2.0
    readings = Readings(features, torch.arange(4000) // 10)
    log = []
    config = TrunkHeadConfig(width=width, epochs=30, batch_size=256, lr=1e-2)
    head = train_head(readings, targets, config, log.append)
    assert log[-1]["explained"] > 0.98
    assert (head.inner is not None) == (width > 0)
    torch.testing.assert_close(head(features[:50]), targets[:50], rtol=0, atol=0.3)
    again = train_head(readings, targets, config)
    assert torch.equal(again.weight, head.weight)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs must be positive"),
        ({"width": -1}, "width must not be negative"),
        ({"validation": 1.0}, "validation must lie between 0 and 1"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        TrunkHeadConfig(**setting)


def test_rollouts_of_a_file(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tulu.model_path("ppo"))
    path = tmp_path / "rollouts.jsonl"
    prompt = tiny_tulu.render("Add 1204 and 3311.")
    answer = tiny_tulu.worked_answer(1204, 3311)
    path.write_text(
        json.dumps({"prompt": prompt, "response": answer, "reward": 1})
        + "\n"
        + json.dumps({"prompt": [5, 6], "response": [7, 8]})
    )
    text, ids = load_rollouts(path, tokenizer)
    assert tokenizer.decode(text.prompt) == prompt
    assert tokenizer.decode(text.response) == answer + tokenizer.eos_token
    assert ids == Rollout([5, 6], [7, 8], None)
    path.write_text('{"prompt": "x"}')
    with pytest.raises(ValueError, match=r"rollouts.jsonl:1: expected .* got '\{\"prompt"):
        load_rollouts(path, tokenizer)


@pytest.mark.parametrize("critic", [True, False], ids=["critic", "rewards"])
def test_the_command_leaves_a_head_that_loads(tmp_path, monkeypatch, critic):
    path = tmp_path / "rollouts.jsonl"
    lines = []
    for n, message in enumerate(tiny_tulu.training_prompts(20, seed=1)):
        answer = tiny_tulu.worked_answer(*tiny_tulu.operands(message))
        row = {"prompt": tiny_tulu.render(message), "response": answer, "reward": n % 2}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines))
    options = ["--policy", str(tiny_tulu.model_path("ppo")), "--rollouts", str(path)]
    options += ["--out", str(tmp_path), "--epochs", "2", "--device", "cpu"]
    options += ["--critic", str(tiny_tulu.model_path("value"))] if critic else []
    monkeypatch.setattr(sys, "argv", ["recipes.trunk_head", *options])
    main()
    scorer = load_scorer(tiny_tulu.model_path("ppo"), head=tmp_path)
    assert scorer.trunk_head.inner is not None
    assert scorer.trunk_head.trunk.fingerprint is not None
    with pytest.raises(ValueError, match="whose weights are not those of the policy"):
        load_scorer(tiny_tulu.model_path("sft"), head=tmp_path)


def test_the_command_needs_a_policy_or_tiny_tulu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipes.trunk_head", "--out", "x"])
    with pytest.raises(SystemExit):
        main()
    assert "pass --policy and --rollouts, or --tiny-tulu" in capsys.readouterr().err


def test_the_released_head_guides_its_own_policy():
    policy = AutoModelForCausalLM.from_pretrained(tiny_tulu.model_path("sft"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_tulu.model_path("sft"))
    scorer = load_scorer(policy, head=tiny_tulu.trunk_head_path("sft"))
    messages = tiny_tulu.held_out_prompts(40)
    chats = [tiny_tulu.render(message) for message in messages]
    inputs = tokenizer(
        chats, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    right = []
    for beta in (0.0, 5.0):
        loop = TrunkLookahead(scorer, GuidanceConfig(beta=beta, top_k=4))
        output = policy.generate(
            inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=80,
            do_sample=False,
            custom_generate=loop,
        )
        answers = output[:, inputs.input_ids.shape[1] :]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        right.append(sum(map(tiny_tulu.is_correct, messages, texts)))
    plain, guided = right
    assert plain <= 20
    assert guided >= 37
