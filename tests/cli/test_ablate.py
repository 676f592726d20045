"""`guided-decode ablate` on tiny-tulu: what it decodes, counts, compares, and keeps."""

import csv
import json
import math
import re
from statistics import fmean

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from guided_decode import GuidanceConfig, load_scorer, tiny_tulu
from guided_decode.cli.decoding import Sampling, generation_config
from guided_decode.integrations.transformers import GuidedDecoding
from guided_decode.lab.ablate.store import Store
from guided_decode.lab.bootstrap import bootstrap_of_rewards
from guided_decode.lab.paired_tests import holm, sign_flip_test
from guided_decode.search.seeds import derive
from tests.cli import ablations
from tests.cli.ablations import METHODS, ablate, ablation, final_files, lines, of, refused, units
from tests.cli.search_runs import search

PROMPTS = tiny_tulu.held_out_prompts(4)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    equal = {"budgets": [2, 4], "against": "best-of-n"}
    given = ablation(equal_cost=equal)
    return ablations.write(tmp_path_factory.mktemp("ablation") / "small.yaml", given)


@pytest.fixture(scope="module")
def done(config):
    folder = config.parent / "out"
    ablate(config, "--output", folder, "--no-plots")
    return folder


@pytest.fixture(scope="module")
def again(config, done):
    """The folder after a second run, and its units and files before it."""
    before = units(done), final_files(done), (done / "clock.csv").read_bytes()
    ablate(config, "--output", done)
    return done, *before


def test_there_is_a_response_for_each_prompt_seed_and_setting(done):
    found = lines(done)
    # Greedy decoding and a tree without draws have one seed.
    assert len(found) == 4 * (5 * 2 + 2)
    for line in found:
        assert line["prompt"] == PROMPTS[line["line"] - 1]
        assert line["reward"] == tiny_tulu.is_correct(line["prompt"], line["response"])


