"""`python -m recipes.ppo` on fresh random models, from files to files."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from recipes.ppo.__main__ import main, read_prompts
from recipes.ppo.checkpoint import STATE
from recipes.tiny_tulu.tokenizer import build_tokenizer


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, tokenizer = tmp_path_factory.mktemp("models"), build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(root / "policy")
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(root / "reward")
    tokenizer.save_pretrained(root / "policy")
    rows = [{"prompt": "Add 1"}, {"messages": [{"role": "user", "content": "Hello"}]}]
    (root / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def command(models: Path, out: Path, **settings: object) -> list[str]:
    paths = {"policy": models / "policy", "reward-model": models / "reward"}
    paths |= {"prompts": models / "prompts.jsonl", "out": out}
    given = {**paths, "rollouts-per-step": 4, "max-new-tokens": 4, "device": "cpu", **settings}
    return ["recipes.ppo", "--reward-bos"] + [
        part for name, value in given.items() for part in (f"--{name}", str(value))
    ]


def test_a_run_leaves_policy_and_value_model_and_resumes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", command(models, tmp_path, steps=2, **{"save-every": 1}))
    main()
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [1, 2]
    value = AutoModelForTokenClassification.from_pretrained(tmp_path / "value")
    assert value.config.num_labels == 1
    assert value.score.bias.item() == 0.0
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template
    assert (tmp_path / STATE).is_file()
    monkeypatch.setattr(sys, "argv", command(models, tmp_path, steps=3))
    main()
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [3]


def test_prompts_carry_no_bos_unless_asked(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "policy")
    plain, chat = read_prompts(models / "prompts.jsonl", tokenizer, bos=False)
    assert tokenizer.decode(plain) == "Add 1"
    assert tokenizer.decode(chat) == "<|user|>\nHello\n<|assistant|>\n"
    assert read_prompts(models / "prompts.jsonl", tokenizer, bos=True)[0] == [1, *plain]


@pytest.mark.parametrize("line", ['{"prompt": "a"', '{"text": "a"}', '["a"]'])
def test_a_bad_line_is_named(models: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: expected"):
        read_prompts(path, AutoTokenizer.from_pretrained(models / "policy"), bos=False)
