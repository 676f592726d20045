"""Errors speak of what the reader can type, and options reach `load_scorer`."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from guided_decode.cli.app import app
from guided_decode.cli.flags import flags_of, in_flags
from guided_decode.scoring.trunk_head import TrunkHead, save_trunk_head

COMMANDS = typer.main.get_command(app).commands


def run(*args):
    return CliRunner().invoke(app, list(map(str, args)))


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("top_k=None was given", "--top-k 0 was given"),
        ("margin=0.5 came with rule=\"reweight\"; pass rule='prune'",
         "--margin 0.5 came with --rule reweight; pass --rule prune"),
        ("it could be classifier; pass kind=", "it could be classifier; pass --kind"),
        ("pass rope_theta=10000, or", "pass --rope-theta 10000, or"),
        ("or pass allow_pickle=True if", "or pass --allow-pickle if"),
        ("pass load_scorer(..., reference=...)", "pass --reference"),
        ("without a head: pass head=, a value head", "without a head: pass --head, a value head"),
        ("gate=None, k=3 and end='turn'", "gate=None, k=3 and end='turn'"),
    ],
)  # fmt: skip
def test_arguments_are_spoken_of_as_flags(message, typed):
    assert in_flags(message, flags_of(COMMANDS["generate"])) == typed


def test_a_scorers_dtype_is_the_flag_that_a_command_has_for_it():
    assert in_flags("dtype='int8'", flags_of(COMMANDS["serve"])) == "--scorer-dtype int8"
    assert in_flags("dtype='int8'", flags_of(COMMANDS["generate"])) == "--dtype int8"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bos", "eat"], "--bos eat: expected one of keep, drop"),
        (["--terminal", "bonus"], "--terminal bonus: expected one of baseline"),
        (["--transform", "cube"], "cube"),
        (["--rope-theta", "-1"], "--rope-theta -1.0: expected a finite number above 0"),
        (["--kind", "trunk-head"], "without a head: pass --head"),
        (["--head", "/no/such"], "/no/such: no such folder"),
        (["--reward", "/no/such"], "/no/such: no such folder"),
        (["--reference", "tiny-tulu-sfx"], "tiny-tulu-sfx: unknown model"),
        (["--kl-coef", "1"], "pass --reference"),
        (["--baseline", "median"], "--baseline median: expected"),
        (
            ["--policy", "tiny-tulu-sft", "--scorer", "tiny-tulu-ppo", "--bos", "drop"],
            "--bos came with an implicit reward",
        ),
    ],
)
def test_generate_refuses(args, message):
    result = run("generate", "--prompt", "2+2?", *args)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert message in result.stderr


def test_options_reach_the_scorer(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": "2+2?", "response": "4"}) + "\n")
    given = ("--per-token", "--terminal", "critic", "--transform", "sigmoid")
    result = run("score", source, output, *given)
    assert result.exit_code == 0, result.output
    line = json.loads(output.read_text())
    # Under this rule EOS has a value; a sigmoid's lies between 0 and 1.
    assert None not in line["values"]
    assert all(0 < value < 1 for value in line["values"])


def test_a_head_on_the_policys_own_hidden_states_guides(tmp_path):
    head = tmp_path / "head.safetensors"
    save_trunk_head(head, TrunkHead(torch.randn(1, 128), None))
    answers = [
        run("generate", "--prompt", "4+4?", "--max-new-tokens", "8", "--json", "--head", head, *own)
        for own in ([], ["--scorer", "tiny-tulu-sft"], ["--beta", "0"])
    ]
    assert all(answer.exit_code == 0 for answer in answers), [a.output for a in answers]
    texts = [json.loads(answer.stdout)["text"] for answer in answers]
    assert texts[0] == texts[1] != texts[2]