@pytest.mark.parametrize("beta", [3, 10])
def test_a_guided_response_is_the_one_of_generate(done, beta):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tulu.model_path("sft"), padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(tiny_tulu.model_path("sft"), dtype=torch.float32)
    critic = load_scorer("tiny-tulu-value", policy_tokenizer=tokenizer)
    guided = GuidedDecoding(critic, GuidanceConfig(beta=beta, top_k=4))
    generation = generation_config(policy, Sampling(1.0, 1, 56))
    generation.return_dict_in_generate = True
    generation.output_logits = generation.output_scores = True
    chats = [tiny_tulu.render(text) for text in PROMPTS[2:4]]
    inputs = tokenizer(chats, add_special_tokens=False, padding=True, return_tensors="pt")
    # The second unit of seed 1.
    torch.manual_seed(derive(1, 2))
    output = policy.generate(**inputs, generation_config=generation, custom_generate=guided)
    width = inputs.input_ids.shape[1]
    own = [line for line in of(done, "guide", beta=float(beta)) if line["seed"] == 1][2:4]
    for i, line in enumerate(own):
        row = output.sequences[i, width:].tolist()
        ids = row[: row.index(tokenizer.eos_token_id) + 1]
        assert line["response"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert line["tokens"] == len(ids)
        # Both distributions of each step, summed by hand.
        kl = log_prob = 0.0
        for step, token in enumerate(ids):
            p = output.logits[step][i].double().log_softmax(-1)
            q = output.scores[step][i].double().log_softmax(-1)
            kl += float(torch.where(q.isneginf(), 0.0, q.exp() * (q - p)).sum())
            log_prob += float(p[token])
        assert line["kl"] == pytest.approx(kl, abs=1e-4)
        assert line["log_prob"] == pytest.approx(log_prob, abs=1e-4)
    # The unit's tokens through the critic, those that prompts have in common counted for each.
    prompts = tokenizer(chats, add_special_tokens=False).input_ids
    alike = next(i for i, pair in enumerate(zip(*prompts, strict=False)) if len({*pair}) > 1)
    counted = sum(line["cost"]["scorer_tokens"] for line in own)
    assert counted == critic.stats.tokens + alike


@pytest.mark.parametrize("name", ["best-of-n", "cd", "ppo-mcts"])
def test_a_search_is_the_one_of_search(done, tmp_path, name):
    given = next(each for each in METHODS if each["method"] == name)
    settings = {k: v[-1] if isinstance(v, list) else v for k, v in given.items() if k != "method"}
    words = [w for k, v in settings.items() for w in (f"--{k.replace('_', '-')}", v)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    found = search("--method", name, *words, "--max-new-tokens", 56, "--seed", 0, source)
    own = [line for line in of(done, name, **settings) if line["seed"] == 0]
    for line, theirs in zip(own, found, strict=True):
        best = theirs["candidates"][theirs["chosen"]]
        assert line["response"] == theirs["response"]
        assert line["log_prob"] == pytest.approx(best["log_prob"], abs=1e-4)
        assert line["ended"] == best["ended"]
        del theirs["cost"]["seconds"]
        prompt = line["cost"].pop("prompt_tokens")
        assert line["cost"] == theirs["cost"]
        assert prompt in range(18, 24)


def test_what_a_method_is_from_the_policy_is_known_or_bounded(done):
    for line in of(done, "plain"):
        assert (line["kl"], line["kl_at_most"]) == (0.0, None)
    for line in of(done, "greedy"):
        # A point mass: minus the log-probability of what it says.
        assert line["kl"] == pytest.approx(-line["log_prob"], abs=1e-5)
    for line in of(done, "best-of-n", n=3):
        assert (line["kl"], line["kl_at_most"]) == (None, pytest.approx(math.log(3) - 2 / 3))
    for line in of(done, "cd"):
        rounds = -(-line["tokens"] // 16)
        assert line["kl_at_most"] == pytest.approx(rounds * (math.log(2) - 1 / 2), abs=1e-5)
    for line in of(done, "ppo-mcts"):
        # The most visited token, without a draw.
        assert line["kl"] == -line["log_prob"]


def rewards(folder, name, **settings):
    """Of each prompt, the mean over seeds."""
    own = of(folder, name, **settings)
    seeds = {line["seed"] for line in own}
    return np.mean([[x["reward"] for x in own if x["seed"] == seed] for seed in seeds], axis=0)


def test_figures_are_those_of_the_responses(done):
    rows = json.loads((done / "summary.json").read_text())["settings"]
    with open(done / "settings.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["name"] for row in written] == [row["name"] for row in rows]
    plain = rewards(done, "plain")
    p_values = []
    for row in rows:
        settings = {"beta": 3.0} if "beta 3" in row["settings"] else {}
        settings |= {"beta": 10.0} if "beta 10" in row["settings"] else {}
        own, values = of(done, row["name"], **settings), rewards(done, row["name"], **settings)
        interval = bootstrap_of_rewards(values)
        assert row["quality"] == pytest.approx(values.mean(), abs=1e-6)
        assert row["quality_low"] == pytest.approx(interval.low, abs=1e-6)
        assert row["quality_high"] == pytest.approx(interval.high, abs=1e-6)
        costs = [line["cost"]["policy_tokens"] + line["cost"]["scorer_tokens"] for line in own]
        assert row["forwarded_tokens"] == pytest.approx(fmean(costs), abs=1e-5)
        drawn = [line["cost"]["prompt_tokens"] + line["cost"]["generated_tokens"]
                 + line["cost"]["scorer_tokens"] for line in own]  # fmt: skip
        assert row["drawn_tokens"] == pytest.approx(fmean(drawn), abs=1e-5)
        if row["name"] == "plain":
            assert row["over_plain"] is None
            continue
        assert row["over_plain"] == pytest.approx((values - plain).mean(), abs=1e-6)
        assert row["p"] == pytest.approx(sign_flip_test(values - plain), abs=1e-6)
        p_values.append(row["p"])
    corrected = [row["p_holm"] for row in rows if row["p_holm"] is not None]
    assert corrected == pytest.approx(holm(p_values), abs=1e-5)


def test_the_page_has_every_setting_and_the_pictures(again):
    done = again[0]
    page = (done / "report.md").read_text()
    for text in ("| guide | critic | beta 10 |", "| ppo-mcts | critic |", "At most 2 × plain",
                 "![pareto tokens](pareto_tokens.png)"):  # fmt: skip
        assert text in page
    for axis in ("kl", "tokens", "seconds"):
        assert (done / f"pareto_{axis}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (done / f"pareto_{axis}.svg").read_bytes()
    # Nobody's clock stands in what has to be the same.
    assert "seconds" not in (done / "settings.csv").read_text()
    with open(done / "clock.csv", newline="") as file:
        assert all(float(row["seconds_per_answer"]) > 0 for row in csv.DictReader(file))


def test_a_second_run_computes_nothing_and_writes_the_same(again):
    done, before, files, clock = again
    assert units(done) == before
    assert (done / "clock.csv").read_bytes() == clock
    # The page has the pictures, which the first run did not draw.
    pictures = {f"pareto_{axis}.{ending}" for axis in ("kl", "tokens") for ending in ("png", "svg")}
    after = final_files(done)
    assert set(after) == {*files, *pictures}
    page = files.pop("report.md")
    assert after["report.md"].startswith(page)
    assert {name: after[name] for name in files} == files


def test_a_larger_grid_computes_what_is_new_alone(config, again, tmp_path, monkeypatch):
    done = again[0]
    given = yaml.safe_load(config.read_text())
    given["methods"] = [{"method": "guide", "beta": [3, 7], "top_k": 4}]
    given["reward"] = {"kind": "regex", "pattern": "Answer: {answer}$"}
    before, rewarded = units(done), {path.name for path in (done / "rewards").iterdir()}
    plan = ablate(ablations.write(tmp_path / "more.yaml", given), "--dry-run", "--output", done)
    # Plain and beta 3 are there: two settings of three, in two blocks, with two seeds.
    assert "12 units of at most 2 prompts, 8 of them done already" in plan.stdout
    # To rich a terminal, where somebody looks.
    monkeypatch.setenv("FORCE_COLOR", "1")
    bar = re.sub(r"\x1b\[[\d;?]*\w", "", ablate(
        tmp_path / "more.yaml", "--output", done, "--no-plots").stderr)  # fmt: skip
    assert "12 of 12 units judged" in bar
    assert re.search(r"left \d:\d\d:\d\d", bar)
    after = units(done)
    assert len(after) == len(before) + 4
    assert before.items() <= after.items()
    assert len({path.name for path in (done / "rewards").iterdir()}) == len(rewarded) + 12


def test_a_response_that_is_given_up_is_the_plain_one_up_to_there(tmp_path):
    """By brute force: the value of each of its beginnings, from nothing."""
    quits = {"beta": 0, "tail": "keep", "abstain": [0.1, 0.3], "abstain_after": 5}
    given = ablation(
        methods=[{"method": "guide", "temperature": 0, **quits}], seeds=[0],
        prompts={"embedded": "tiny-tulu", "limit": 6},
    )  # fmt: skip
    file = ablations.write(tmp_path / "small.yaml", given)
    ablate(file, "--output", tmp_path / "out", "--no-plots")
    tokenizer = AutoTokenizer.from_pretrained(tiny_tulu.model_path("sft"))
    policy = AutoModelForCausalLM.from_pretrained(tiny_tulu.model_path("sft"), dtype=torch.float32)
    critic = load_scorer("tiny-tulu-value", policy_tokenizer=tokenizer)
    ended = set()
    for line in of(tmp_path / "out", "guide"):
        chat = tiny_tulu.render(line["prompt"])
        prompt = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
        whole = policy.generate(prompt, do_sample=False, max_new_tokens=56)[0].tolist()
        width = prompt.shape[1]
        lengths = range(width + 5, len(whole) + (whole[-1] != tokenizer.eos_token_id))
        values = critic.score([whole[:n] for n in lengths], torch.empty(len(lengths), 0).long())
        low = (values.baseline < line["settings"]["abstain"]).nonzero().flatten().tolist()
        expected = lengths[low[0]] - width if low else len(whole) - width
        response = tokenizer.decode(whole[width : width + expected], skip_special_tokens=True)
        assert (line["tokens"], line["response"]) == (expected, response)
        assert (line["ended"] == "abstained") == bool(low)
        assert line["kl"] == -line["log_prob"]
        assert line["cost"]["generated_tokens"] == expected
        ended.add(line["ended"])
    assert ended == {"eos", "abstained"}


def test_a_second_process_on_a_folder_is_refused(config, tmp_path):
    with Store(tmp_path / "out"):
        said = refused(config, "--output", tmp_path / "out")
    assert "out is being written by another process: let it end, or pass another folder" in said


def test_a_trial_has_so_many_prompts(config):
    plan = ablate(config, "--limit", 3, "--dry-run").stdout
    assert "7 settings, 3 prompts, 24 units of at most 2 prompts; nothing was run" in plan


def test_the_example_of_init_is_read_as_it_is(tmp_path):
    text = ablate("--init").stdout
    file = ablations.write(tmp_path / "example.yaml", text)
    plan = ablate(file, "--dry-run", "--output", tmp_path / "out").stdout
    assert "8 settings, 20 prompts, 30 units" in plan
