"""lm-evaluation-harness on a local task: its figures are those of our own evaluation."""

import json
import os
import subprocess
import sys

import pytest
import torch

from guided_decode import GuidanceConfig, tiny_tulu
from guided_decode.cli.chats import prompt_ids
from guided_decode.cli.checkpoints import load_policy, open_scorer
from guided_decode.cli.decoding import Sampling, decode
from guided_decode.cli.model_options import ScorerOptions
from guided_decode.guidance import preset
from guided_decode.integrations import lm_eval as ours
from tests import PATIENCE, ROOT

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra lm-eval)")

COUNT = 8
CONFIG = GuidanceConfig(beta=10.0, top_k=4)
MODEL = {"pretrained": "tiny-tulu-sft", "scorer": "tiny-tulu-value", "beta": 10.0, "top_k": 4}
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["</s>"], do_sample: false, max_gen_toks: 80}
filter_list:
  - name: answer
    filter: [{function: regex, regex_pattern: "Answer: ([0-9]+)$"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of the task, whose data lie beside it."""
    at = tmp_path_factory.mktemp("tasks")
    lines = [{"prompt": text, "answer": str(sum(tiny_tulu.operands(text)))}
             for text in tiny_tulu.held_out_prompts(COUNT)]  # fmt: skip
    (at / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (at / "sums.yaml").write_text(TASK.replace("FILE", str(at / "sums.jsonl")))
    return at


@pytest.fixture(scope="module")
def texts():
    """By ourselves, one prompt after the other: plain and guided answers."""
    policy = load_policy("tiny-tulu-sft", "cpu", "float32")
    scorer = open_scorer("tiny-tulu-value", ScorerOptions(), dtype="float32", policy=policy)
    found = {"hf": [], "guided-decode": []}
    for message in tiny_tulu.held_out_prompts(COUNT):
        ids = prompt_ids(policy.tokenizer, "tulu-3", [{"role": "user", "content": message}])
        sampling = Sampling(max_new_tokens=80)
        found["hf"] += decode(policy, ids, sampling).texts
        found["guided-decode"] += decode(policy, ids, sampling, scorer, CONFIG).texts
    return found


def accuracy(answers):
    prompts = tiny_tulu.held_out_prompts(COUNT)
    return sum(map(tiny_tulu.is_correct, prompts, answers)) / COUNT


def evaluated(folder, model, arguments, **more):
    from lm_eval.tasks import TaskManager

    ours.register()
    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=["sums"], apply_chat_template=True, device="cpu",
        batch_size=5, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False), **more,
    )  # fmt: skip


@pytest.mark.slow
def test_the_harness_finds_the_accuracy_that_we_find(folder, texts):
    plain = {"pretrained": str(tiny_tulu.model_path("sft")), "add_bos_token": False}
    for model, arguments in (("hf", plain), ("guided-decode", MODEL)):
        result = evaluated(folder, model, arguments)
        answers = [sample["resps"][0][0] for sample in
                   sorted(result["samples"]["sums"], key=lambda each: each["doc_id"])]  # fmt: skip
        assert answers == texts[model]
        assert result["results"]["sums"]["exact_match,answer"] == accuracy(texts[model])
    assert accuracy(texts["hf"]) < accuracy(texts["guided-decode"])
    assert result["config"]["guidance"]["beta"] == 10.0


@pytest.mark.slow
def test_it_is_the_harnesss_own_command(folder, texts, tmp_path):
    words = ",".join(f"{name}={value}" for name, value in MODEL.items())
    ended = subprocess.run(
        [sys.executable, "-m", "guided_decode.integrations.lm_eval", "--model", "guided-decode",
         "--model_args", words, "--tasks", "sums", "--include_path", folder, "--limit", "4",
         "--apply_chat_template", "--device", "cpu", "--output_path", tmp_path,
         "--batch_size", "4"],
        cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["sums"]["exact_match,answer"]
    right = map(tiny_tulu.is_correct, tiny_tulu.held_out_prompts(4), texts["guided-decode"])
    assert found == sum(right) / 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scorer": None}, "no scorer came in --model_args: expected scorer=CRITIC"),
        ({"rule": "prune"}, "margin"),
        ({"beta": "high"}, "beta='high'"),
        ({"preset": "args2"}, "args2"),
    ],
)
def test_what_cannot_guide_is_refused_before_anything_is_loaded(arguments, message, monkeypatch):
    from guided_decode.integrations.lm_eval import model

    monkeypatch.setattr(model.HFLM, "__init__", None)
    with pytest.raises(ValueError, match=message):
        ours.GuidedLM(**(MODEL | arguments))


@pytest.fixture(scope="module")
def guided():
    return ours.GuidedLM(
        "tiny-tulu-sft", "tiny-tulu-value", preset="vas", top_k=7, top_p=0.9, terminal="critic",
        scorer_dtype="bfloat16", device="cpu", batch_size=3,
    )  # fmt: skip


def test_likelihoods_are_refused(guided):
    for ask in (guided.loglikelihood, guided.loglikelihood_rolling):
        with pytest.raises(NotImplementedError, match=f"generate_until tasks: {ask.__name__} was"):
            ask([])


def test_arguments_reach_guidance_scorer_and_policy(guided):
    assert guided.guidance == preset("vas", top_k=7, top_p=0.9)
    assert guided.scorer.terminal == "critic"
    assert guided.scorer.model.model.dtype == torch.bfloat16
    assert guided.model.dtype == torch.float32
    assert guided.batch_size == 3
    # The registry's: its training had no BOS, which its tokenizer would write.
    assert guided.add_bos_token is False


def test_the_module_says_what_is_missing():
    code = (
        "import sys; sys.modules['lm_eval'] = None; import runpy; "
        "runpy.run_module('guided_decode.integrations.lm_eval', run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "pip install 'guided-decode[lm-eval]'" in ended.stderr
