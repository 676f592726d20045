"""What `guided-decode ablate` refuses, before anything runs: all at once, by line."""

import json
import shutil

import pytest
import yaml

from guided_decode import tiny_tulu
from tests.cli.ablations import ablate, ablation, refused, write

HEAD = """\
prompts: {embedded: tiny-tulu, limit: 2}
reward: {kind: numeric}
policies: {sft: tiny-tulu-sft}
scorers: {critic: tiny-tulu-value}
"""


def said_of(tmp_path, text):
    file = write(tmp_path / "bad.yaml", text)
    said = refused(file, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return said.removeprefix("error: ").replace(f"{file}, ", "").rstrip("\n").split("; line ")


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    said = said_of(tmp_path, """\
prompts:
  file: nowhere.jsonl
  limt: 3
reward:
  kind: exactly
seeds: [1, 1]
block: 0
policies:
  sft:
    model: tiny-tulu-stf
  ppo:
    model: tiny-tulu-ppo
    dtype: float12
scorers:
  critic: tiny-tulu-value
colour: green
counting: all
methods:
  - method: guide
    beta: [1, many]
  - method: best-of-n
    m: 4
  - best-of-m
""")  # fmt: skip
    expected = [
        "line 1: prompts: file: nowhere.jsonl: no such file",
        "3: limt: no such key of prompts (did you mean limit?)",
        "4: reward: exactly: no such kind (did you mean exact?)",
        "6: seeds: [1, 1]: expected different integers, at least one",
        "7: block: 0: expected an integer of at least 1",
        "9: sft: tiny-tulu-stf: unknown model (did you mean tiny-tulu-sft?)",
        "11: ppo: dtype float12: expected one of auto, float32",
        "16: colour: no such key",
        "17: all: no such counting; expected one of forwarded, drawn",
        "20: beta: 'many': expected a number",
        "22: m: no such setting of best-of-n",
        "23: best-of-m: no such method (did you mean best-of-n?)",
    ]
    assert len(said) == len(expected), said
    for one, start in zip(said, expected, strict=True):
        assert one.startswith(start), (one, start)


# What a method says, and what is said of it; {} is the line of the method's first key.
METHODS = {
    "pruning where no beams are": (
        "- {method: best-of-n, n: 4, margin: 0.1}",
        "margin: no such setting of best-of-n; expected one of method,",
    ),
    "a margin without pruning": (
        "- {method: guide, margin: 0.1}",
        'guide: margin 0.1 was given with rule reweight, which has no margin: drop it, or pass '
        "rule prune",
    ),
    "pruning without a margin": ("- {method: guide, rule: prune}", "guide: rule"),
    "a setting without a default": (
        "- {method: cards, target: [null]}",
        "cards: cards needs target, which has no default",
    ),
    "a preset that there is not": (
        "- {method: guide, preset: vsa}",
        "guide: preset vsa: unknown (did you mean vas?)",
    ),
    "a whole vocabulary of a critic": (
        "- {method: guide, top_k: 0}",
        "guide: top_k 0 is the whole vocabulary, which only an implicit reward scores at once; "
        "critic is none: give a top_k, or other scorers",
    ),
    "a KL term without a reference": (
        "- {method: guide, kl_coef: 0.1}",
        "guide: kl_coef 0.1 needs reference, the model that the policy was tuned from",
    ),
    "a search's KL term without a reference": (
        "- {method: ppo-mcts, kl_coef: 0.1}",
        "ppo-mcts: kl_coef 0.1 needs reference",
    ),
    "a reference without a KL term": (
        "- {method: ppo-mcts, reference: tiny-tulu-sft}",
        "ppo-mcts: reference is of a KL term: give kl_coef, or drop it",
    ),
    "a scorer that nobody asks": (
        "- {method: vote, n: 3, scorers: [critic]}",
        "vote asks no scorer: drop scorers",
    ),
    "a scorer that there is not": (
        "- {method: guide, scorers: [critics]}",
        "scorers: critics: expected one of the file's, critic",
    ),
    "a policy that there is not": (
        "- {method: plain, policies: [dpo]}",
        "policies: dpo: expected one of the file's, sft",
    ),
    "a temperature below zero": ("- {method: plain, temperature: -1}", "plain: temperature"),
    "a budget of nothing": (
        "- {method: best-of-n, max_policy_tokens: 0}",
        "best-of-n: max_policy_tokens 0: expected a number above 0",
    ),
    "a calibration that there is not": (
        "- {method: guide, config: nowhere.yaml}",
        "guide: [Errno 2] No such file or directory: 'nowhere.yaml'",
    ),
    "an empty grid": ("- {method: guide, beta: []}", "beta: an empty list: expected at least one"),
    "a value twice": ("- {method: guide, beta: [2, 2.0]}", "beta: [2, 2.0]: a value came twice"),
    "two of a name": (
        "- {method: guide, beta: 1}\n  - {method: guide, beta: 2}",
        "guide, critic comes twice on sft: give one of them another name",
    ),
    "no method": ("- {name: guide}", "None: no such method; expected one of plain, guide,"),
    "no keys": ("- [1]", "methods: expected a name, or keys with method"),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_cannot_be_is_refused(tmp_path, name):
    method, expected = METHODS[name]
    (said,) = said_of(tmp_path, f"{HEAD}methods:\n  {method}\n")
    line = 7 if "\n" in method else 6
    assert said.startswith(f"line {line}: {expected}"), said


# Scorers and policies that do not go together with what is asked of them.
PAIRS = {
    "a policy on servers": (
        {"policies": {"sft": {"model": "tiny-tulu-sft", "endpoint": "http://127.0.0.1:9"}}},
        "guide: sft is decoded on servers, and guide decodes in this process",
    ),
    "a policy in vLLM": (
        {"policies": {"sft": {"model": "tiny-tulu-sft", "engine": "vllm"}}},
        "guide: sft is decoded in vLLM, and guide decodes in this process",
    ),
    "a scorer that reads text": (
        {"scorers": {"critic": {"model": "tiny-tulu-value", "judge_through_text": True}}},
        "guide: critic reads responses as text, and guide values single tokens",
    ),
    "pooling servers": (
        {"scorers": {"critic": {"model": "http://127.0.0.1:9"}}},
        "guide: critic is on pooling servers, which read a text anew at each call",
    ),
    "ranks of torchrun": (
        {"scorers": {"critic": {"model": "tiny-tulu-value", "tp_plan": "auto"}}},
        "critic: tp_plan came, and ablate runs in one process",
    ),
    "no scorers": ({"scorers": None}, "guide asks a scorer: expected scorers in the file"),
    "what is no key of a scorer": (
        {"scorers": {"critic": {"model": "tiny-tulu-value", "kindd": "ppo-critic"}}},
        "kindd: no such key of scorer (did you mean kind?)",
    ),
    "a kind that there is not": (
        {"scorers": {"critic": {"model": "tiny-tulu-value", "kind": "ppo"}}},
        "critic: kind 'ppo': expected one of ppo-critic",
    ),
    "a transform that there is not": (
        {"scorers": {"critic": {"model": "tiny-tulu-value", "transform": "softmin"}}},
        "critic: transform 'softmin': expected one of identity",
    ),
    "an implicit reward without a reference": (
        {"scorers": {"critic": {"model": "tiny-tulu-sft", "kind": "implicit"}}},
        "critic: kind implicit needs reference, the model that the scorer was tuned from",
    ),
    "an option of servers": (
        {"policies": {"sft": {"model": "tiny-tulu-sft", "served_model": "x"}}},
        "sft: served_model came without endpoint",
    ),
    "a KL term of a served policy": (
        {
            "policies": {"sft": {"model": "tiny-tulu-ppo", "endpoint": "http://127.0.0.1:9"}},
            "methods": [
                {"method": "ppo-mcts", "kl_coef": 0.1, "reference": "tiny-tulu-sft"},
            ],
        },
        "ppo-mcts: kl_coef 0.1 compares the policy with a reference, which endpoint does not have",
    ),
    "single tokens of a judge of text": (
        {
            "scorers": {"critic": {"model": "tiny-tulu-value", "judge_through_text": True}},
            "methods": [{"method": "ppo-mcts"}],
        },
        "ppo-mcts: judge_through_text of critic: this method values single tokens",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_models_that_do_not_go_together_are_refused(tmp_path, name):
    changed, expected = PAIRS[name]
    given = ablation(**{"methods": [{"method": "guide"}], **changed})
    if given["scorers"] is None:
        del given["scorers"]
    (said,) = said_of(tmp_path, yaml.safe_dump(given, sort_keys=False))
    number, _, text = said.removeprefix("line ").partition(": ")
    assert text.startswith(expected), said
    # The line is of the entry, or of the key, that is spoken of.
    shown = yaml.safe_dump(given, sort_keys=False).splitlines()[int(number) - 1]
    assert any(word in shown for word in ("method", "critic", "sft", "kindd", "kl_coef")), shown


def test_a_scorer_of_another_tokenizer_is_refused(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_tulu.model_path("value"), other)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]
    file.write_text(json.dumps(tokenizer))
    scorers = {"critic": {"model": str(other), "kind": "ppo-critic"}}
    methods = [{"method": "guide"}, {"method": "best-of-n"}, {"method": "vote"}]
    said = said_of(tmp_path, yaml.safe_dump(ablation(scorers=scorers, methods=methods)))
    for one, name in zip(said, ("guide", "best-of-n"), strict=True):
        assert f"{name}: {other} has another tokenizer than tiny-tulu-sft (" in one
        assert "give this method other scorers, or a search and judge_through_text" in one


REWARDS = {
    "a pattern that is none": ({"kind": "regex", "pattern": "("}, "pattern: (: no regular"),
    "no pattern": ({"kind": "regex"}, "kind regex needs pattern"),
    "another kind's key": (
        {"kind": "exact", "tolerance": 0.1},
        "tolerance is not of kind exact, which has field, find",
    ),
    "a function that there is not": (
        {"kind": "function", "function": "guided_decode.tiny_tulu:is_wrong"},
        "function: guided_decode.tiny_tulu:is_wrong: guided_decode.tiny_tulu has no function",
    ),
    "no function": ({"kind": "function", "function": "reward"}, "function: reward: expected"),
    "a model that there is not": (
        {"kind": "model", "model": "tiny-tulu-rewards"}, "tiny-tulu-rewards: unknown model"
    ),
    "a field that no prompt has": (
        {"kind": "numeric", "field": "solution"},
        "kind numeric compares with the field solution, which is no text or number in tiny-tulu, "
        "prompt 1, tiny-tulu, prompt 2, tiny-tulu, prompt 3 and 1 more",
    ),
    "a tolerance below zero": ({"kind": "numeric", "tolerance": -1}, "tolerance: -1: expected"),
    "an extraction that there is not": ({"kind": "exact", "find": "last"}, "find: last: expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_that_cannot_be_had_is_refused(tmp_path, name):
    reward, expected = REWARDS[name]
    given = ablation(reward=reward, methods=["plain"])
    (said,) = said_of(tmp_path, yaml.safe_dump(given, sort_keys=False))
    assert said.startswith(f"line 4: reward: {expected}"), said


def test_a_line_without_an_answer_is_named(tmp_path):
    prompts = tmp_path / "in.jsonl"
    rows = [{"prompt": "1+1=?", "answer": 2}, {"prompt": "2+2=?"}, {"prompt": "3+3=?", "answer": 6}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ablation(prompts={"file": str(prompts)}, methods=["plain"])
    (said,) = said_of(tmp_path, yaml.safe_dump(given, sort_keys=False))
    assert said.endswith(f"field answer, which is no text or number in {prompts}, line 2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2]\n", "expected an ablation, with prompts, output,"),
        ("", "expected an ablation, with prompts, output,"),
        ("prompts: [\n", "not YAML"),
    ],
)
def test_what_is_no_ablation_is_refused(tmp_path, text, expected):
    assert expected in refused(write(tmp_path / "bad.yaml", text))


def test_what_is_lacking_is_said(tmp_path):
    said = said_of(tmp_path, "seeds: [0]\n")
    assert [each.partition(": ")[2] for each in said] == [
        f"no {name}: expected them in the file"
        for name in ("methods", "policies", "prompts", "reward")
    ]


def test_an_output_is_needed_and_a_file(tmp_path):
    file = write(tmp_path / "small.yaml", ablation())
    assert "small.yaml has no output, a folder: pass --output DIR" in refused(file)
    assert "expected a file: CONFIG.yaml, or --init for an example of one" in refused()


def test_a_calibrations_beta_is_taken_where_the_file_says_none(tmp_path):
    calibrated = tmp_path / "guidance.yaml"
    calibrated.write_text("guidance:\n  beta: 9.5\n  top_k: 4\n")
    methods = [{"method": "guide", "config": str(calibrated), "gate": [0.8, 0.9]}]
    file = write(tmp_path / "small.yaml", ablation(methods=methods))
    plan = ablate(file, "--dry-run").stdout
    # Four candidates of each of 56 tokens, on 4 prompts with 2 seeds, after prompts of about 20.
    read = int(plan.split("gate 0.8)")[1].split()[2].replace(",", ""))
    assert read // 8 in range(56 * 4 + 18, 56 * 4 + 24)


def test_a_policy_that_ends_at_strings_is_guided_by_searches_alone(tmp_path):
    orz = "Open-Reasoner-Zero/Open-Reasoner-Zero-7B"
    given = ablation(policies={"orz": orz}, methods=[{"method": "guide"}, {"method": "vote"}])
    (said,) = said_of(tmp_path, yaml.safe_dump(given, sort_keys=False))
    assert "guide: orz ends its responses at 'User:' or" in said
    assert "which guide does not see: give this method other policies" in said


def test_values_that_cannot_be_are_refused_before_anything_runs(tmp_path):
    calibrated = tmp_path / "guidance.yaml"
    calibrated.write_text("guidance:\n  beta: 9.5\n  topk: 4\n")
    methods = [{"method": "guide", "config": str(calibrated)}, "best-of-n"]
    given = ablation(methods=methods, seeds=[0, 2**63],
                     equal_cost={"budgets": [2], "against": "best-of-m"})  # fmt: skip
    said = sorted(each.partition(": ")[2] for each in said_of(tmp_path, yaml.safe_dump(given)))
    assert said[0].startswith("equal_cost: against: best-of-m: no such method (did you mean best-")
    assert said[1].startswith(f"guide: config: {calibrated}: topk: no such setting of guidance")
    assert said[2].startswith(f"seeds: [0, {2**63}]: expected integers of 64 bits")


def test_an_answer_that_is_no_number_is_refused_before_anything_runs(tmp_path):
    prompts = tmp_path / "in.jsonl"
    rows = [{"prompt": "1+1=?", "answer": 2}, {"prompt": "2+2=?", "answer": "blue"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ablation(prompts={"file": str(prompts)}, methods=["plain"])
    (said,) = said_of(tmp_path, yaml.safe_dump(given, sort_keys=False))
    assert f"reward: {prompts}, line 2: the answer 'blue' has no number" in said


def test_a_name_that_looks_like_a_day_is_a_name(tmp_path):
    file = write(
        tmp_path / "small.yaml", HEAD + "methods:\n  - {method: plain, name: 2026-13-45}\n"
    )
    assert "2026-13-45" in ablate(file, "--dry-run").stdout
