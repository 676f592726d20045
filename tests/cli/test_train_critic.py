"""`guided-decode train-critic`: what it reads and refuses, and the folder that comes of it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, AutoTokenizer

from guided_decode import load_scorer, tiny_tulu
from guided_decode.search import load_generator
from tests import PATIENCE
from tests.cli.critic_runs import POLICY, SHORT, done, invoke, read, refused, rollouts, write
from tests.search.recordings import Live
from tests.search.servers.completion_server import CompletionServer

PROMPTS = [
    {"prompt": message, "answer": sum(tiny_tulu.operands(message))}
    for message in tiny_tulu.training_prompts(5, seed=2)
]
JUDGES = """
import math

def length(prompt, response):
    assert isinstance(prompt, str) and response
    return len(response) / 100

def late_nan(prompt, response):
    return math.nan if "7" in prompt.split()[-1] else 1.0

def text(prompt, response):
    return "good"

def fails(prompt, response):
    raise KeyError("no such answer")
"""


@pytest.fixture
def judges(tmp_path, monkeypatch):
    """A module of judges, in the folder from which commands are called."""
    name = f"judges_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(JUDGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, lines) of a critic from rollouts with rewards."""
    folder = tmp_path_factory.mktemp("trained")
    lines = rollouts()
    source = write(folder / "in.jsonl", lines)
    result = done("train-critic", source, *POLICY, "--out", folder / "critic", *SHORT)
    assert "expected calibration error" in result.stdout
    return folder / "critic", lines


