"""`guided-decode plan`: what it prints, its JSON, its commands, and what it refuses."""

import json
import re
import shlex

import pytest
import typer
from typer.testing import CliRunner

from guided_decode.checkpoints.plan.cards import find_card
from guided_decode.checkpoints.plan.footprint import Workload
from guided_decode.checkpoints.plan.placement import make_plan
from guided_decode.checkpoints.plan.ways import USABLE
from guided_decode.checkpoints.plan.weight_forms import FORMS
from guided_decode.cli.app import app
from guided_decode.cli.plan_commands import commands
from tests.documentation import vllm_checks

POLICY = "allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm"
CRITIC = f"{POLICY}-value"
LARGE = ("allenai/llama-3.1-tulu-2-70b", "allenai/llama-3.1-tulu-2-70b-uf-mean-rm")


def run(*args):
    return CliRunner().invoke(app, ["plan", *args], env={"COLUMNS": "120"})


def printed(*args):
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def fields(*args):
    return json.loads(printed(*args, "--json"))


def test_the_table_says_what_fits_and_the_way_to_take_comes_with_its_commands():
    text = printed(POLICY, CRITIC)
    lines = text.splitlines()
    assert re.search(r"13.02B weights, 24.2 GiB in bf16, KV 0.78 MiB a token", text)
    assert re.search(r"68.71B weights, 128.0 GiB in bf16, KV 0.31 MiB a token", text)
    assert "79.1 GiB, 72.8 of them used; the 1.94 TB/s of A100 PCIe 80GB" in text
    rows = {line.split("  ")[0]: line.split() for line in lines if " GPU" in line or "bf16" in line}
    assert "no" in rows["bf16 beside the policy"]
    (four,) = [line for line in lines if line.startswith("bnb-4bit beside the policy")]
    assert "yes" in four.split()
    assert "Take: bnb-4bit beside the policy." in lines
    typed = [line.strip() for line in lines if line.startswith("  ")]
    assert len(typed) == 2
    generate, serve = typed
    assert generate.startswith(f"guided-decode generate --policy {POLICY} --scorer {CRITIC} ")
    assert "--quantization bnb-4bit" in generate
    assert "--cache-tokens 2064" in generate
    assert serve.startswith(f"guided-decode serve {POLICY} --scorer {CRITIC} ")
    assert "--scorer-quantization bnb-4bit" in serve
    assert "--max-num-seqs 1 --max-model-len 2048" in serve
    assert "8% of a card goes to CUDA" in text
    assert USABLE == 0.92


def test_the_floor_of_a_step_stands_below_the_table():
    text = printed(POLICY, CRITIC, "--gpu", "H100")
    (line,) = [line for line in text.splitlines() if line.startswith("A guided step takes")]
    plan = make_plan(POLICY, CRITIC, find_card("H100"), Workload())
    assert f"at least {plan.take.seconds * 1e3:.3g} ms" in line
    assert f"a plain one {plan.plain_seconds * 1e3:.3g} ms" in line
    assert f"{plan.take.unpacked_seconds * 1e3:.3g} ms where its library unpacks" in line


def test_a_narrow_terminal_costs_no_figures():
    result = CliRunner().invoke(app, ["plan", POLICY, CRITIC], env={"COLUMNS": "20"})
    assert "…" not in result.stdout
    assert "33.4" in result.stdout or "61.1" in result.stdout


