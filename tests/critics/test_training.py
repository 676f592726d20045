"""Training: what it learns, that it goes on bit for bit, and the folders that are scorers."""

import json

import pytest
import torch

from guided_decode import load_scorer
from guided_decode.critics.config import CriticConfig
from guided_decode.critics.features import Features, last_hidden_states
from guided_decode.critics.network import build
from guided_decode.critics.rollout import Rollout
from guided_decode.critics.saving import RECORD, save_critic
from guided_decode.critics.state import StateFiles
from guided_decode.critics.targets import outcome_targets
from guided_decode.critics.training import Examples, Training
from guided_decode.critics.values import values_along
from tests import models
from tests.checkpoints.tokenizer_files import word_tokenizer

EOS, GOOD, BAD = models.EOS, 40, 41


def rollouts(count=48, seed=0):
    """A response is right where it has the good token; V can know from then on."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        length = int(torch.randint(2, 6, (1,), generator=generator))
        prompt, *rest = torch.randint(3, 40, (2, 4), generator=generator).tolist()
        response = [*(rest[0] * 2)[:length], GOOD if i % 2 else BAD, *rest[0][:2], EOS]
        found.append(Rollout(tuple(prompt), tuple(response), float(i % 2), True))
    return found


@pytest.fixture(scope="module")
def policy():
    return models.tiny("llama", "lm")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def examples(config, own):
    outcomes = outcome_targets(own, config.loss)
    return Examples(own, outcomes, range(len(own) - 8), range(len(own) - 8, len(own)))


def trained(policy, folder, stop_at=None, own=None, **settings):
    """(network, training) after training; interrupted at a step, and gone on with, if asked."""
    own = own or rollouts()
    given = {"epochs": 2, "batch_size": 8, "lr": 3e-3, "lora_rank": 4, "width": 8}
    config = CriticConfig(**(given | settings)).settled()
    data = examples(config, own)

    def begin(progress=lambda *of: None):
        network = build(policy, config, data.outcomes.mean(0), "it")
        files = StateFiles(folder, "run")
        return Training(network, data, config, files, save_every=2, progress=progress)

    def stop(step, steps, loss):
        if step == stop_at:
            raise KeyboardInterrupt

    if stop_at is not None:
        with pytest.raises(KeyboardInterrupt):
            begin(stop).run()
        torch.manual_seed(99)  # another process has other numbers
    training = begin()
    training.run()
    return training.network, training


def lora(mode):
    if mode == "lora":
        pytest.importorskip("peft", reason="peft is not installed")


@pytest.mark.parametrize("mode", ["full", "lora", "head"])
@pytest.mark.parametrize("stop_at", [1, 3, 7])
def test_a_training_that_was_stopped_ends_with_the_same_weights(tmp_path, policy, mode, stop_at):
    lora(mode)
    whole, own = trained(policy, tmp_path / "a", mode=mode, target="td")
    halves, other = trained(policy, tmp_path / "b", stop_at, mode=mode, target="td")
    assert own.trained.epochs == other.trained.epochs
    weights = whole.trainable()
    assert weights
    for name, each in halves.trainable().items():
        assert torch.equal(each, weights[name]), name


def test_a_state_of_another_run_does_not_count(tmp_path):
    files = StateFiles(tmp_path, "one")
    files.save({"step": 3})
    assert files.load() == {"step": 3}
    other = StateFiles(tmp_path, "two")
    assert other.load() is None
    assert other.of_another()
    files.remove()
    assert not other.of_another()
    assert list(tmp_path.iterdir()) == []


def test_the_weights_are_those_of_the_epoch_with_the_least_validation_loss(tmp_path, policy):
    # A rate with which later epochs are worse than the first.
    _, training = trained(policy, tmp_path, epochs=3, lr=0.3, mode="head", width=0)
    losses = [epoch["validation_loss"] for epoch in training.trained.epochs]
    assert training.trained.best_loss == min(losses)
    assert losses[training.trained.best_epoch - 1] == min(losses)
    assert training._validation_loss() == pytest.approx(min(losses), rel=1e-5)


def test_a_loss_that_is_no_number_ends_it(tmp_path, policy):
    own = rollouts(16)
    own[0] = Rollout(own[0].prompt, own[0].response, 1e30, True)
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at step 1.*smaller lr= than 0.003"
    ):
        trained(policy, tmp_path, own=own)


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
@pytest.mark.parametrize("mode", ["full", "lora", "head"])
@pytest.mark.timeout(600)
def test_a_folder_is_a_scorer_by_its_metadata_and_says_what_was_trained(
    tmp_path, policy, tokenizer, mode, loss
):
    lora(mode)
    own = rollouts()
    network, training = trained(
        policy, tmp_path / "state", own=own, mode=mode, loss=loss, epochs=6, lr=1e-2
    )
    first, *_, last = (epoch["loss"] for epoch in training.trained.epochs)
    assert last < first
    base, out = models.saved("llama", "lm"), tmp_path / "critic"
    save_critic(out, network, training.config, tokenizer, policy=base, trained={"rows": 48})
    scorer = load_scorer(out, policy_tokenizer=tokenizer)
    ends = mode != "head" and loss == "cross-entropy"
    assert scorer.terminal == ("critic" if ends else "baseline")
    # The oracle: the network that was trained, one rollout at a time.
    found = values_along(scorer, own[:6], at_end=network.at_end)
    for i, values in enumerate(found):
        outputs = network.outputs(own, [i])[0]
        wanted = outputs[:, 0] if loss == "squared" else outputs.softmax(-1)[:, 1]
        torch.testing.assert_close(values, wanted, atol=1e-4, rtol=1e-4)
    record = json.loads((out / RECORD).read_text())
    assert record["kind"] == training.config.kind
    assert record["trained"] == {"rows": 48}
    assert not list(out.glob("*partial*"))


def test_it_learns_what_the_response_says(tmp_path, policy):
    """V after the token that decides, against V before it, of rollouts that were not trained on."""
    network, _ = trained(policy, tmp_path, own=rollouts(200), epochs=8, lr=3e-3)
    new = rollouts(40, seed=5)
    after = torch.stack([network.outputs(new, [i])[0, -3, 0] for i in range(len(new))])
    right = torch.tensor([bool(each.reward) for each in new])
    assert float(after[right].min()) > float(after[~right].max())


def test_hidden_states_are_those_of_the_token_before_each_generated_one(policy):
    own = rollouts(5)
    kept = Features(policy.base_model, own, at_end=False).rows([3, 0])
    read = last_hidden_states(policy.base_model, [own[3], own[0]], at_end=True)
    for row, one in enumerate((own[3], own[0])):
        hidden = policy.base_model(torch.tensor([one.ids])).last_hidden_state[0]
        n = len(one.response)
        wanted = hidden[len(one.prompt) - 1 :]
        torch.testing.assert_close(kept[row, :n], wanted[:-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(read[row, : n + 1], wanted, atol=1e-5, rtol=1e-5)


def test_values_are_the_same_whatever_scores_are_asked_with(policy, tmp_path):
    critic = load_scorer(models.tiny("llama", "token"), "verl-critic")
    own = rollouts(20)
    model = models.tiny("llama", "token")
    for one, values in zip(own, values_along(critic, own), strict=True):
        wanted = model(torch.tensor([one.ids])).logits[0, len(one.prompt) - 1 : -1, 0]
        torch.testing.assert_close(values, wanted, atol=1e-4, rtol=1e-4)


def test_a_policy_without_a_token_classifier_is_told_of_heads(tmp_path):
    config = CriticConfig(mode="full").settled()
    gemma3 = models.tiny("gemma3", "lm")
    with pytest.raises(ValueError, match='no token classifier.*pass mode="head"'):
        build(gemma3, config, torch.zeros(1), "gemma")
    network = build(gemma3, CriticConfig(mode="head").settled(), torch.zeros(1), "gemma")
    assert network.outputs(rollouts(2), [0, 1]).abs().max() == 0


def test_a_heads_folder_stands_for_its_policy_and_says_where_it_is_broken(
    tmp_path, policy, tokenizer
):
    config = CriticConfig(mode="head", width=0).settled()
    network = build(policy, config, torch.tensor([0.5]), "it")
    base, out = models.saved("llama", "lm"), tmp_path / "critic"
    save_critic(out, network, config, tokenizer, policy=base, trained={})
    scorer = load_scorer(out, policy_tokenizer=tokenizer)
    values = scorer.score([[5, 6, 7]], torch.tensor([[8, 9]])).values
    torch.testing.assert_close(values, torch.full((1, 2), 0.5))
    # The head is of this trunk: another policy under its name is refused.
    other = models.saved("llama", "lm", 9)
    (out / "trunk_policy.json").write_text(json.dumps({"kind": "trunk-head", "policy": other}))
    with pytest.raises(ValueError, match="whose weights are not those of the policy"):
        load_scorer(out, policy_tokenizer=tokenizer)
    (out / "trunk_policy.json").write_text("{}")
    with pytest.raises(ValueError, match=r"trunk_policy.json cannot be read: expected"):
        load_scorer(out, policy_tokenizer=tokenizer)
    (out / "trunk_policy.json").unlink()
    with pytest.raises(ValueError, match="pass the policy as the model and this as its head"):
        load_scorer(out, policy_tokenizer=tokenizer)