def test_the_folder_is_a_critic_by_auto_with_a_card_of_prompts_it_has_not_seen(trained):
    folder, lines = trained
    record = json.loads((folder / "critic.json").read_text())
    assert (record["kind"], record["bos"], record["terminal"]) == (
        "verl-critic",
        "keep",
        "baseline",
    )
    assert record["trained"]["policy"] == "tiny-tulu-sft"
    assert record["trained"]["settings"]["target"] == "outcome"
    held_out = read(folder / "held_out.jsonl")
    assert [line for line in lines if line in held_out] == held_out
    assert len(held_out) == record["trained"]["held_out_prompts"] == 2
    assert record["trained"]["prompts"] == 14
    card = json.loads((folder / "report_card" / "report_card.json").read_text())
    assert (card["rollouts"], card["prompts"]) == (2, 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scorer = load_scorer(folder, policy_tokenizer=tokenizer)
    model = AutoModelForTokenClassification.from_pretrained(folder)
    ids = tokenizer(tiny_tulu.render(lines[0]["prompt"]) + "7+6", add_special_tokens=False)
    row = list(ids.input_ids)
    wanted = model(torch.tensor([row])).logits[0, -1, 0]
    found = scorer.score([row], torch.empty(1, 0, dtype=torch.int64)).baseline[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert scorer.terminal == "baseline"
    assert not (folder / "training").exists()


def test_generate_is_guided_by_the_folder(trained):
    folder, _ = trained
    words = [
        "--scorer",
        folder,
        "--prompt",
        "What is 4837 + 2956?",
        "--max-new-tokens",
        8,
        "--json",
    ]
    line = json.loads(done("generate", *POLICY, *words).stdout)
    assert line["cost"]["scorer_tokens"] > 0
    assert line["text"]


def test_it_is_trained_once(trained):
    folder, _ = trained
    before = (folder / "model.safetensors").stat().st_mtime_ns
    source = folder.parent / "in.jsonl"
    # As a kill between the critic and its card leaves it.
    card = folder / "report_card" / "report_card.json"
    text = card.read_text()
    card.unlink()
    done("train-critic", source, *POLICY, "--out", folder, *SHORT)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert card.read_text() == text
    other = ["train-critic", source, *POLICY, "--out", folder, *SHORT[:-1], "2e-3"]
    assert "has a critic of other rollouts or settings: pass another --out" in refused(*other)


def test_token_ids_are_read_as_they_are(tmp_path, trained):
    """The same rollouts as ids train the same weights."""
    folder, lines = trained
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    rows = [
        {
            "prompt_ids": ids(tiny_tulu.render(line["prompt"])),
            "response_ids": [*ids(line["response"]), tokenizer.eos_token_id],
            "reward": line["reward"],
        }
        for line in lines
    ]
    source = write(tmp_path / "ids.jsonl", rows)
    done("train-critic", source, *POLICY, "--out", tmp_path / "critic", *SHORT)
    own, wanted = (load_file(each / "model.safetensors") for each in (tmp_path / "critic", folder))
    assert all(torch.equal(own[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "1+1"}, "in.jsonl, line 2: no response, which"),
        ({"prompt": "1+1", "response": "2"}, "in.jsonl, line 2: no reward, which"),
        ({"prompt": "1+1", "response": "2", "reward": "good"}, "line 2: the reward came as 'good'"),
        ({"prompt": "1+1", "response": "", "reward": 1}, "line 2: an empty response: expected"),
        ({"promt": "1+1", "reward": 1}, "line 2: {'promt': '1+1', 'reward': 1}: expected"),
        ({"prompt_ids": ["a"], "response": "2", "reward": 1}, "line 2: prompt_ids came as ['a']"),
        ({"prompt_ids": [999], "response": "2", "reward": 1}, "line 2: token id 999: the policy"),
        ({"prompt": "1", "response": "2", "reward": 1, "finished": 3}, "finished came as 3: exp"),
        ({"prompt": "1+1", "response_ids": [], "reward": 1}, "response_ids is empty: expected"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    source = write(tmp_path / "in.jsonl", [rollouts(1)[0], line])
    out = tmp_path / "critic"
    assert message in refused("train-critic", source, *POLICY, "--out", out)
    assert not (out / "critic.json").exists()


def test_a_line_that_is_no_json_is_named(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(rollouts(1)[0]) + "\nhello\n")
    said = refused("train-critic", source, *POLICY, "--out", tmp_path / "critic")
    assert "in.jsonl, line 2: not JSON" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the lines have no reward: pass --judge, --answer or --reward-model"),
        (["--answer", "final", "--judge", "a:b"], "--judge and --answer came together"),
        (["--judge", "nothing:at_all"], "--judge nothing:at_all: nothing cannot be imported"),
        (["--judge", "math"], "--judge math: expected MODULE:FUNCTION"),
        (["--answer", "final", "--samples", "2", "--temperature", "0"], "are the same response"),
        (["--answer", "final", "--target", "scores"], "--target scores are a reward model's"),
        (["--answer", "final", "--held-out", "1"], "--held-out 1.0: expected a share"),
        (["--answer", "final", "--mode", "half"], "--mode half: expected one of 'full', 'lora'"),
        (["--answer", "final", "--bos", "drop"], "--bos says how a reward model is read"),
        (["--answer", "final", "--lr", "-1"], "--lr -1.0: expected a number above 0"),
    ],
)
def test_what_makes_no_training_is_refused_in_one_line(tmp_path, words, message):
    source = write(tmp_path / "in.jsonl", PROMPTS)
    words = ["train-critic", source, *POLICY, "--out", tmp_path / "critic", *words]
    assert message in refused(*words, "--max-new-tokens", 4)


def test_rewards_and_a_judge_do_not_go_together(tmp_path):
    source = write(tmp_path / "in.jsonl", rollouts(4))
    said = refused("train-critic", source, *POLICY, "--out", tmp_path / "c", "--answer", "final")
    assert "--answer came with lines that have rewards" in said


def test_prompts_are_answered_and_judged_by_an_answer_key(tmp_path):
    source, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "critic"
    words = ["train-critic", source, *POLICY, "--answer", "final", "--samples", 2,
             "--max-new-tokens", 60, *SHORT]  # fmt: skip
    done(*words, "--out", out, "--draw-batch", 3)
    lines = read(out / "rollouts.jsonl")
    assert [line["prompt"] for line in lines] == [each["prompt"] for each in PROMPTS for _ in "12"]
    for line in lines:
        right = tiny_tulu.is_correct(line["prompt"], line["response"])
        assert line["reward"] == right
        assert line["finished"] == (line["response_ids"][-1] == 2)
    # Neither how many at a time nor a kill between two of them changes what is drawn.
    again = tmp_path / "again"
    again.mkdir()
    whole = (out / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (again / "samples.jsonl").write_bytes(b"".join(whole[:4]) + whole[4][:30])
    done(*words, "--out", again)
    assert (again / "samples.jsonl").read_bytes() == b"".join(whole)
    own, wanted = (load_file(each / "model.safetensors") for each in (again, out))
    assert all(torch.equal(own[name], wanted[name]) for name in wanted)
    said = refused(*words, "--out", again, "--temperature", 0.5)
    assert "made from another input or with other settings" in said


def test_a_judge_is_a_function_of_prompt_and_response(tmp_path, judges):
    source, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "critic"
    words = [*POLICY, "--out", out, "--samples", 1, "--max-new-tokens", 12, *SHORT]
    done("train-critic", source, *words, "--judge", f"{judges}:length")
    for line in read(out / "rollouts.jsonl"):
        assert line["reward"] == len(line["response"]) / 100


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("late_nan", "returned nan for the prompt '{prompt}'"),
        ("text", "returned 'good' for the prompt '{first}'"),
        ("fails", "raised KeyError ('no such answer') for the prompt '{first}'"),
    ],
)
def test_a_judge_without_a_number_is_refused_with_the_prompt(tmp_path, judges, judge, message):
    prompts = [{"prompt": f"What is 1{i}{i}3 + 2956?"} for i in (1, 2)]
    prompts += [{"prompt": "What is 4837 + 2957?"}, {"prompt": "Add 1111 and 1112."}]
    source, out = write(tmp_path / "in.jsonl", prompts), tmp_path / "critic"
    words = [*POLICY, "--out", out, "--samples", 1, "--max-new-tokens", 4, *SHORT]
    said = refused("train-critic", source, *words, "--judge", f"{judges}:{judge}")
    wanted = message.format(prompt=prompts[2]["prompt"], first=prompts[0]["prompt"])
    assert f"--judge {judges}:{judge} {wanted}" in said
    assert f"samples.jsonl, line {3 if judge == 'late_nan' else 1}" in said
    # What was judged before it stands.
    kept = read(out / "rollouts.jsonl") if (out / "rollouts.jsonl").exists() else []
    assert len(kept) == (2 if judge == "late_nan" else 0)


def test_a_reward_model_judges_and_scores_prefixes(tmp_path):
    source, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "critic"
    words = [*POLICY, "--out", out, "--samples", 1, "--max-new-tokens", 60, *SHORT,
             "--reward-model", "tiny-tulu-value", "--target", "scores"]  # fmt: skip
    done("train-critic", source, *words)
    scorer = load_scorer("tiny-tulu-value", policy_tokenizer=tiny_tulu.model_path("sft"))
    none = torch.empty(1, 0, dtype=torch.int64)
    for line in read(out / "rollouts.jsonl"):
        # V is not read at EOS.
        ids = line["prompt_ids"] + line["response_ids"][: -1 if line["finished"] else None]
        wanted = scorer.score([ids], none).baseline.item()
        assert line["reward"] == pytest.approx(wanted, abs=1e-4)
    assert json.loads((out / "critic.json").read_text())["trained"]["rewards"] == "--reward-model"


@pytest.mark.parametrize("mode", ["head", "lora"])
def test_heads_and_adapters_are_folders_too(tmp_path, mode):
    if mode == "lora":
        pytest.importorskip("peft", reason="peft is not installed")
    source, out = write(tmp_path / "in.jsonl", rollouts()), tmp_path / "critic"
    words = ["--mode", mode, "--loss", "cross-entropy", "--target", "td", "--lora-rank", 2]
    done("train-critic", source, *POLICY, "--out", out, *SHORT, *words)
    kind = {"head": "trunk-head", "lora": "classifier"}[mode]
    assert json.loads((out / "critic.json").read_text())["kind"] == kind
    guided = ["--scorer", out, "--prompt", "What is 4837 + 2956?", "--max-new-tokens", 4, "--json"]
    assert json.loads(done("generate", *POLICY, *guided).stdout)["cost"]["scorer_tokens"] > 0
    scorer = load_scorer(out, policy_tokenizer=AutoTokenizer.from_pretrained(out))
    values = scorer.score([[5, 6, 7]], torch.tensor([[8, 9]])).values
    assert bool(((values > 0) & (values < 1)).all())
    if mode == "head":
        own = ["--head", out, *guided[2:]]
        assert json.loads(done("generate", *POLICY, *own).stdout)["text"]


def test_a_server_draws_what_this_machine_would(tmp_path):
    local = load_generator(tiny_tulu.model_path("sft"))
    source = write(tmp_path / "in.jsonl", PROMPTS)
    words = [*POLICY, "--answer", "final", "--samples", 1, "--max-new-tokens", 6, *SHORT]
    with CompletionServer(Live(local), local._tokenizer).running() as server:
        served = ["--endpoint", server.url]
        done("train-critic", source, *words, "--out", tmp_path / "served", *served)
        assert len(server.asked()) >= len(PROMPTS)
    lines = read(tmp_path / "served" / "samples.jsonl")
    assert [line["prompt"] for line in lines] == [each["prompt"] for each in PROMPTS]
    assert all(len(line["response_ids"]) == 6 and not line["finished"] for line in lines)


def start(source, out):
    """A run of its own that has saved a state in the middle of an epoch."""
    command = [sys.executable, "-m", "guided_decode.cli", "train-critic", str(source), *POLICY,
               "--out", str(out), *LONG]  # fmt: skip
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while not (out / "training" / "state.pt").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


LONG = ["--epochs", "24", "--batch-size", "4", "--lr", "1e-3", "--save-every", "1"]


@pytest.mark.timeout(PATIENCE)
def test_a_training_that_is_killed_ends_with_the_weights_of_one_that_was_not(tmp_path):
    source = write(tmp_path / "in.jsonl", rollouts(10))
    out, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(source, out)
    busy = refused("train-critic", source, *POLICY, "--out", out, *LONG)
    assert f"another run trains in {out}" in busy
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    assert not (out / "critic.json").exists(), "the run was over before it was killed"
    other = ["train-critic", source, *POLICY, "--out", out, *LONG, "--seed", 1]
    assert "has a critic of other rollouts or settings" in refused(*other)
    for folder in (out, whole):
        done("train-critic", source, *POLICY, "--out", folder, *LONG)
    names = ("model.safetensors", "config.json", "critic.json", "held_out.jsonl")
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_rollouts_alone_make_a_critic_that_knows_half_way(tmp_path):
    """Without PPO: AUC 0.85 after half of a response, on prompts that were held out."""
    prompts = [
        {"prompt": message, "answer": sum(tiny_tulu.operands(message))}
        for message in tiny_tulu.training_prompts(2000, seed=11)
    ]
    source, out = write(tmp_path / "in.jsonl", prompts), tmp_path / "critic"
    words = ["--answer", "final", "--samples", 1, "--max-new-tokens", 80, "--epochs", 4,
             "--lr", "1e-3", "--draw-batch", 128]  # fmt: skip
    done("train-critic", source, *POLICY, "--out", out, *words)
    card = json.loads((out / "report_card" / "report_card.json").read_text())
    assert card["ranks"][1]["fraction"] == 0.5
    assert card["ranks"][1]["auc"] >= 0.85
    assert card["calibration_error"] < 0.1
    assert invoke("generate", *POLICY, "--scorer", out, "--prompt", "1234+4321=?").exit_code == 0