def test_json_has_bytes_and_the_parts_add_up():
    plan = fields(POLICY, CRITIC, "--batch", "2", "--length", "1024", "--top-k", "8", "--gpus", "4")
    assert plan["work"] == {"batch": 2, "length": 1024, "top_k": 8, "cache_tokens": 2 * 1032}
    assert plan["policy"]["parameters"] == 13_015_864_320
    assert plan["scorer"]["kind"] == "ppo-critic"
    assert plan["scorer"]["models"][0]["weight_bytes"] == 2 * 68_714_512_385
    assert plan["gpu"]["count"] == 4
    for way in plan["ways"]:
        for gpu in way["placement"]:
            parts = [*gpu["policy"].values(), *gpu["scorer"].values()]
            assert gpu["bytes"] == sum(parts)
        fullest = max(gpu["bytes"] for gpu in way["placement"])
        assert way["fits"] == (fullest <= plan["gpu"]["usable_bytes"])
        assert (way["rows"] >= 2) == way["fits"]
        assert {one["for"] for one in way["commands"]} >= {"generate", "vllm"}
    taken = plan["ways"][plan["take"]]
    assert (taken["way"], taken["form"], taken["gpus"]) == ("tensor-parallel", "bf16", 3)
    assert plan["enough_gpus"]


def test_what_does_not_fit_says_what_would():
    result = run(*LARGE, "--gpu", "10GB")
    assert result.exit_code == 0
    assert "Nothing fits GPUs of 10GB, however many of them." in result.stdout
    assert re.search(r"Smallest on 8 cards: bf16, tensor parallel over 8, the policy too, which "
                     r"needs 39\.\d GiB of each", result.stdout)  # fmt: skip
    assert re.search(r"Smallest on one card: bnb-4bit beside the policy, which needs 18\d\.\d GiB",
                     result.stdout)  # fmt: skip
    plan = fields(*LARGE, "--gpu", "10GB")
    assert plan["take"] is None
    smallest = plan["ways"][plan["smallest"]]
    assert smallest["scorer_shards"] == smallest["policy_shards"] == 8
    larger = fields(*LARGE, "--gpu", f"{plan['smallest_card_bytes'] / 1e9 + 0.1:.1f}GB")
    assert larger["ways"][larger["take"]]["gpus"] == 8


def test_more_gpus_than_there_are_is_said_in_words():
    text = printed(*LARGE)
    assert ("Nothing fits 1 GPU of 80GB. The smallest that does takes 3: "
            "bnb-8bit on a GPU of its own, the policy over 2.") in text  # fmt: skip


def test_another_machine_is_named_where_this_one_has_too_few_gpus():
    lines = printed(POLICY, CRITIC, "--gpu", "L40S").splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith("Nothing fits 1 GPU of L40S")]
    assert lines[first].endswith("takes 2: bnb-4bit on a GPU of its own.")
    (other,) = [i for i, line in enumerate(lines) if line.startswith("Or: ")]
    assert lines[other] == "Or: bnb-4bit on another machine."
    typed = lines[other + 1 :]
    assert typed[0] == "  # on SCORER_HOST"
    assert typed[1] == "  guided-decode scorer --new-key scorer.key"
    assert typed[3] == "  # here, with scorer.key.client from SCORER_HOST"
    assert "--scorer tcp://SCORER_HOST:7070" in typed[4]
    # With two GPUs there is nothing to add.
    assert "Or: " not in printed(POLICY, CRITIC, "--gpu", "L40S", "--gpus", "2")


def test_a_card_of_unknown_speed_has_no_floor():
    text = printed(POLICY, CRITIC, "--gpu", "100GB")
    assert "bandwidth not known" in text
    assert "A guided step takes" not in text
    assert "A guided step takes" in printed(POLICY, CRITIC, "--gpu", "100GB", "--bandwidth", "2")
    assert fields(POLICY, CRITIC, "--gpu", "100GB")["plain_floor_seconds"] is None


def test_a_server_on_another_machine_is_started_there(monkeypatch):
    """Of two cards of 48 GB the one takes the policy, the other, elsewhere, four bits."""
    plan = make_plan(POLICY, CRITIC, find_card("L40S"), Workload())
    (served,) = [one for one in plan.placements if one.way.place == "served"]
    key, start, generate, serve = commands(plan, served)
    assert key.there
    assert start.there
    assert not generate.there
    assert key.words == ("guided-decode", "scorer", "--new-key", "scorer.key")
    assert "--listen tcp://0.0.0.0:7070 --key-file scorer.key" in str(start)
    for command in (generate, serve):
        assert "--scorer tcp://SCORER_HOST:7070 --key-file scorer.key.client" in str(command)
        assert "--quantization" not in command.words


