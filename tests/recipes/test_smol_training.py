"""smol's PPO on a tiny model: the parts of the trunk, what is shared, what is saved and resumed."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import AutoModelForTokenClassification as TokenClassifier

from recipes.ppo import PPOConfig
from recipes.ppo.checkpoint import load_checkpoint, save_checkpoint
from recipes.ppo.readings import in_batches, token_logps, token_values
from recipes.ppo.rollout import sample
from recipes.smol.metrics import foresight, spearman
from recipes.smol.settings import Settings
from recipes.smol.stack import share

peft = pytest.importorskip("peft", reason="needs the extra smol")

from recipes.smol.networks import build_networks  # noqa: E402
from recipes.smol.ppo import SmolTrainer  # noqa: E402
from recipes.smol.release import release  # noqa: E402

EOS, VOCAB = 2, 61
PROMPTS = [[1, 5, 6, 7], [1, 8], [1, 9, 10], [1, 11, 12, 13, 14]]
SETTINGS = Settings(
    PPOConfig(
        steps=2,
        warmup_steps=1,
        rollouts_per_step=8,
        minibatch_size=3,
        generation_batch_size=8,
        epochs=2,
        max_new_tokens=6,
        temperature=1.0,
        policy_lr=1e-2,
        value_lr=1e-2,
        unfinished_score=None,
    ),
    adapted_layers=2,
    rank=4,
    alpha=8,
    compute_dtype="float32",
)


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


def tiny_policy() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=1, eos_token_id=EOS,
        pad_token_id=EOS, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Evenness:
    """A reward without a tokenizer: the share of even tokens."""

    def __call__(self, prompts, responses):
        self.tasks = ["sentiment"] * len(prompts)
        self.rewards = torch.tensor([sum(t % 2 == 0 for t in r) / len(r) for r in responses])
        return self.rewards


def trainer_of(base, settings=SETTINGS, log=lambda stats: None) -> SmolTrainer:
    torch.manual_seed(settings.ppo.seed)
    parts = build_networks(base, settings)
    return SmolTrainer(
        parts.policy, parts.reference, parts.value, Evenness(), settings.ppo,
        eos_id=EOS, pad_id=EOS, log=log,
    )  # fmt: skip


def disturb(network) -> None:
    """Moves every weight that learns, so that adapters and head say something."""
    generator = torch.Generator().manual_seed(3)
    for one in network.parameters():
        if one.requires_grad:
            one.data += 0.3 * torch.randn(one.shape, generator=generator)


def rollout_of(policy):
    torch.manual_seed(1)
    return sample(
        policy, PROMPTS, max_new_tokens=6, temperature=1.0, eos_id=EOS, pad_id=EOS, batch_size=8
    )


@torch.no_grad()
def test_the_readings_are_those_of_the_stock_forward_of_whole_models():
    parts = build_networks(tiny_policy(), SETTINGS)
    for network in (parts.policy, parts.value):
        disturb(network)
    rollout = rollout_of(parts.policy)
    mask = rollout.response_mask
    read = {
        "policy": in_batches(token_logps, parts.policy, rollout, 3),
        "reference": in_batches(token_logps, parts.reference, rollout, 3),
        "value": in_batches(token_values, parts.value, rollout, 3),
    }
    whole = {
        "policy": token_logps(parts.policy.model, rollout),
        "reference": token_logps(tiny_policy(), rollout),
        "value": token_values(parts.value.model, rollout),
    }
    for name, expected in whole.items():
        assert (expected * mask).abs().max() > 0.1
        assert torch.allclose(read[name] * mask, expected * mask, atol=1e-5), name
    assert not torch.allclose(read["policy"] * mask, read["reference"] * mask, atol=1e-2)
    # By the four rows of one rollout, whatever is read of them.
    assert parts.lower.rows_read == len(PROMPTS)


@torch.no_grad()
def test_sampling_is_by_the_adapted_policy():
    parts = build_networks(tiny_policy(), SETTINGS)
    disturb(parts.policy)
    torch.manual_seed(5)
    ids = torch.tensor([PROMPTS[0]])
    how = {"attention_mask": torch.ones_like(ids), "do_sample": True, "max_new_tokens": 8}
    got = parts.policy.generate(input_ids=ids, **how)
    torch.manual_seed(5)
    assert got.tolist() == parts.policy.model.generate(input_ids=ids, **how).tolist()


def test_frozen_weights_are_shared_and_stay_as_they_were():
    base = tiny_policy()
    before = {name: one.clone() for name, one in base.state_dict().items()}
    trainer = trainer_of(base)
    frozen = {
        one.data_ptr()
        for network in (trainer.policy, trainer.value_model)
        for one in network.parameters()
        if not one.requires_grad
    }
    own = {one.data_ptr() for one in base.parameters()}
    # The head's bias, and the head that PEFT keeps beside the one that learns.
    assert len(frozen - own) <= 3
    assert own <= frozen
    trainer.train(PROMPTS)
    assert all(torch.equal(before[name], one) for name, one in base.state_dict().items())


def test_both_adapters_learn_and_the_heads_bias_does_not():
    logged: list[dict[str, float]] = []
    trainer = trainer_of(tiny_policy(), replace(SETTINGS), logged.append)
    trainer.train(PROMPTS)
    for network in (trainer.policy, trainer.value_model):
        b = [one for name, one in network.named_parameters() if "lora_B" in name]
        assert len(b) == 14
        assert all(one.abs().max() > 0 for one in b)
        assert all(".layers.2." in n or ".layers.3." in n for n, p in network.named_parameters()
                   if "lora_" in n)  # fmt: skip
    assert trainer.value_model.score.bias.item() == 0.0
    assert trainer.value_model.score.weight.abs().max() > 0
    assert [line["warming"] for line in logged] == [1.0, 0.0, 0.0]
    assert -1 <= logged[-1]["sentiment_half"] <= 1


def test_a_run_that_is_resumed_ends_with_the_same_weights(tmp_path):
    whole = trainer_of(tiny_policy())
    whole.train(PROMPTS)
    first = trainer_of(tiny_policy())
    first.config = replace(first.config, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        first.train(PROMPTS, save=_save_and_stop(tmp_path))
    second = trainer_of(tiny_policy())
    load_checkpoint(second, tmp_path)
    assert second.step == 2
    second.train(PROMPTS)
    for one, other in ((whole.policy, second.policy), (whole.value_model, second.value_model)):
        for name, weight in one.named_parameters():
            assert torch.equal(weight, dict(other.named_parameters())[name]), name


def _save_and_stop(out):
    def save(trainer):
        save_checkpoint(trainer, out)
        raise KeyboardInterrupt

    return save


def test_the_checkpoint_of_another_rank_is_refused(tmp_path):
    save_checkpoint(trainer_of(tiny_policy()), tmp_path)
    other = trainer_of(tiny_policy(), replace(SETTINGS, adapted_layers=1))
    with pytest.raises(ValueError, match=r"28 weights that learn, the network 14; .*build it for"):
        load_checkpoint(other, tmp_path)


def test_the_release_is_adapters_that_peft_puts_on_the_base(tmp_path):
    base = tiny_policy()
    base.save_pretrained(tmp_path / "base")
    trainer = trainer_of(base)
    disturb(trainer.policy)
    disturb(trainer.value_model)
    release(trainer, "smol-sft", tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"base", "ppo", "value"}
    config = json.loads((tmp_path / "value" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "smol-sft"
    ids = torch.tensor([PROMPTS[3]])
    with torch.no_grad():
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        policy = peft.PeftModel.from_pretrained(policy, tmp_path / "ppo")
        wanted = trainer.policy.model(ids).logits
        assert torch.allclose(policy(ids).logits, wanted, atol=2e-2)
        value = TokenClassifier.from_pretrained(tmp_path / "base", num_labels=1)
        value = peft.PeftModel.from_pretrained(value, tmp_path / "value")
        wanted = trainer.value_model.model(ids).logits
        assert torch.allclose(value(ids).logits, wanted, atol=2e-2)


def test_share_copies_modules_and_no_weights():
    linear = torch.nn.Linear(2, 3)
    other = share(linear)
    assert other is not linear
    assert other.weight is linear.weight


def test_rank_correlation_is_scipys():
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 6, (50,), generator=generator)
    second = first + torch.randint(0, 6, (50,), generator=generator)
    assert spearman(first, second) == pytest.approx(scipy.spearmanr(first, second).statistic)
    assert spearman([1, 1, 1], [1, 2, 3]) != spearman([1, 1, 1], [1, 2, 3])  # NaN


def test_foresight_is_auc_on_constraints():
    assert foresight("constraints", [0.1, 0.9, 0.8, 0.2], [0.5, 1.0, 0.0, 1.0]) == 0.75
    assert foresight("sentiment", [1.0, 2.0, 3.0], [-0.5, 0.1, 0.9]) == 1.0
