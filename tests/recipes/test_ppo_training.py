"""Rollouts, what is read from them, and short runs on fresh random models."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from recipes.ppo import PPOConfig, PPOTrainer, new_value_model
from recipes.ppo.checkpoint import load_checkpoint, save_checkpoint, save_models
from recipes.ppo.readings import in_batches, token_logps, token_values
from recipes.ppo.rewards import RewardModel
from recipes.ppo.rollout import Rollout, assemble, pad_left, sample
from recipes.ppo.trainer import learning_rate_factor

EOS, PAD, VOCAB = 2, 0, 17
PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
CONFIG = PPOConfig(
    steps=2,
    warmup_steps=1,
    rollouts_per_step=8,
    minibatch_size=4,
    epochs=2,
    max_new_tokens=6,
    temperature=1.0,
    policy_lr=1e-3,
    value_lr=1e-3,
)


def tiny_config(**changes: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **changes,
    )


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


@pytest.fixture
def policy() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(tiny_config()).eval()


@pytest.fixture
def rollout() -> Rollout:
    responses = torch.tensor([[4, 5, EOS, 7], [EOS, 3, 3, 3], [4, 4, 4, 4], [6, EOS, EOS, 5]])
    return assemble(*pad_left(PROMPTS, PAD), responses, EOS, PAD)


def evens(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> torch.Tensor:
    """Share of even tokens in a response: something that a random model can learn."""
    return torch.tensor([sum(t % 2 == 0 for t in r) / len(r) for r in responses])


def trainer(policy: LlamaForCausalLM, config: PPOConfig = CONFIG) -> PPOTrainer:
    learner = copy.deepcopy(policy)
    return PPOTrainer(
        learner, policy, new_value_model(policy), evens, config, eos_id=EOS, pad_id=PAD
    )


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_response_ends_at_its_first_eos(rollout: Rollout) -> None:
    assert [rollout.response_ids(row) for row in range(4)] == [
        [4, 5, EOS],
        [EOS],
        [4, 4, 4, 4],
        [6, EOS],
    ]
    assert [rollout.prompt_ids(row) for row in range(4)] == PROMPTS
    assert rollout.finished.tolist() == [True, True, False, True]
    assert rollout.positions[1].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_logps_and_values_are_read_at_the_token_before(
    policy: LlamaForCausalLM, rollout: Rollout
) -> None:
    value_model = new_value_model(policy)
    torch.nn.init.normal_(value_model.score.weight)
    logps = in_batches(token_logps, policy, rollout, size=3)
    values = in_batches(token_values, value_model, rollout, size=3)
    for row in range(4):
        response = rollout.response_ids(row)
        for t, token in enumerate(response):
            before = torch.tensor([PROMPTS[row] + response[:t]])  # unpadded, one at a time
            with torch.no_grad():
                logp = policy(before).logits[0, -1].log_softmax(-1)[token]
                value = value_model(before).logits[0, -1, 0]
            assert logps[row, t] == pytest.approx(float(logp), abs=1e-5)
            assert values[row, t] == pytest.approx(float(value), abs=1e-5)


def test_sampling_pads_and_is_reproducible(policy: LlamaForCausalLM) -> None:
    def draw() -> Rollout:
        torch.manual_seed(5)
        return sample(
            policy,
            PROMPTS,
            max_new_tokens=5,
            temperature=0.7,
            eos_id=EOS,
            pad_id=PAD,
            batch_size=3,
        )

    first, second = draw(), draw()
    assert torch.equal(first.tokens, second.tokens)
    assert [first.prompt_ids(row) for row in range(4)] == PROMPTS
    assert first.response_mask.shape[1] <= 5


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        pad_left([[3], []], PAD)


def test_value_model_takes_trunk_and_head_and_keeps_its_bias_at_zero(
    policy: LlamaForCausalLM,
) -> None:
    reward_model = LlamaForSequenceClassification(tiny_config(num_labels=1))
    for source in (policy, reward_model):
        value_model = new_value_model(source)
        assert type(value_model).__name__ == "LlamaForTokenClassification"
        assert value_model.config.num_labels == 1
        assert torch.equal(weights(value_model.model), weights(source.model))
        assert value_model.score.bias.item() == 0.0
        assert not value_model.score.bias.requires_grad
    assert torch.equal(value_model.score.weight, reward_model.score.weight)
    assert policy.config.architectures != ["LlamaForTokenClassification"]
    with pytest.raises(ValueError, match="one label, this one has 3"):
        new_value_model(LlamaForSequenceClassification(tiny_config(num_labels=3)))


def test_reward_model_is_read_at_the_last_token() -> None:
    torch.manual_seed(4)
    model = LlamaForSequenceClassification(tiny_config(num_labels=1)).eval()
    responses = [[4, EOS], [5, 6, 7, EOS], [EOS], [3, 3]]
    scores = RewardModel(model, pad_id=PAD, bos_id=1, batch_size=3)(PROMPTS, responses)
    for score, prompt, response in zip(scores, PROMPTS, responses, strict=True):
        with torch.no_grad():
            hidden = model.model(torch.tensor([[1, *prompt, *response]])).last_hidden_state
            expected = model.score(hidden[0, -1])
        assert float(score) == pytest.approx(expected.item(), abs=1e-5)


def test_while_warming_up_only_the_value_model_learns(policy: LlamaForCausalLM) -> None:
    run = trainer(policy)
    before = weights(run.policy), weights(run.value_model)
    torch.manual_seed(0)
    stats = run.train_step(PROMPTS * 2)
    assert stats["warming"] == 1.0
    assert torch.equal(before[0], weights(run.policy))
    assert not torch.equal(before[1], weights(run.value_model))
    stats = run.train_step(PROMPTS * 2)
    assert stats["warming"] == 0.0
    assert not torch.equal(before[0], weights(run.policy))
    assert run.value_model.score.bias.item() == 0.0
    assert torch.equal(before[0], weights(run.reference))


def test_a_run_repeats_and_goes_on_from_a_checkpoint(
    policy: LlamaForCausalLM, tmp_path: Path
) -> None:
    whole, halves = trainer(policy), trainer(policy, replace(CONFIG, save_every=2))
    whole.train(PROMPTS)
    halves.train(PROMPTS, save=lambda state: save_checkpoint(state, tmp_path))
    assert torch.equal(weights(whole.policy), weights(halves.policy))
    resumed = trainer(policy)
    load_checkpoint(resumed, tmp_path)
    assert resumed.step == 2
    resumed.train(PROMPTS)
    assert torch.equal(weights(whole.policy), weights(resumed.policy))
    assert torch.equal(weights(whole.value_model), weights(resumed.value_model))


def test_what_is_saved_loads_with_the_tulu_classes(
    policy: LlamaForCausalLM, tmp_path: Path
) -> None:
    run = trainer(policy)
    save_models(run, tmp_path)
    value = AutoModelForTokenClassification.from_pretrained(tmp_path / "value")
    assert value.config.architectures == ["LlamaForTokenClassification"]
    assert torch.equal(weights(value), weights(run.value_model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    with pytest.raises(FileNotFoundError, match="holds no trainer.pt"):
        load_checkpoint(run, tmp_path)


def test_the_policy_learns_what_is_rewarded(policy: LlamaForCausalLM) -> None:
    config = replace(
        CONFIG,
        steps=25,
        warmup_steps=5,
        rollouts_per_step=64,
        minibatch_size=32,
        kl_coef=0.01,
        unfinished_score=0.0,
        policy_lr=3e-3,
    )
    run = trainer(policy, config)
    scores: list[float] = []
    run.log = lambda stats: scores.append(stats["score"])
    run.train(PROMPTS)
    assert scores[-1] > scores[0] + 0.2


def test_learning_rate_rises_and_falls() -> None:
    assert [learning_rate_factor(s, 4, 2) for s in (-1, 0, 1, 2, 3, 4)] == [0, 0.5, 1, 1, 0.5, 0]
    assert learning_rate_factor(0, 0, 0) == 0.0