def test_a_sharded_critic_and_a_sharded_policy_have_their_gpus():
    plan = make_plan(*LARGE, find_card("80GB"), Workload(), gpus=4)
    ways = {(one.way.shards, one.way.beside): one for one in plan.placements}
    start, serve = commands(plan, ways[4, True])
    assert start.words[:6] == ("torchrun", "--nproc-per-node", "4", "-m", "guided_decode", "scorer")
    assert start.words[6:11] == (LARGE[1], "--tp-plan", "auto", "--dtype", "bfloat16")
    assert start.environment == {}
    assert serve.environment == {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    share = float(serve.words[serve.words.index("--gpu-memory-utilization") + 1])
    held = ways[4, True].gpus[0]
    assert held.policy.total < share * plan.card.bytes < plan.card.bytes - held.scorer.total
    # The critic has two of its own, the policy the other two.
    start, serve = commands(plan, ways[2, False])
    assert start.environment == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert serve.environment == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert serve.words[-2:] == ("--tensor-parallel-size", "2")


def test_commands_say_what_the_plan_was_told_of_the_scorer():
    plan = make_plan(POLICY, "tulu-2-13b", find_card("80GB"), Workload(4), kind="implicit",
                     reference="tulu-2-13b")  # fmt: skip
    generate, serve = commands(plan, plan.placements[0])
    for command in (generate, serve):
        assert "--kind implicit --reference tulu-2-13b" in str(command)
    # Greedy answers would be four times the same.
    assert "--num-samples 4 --temperature 1" in str(generate)
    assert str(plan.work.cache_tokens) in generate.words


def unknown_words(command):
    """The command's name and its options that nothing here would read."""
    words = list(command.words)
    own = typer.main.get_command(app).commands
    name = words[words.index("-m") + 2] if "-m" in words else words[1]
    if name not in own:
        return {name}
    known = {option for parameter in own[name].params for option in parameter.opts}
    known |= vllm_checks.options() if name == "serve" else set()
    return {word for word in words[words.index(name) :] if word.startswith("--")} - known


@pytest.mark.parametrize("pair", [(POLICY, CRITIC), LARGE, ("tiny-tulu-sft", "tiny-tulu-ppo")])
@pytest.mark.parametrize("gpu", ["80GB", "24GB"])
def test_the_options_of_commands_are_there(pair, gpu):
    vllm_checks.require()
    plan = make_plan(*pair, find_card(gpu), Workload(2))
    for command in [one for placed in plan.placements for one in commands(plan, placed)]:
        assert tuple(shlex.split(str(command))[-len(command.words) :]) == command.words
        assert unknown_words(command) == set(), command


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), r"Missing argument"),
        ((POLICY,), r"Missing argument"),
        (("no/such", CRITIC), r"no/such is not in the registry, and a plan fetches nothing"),
        ((CRITIC, POLICY), r"does not say what kind of scorer|a policy is a causal LM"),
        ((POLICY, CRITIC, "--gpu", "GPU"), r"--gpu GPU: expected a size, 80GB, or one of H100"),
        ((POLICY, CRITIC, "--quantization", "int3"), r"--quantization int3: expected one of bnb"),
        ((POLICY, CRITIC, "--batch", "0"), r"--batch"),
        ((POLICY, CRITIC, "--bandwidth", "-1"), r"--bandwidth.*above 0"),
        ((POLICY, CRITIC, "--kind", "oracle"), r"kind 'oracle': expected one of ppo-critic"),
        ((POLICY, "tulu-2-13b"), r"pass --kind, as load_scorer takes it, or --reference for"),
    ],
)
def test_bad_input_is_one_line(args, message):
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr), result.stderr


def test_help_names_the_forms():
    text = printed("--help")
    assert all(name in text for name in FORMS)
