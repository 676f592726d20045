"""`guided-decode score`: the rows it takes, what it passes on, and what it does when one fails."""

import fcntl
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.cli.app import app

CHAT = {"prompt": "2+2?", "response": "4"}


def score(*args, stdin=None):
    return CliRunner().invoke(app, ["score", *map(str, args)], input=stdin)


def scored(*args, code=0, **options):
    result = score(*args, **options)
    assert result.exit_code == code, result.output
    return result


def write(path, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def turns(*contents):
    roles = ("user", "assistant") * 2
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def copy_of(part, folder):
    shutil.copytree(tiny_tulu.model_path(part), folder)
    return folder


def test_rows_of_trl_and_rewardbench_are_scored_as_ours(tmp_path):
    right, wrong = turns("2+2?", "4"), turns("2+2?", "5")
    rows = [
        CHAT,
        {"messages": right},
        {"prompt": "2+2?", "completion": "4", "label": True},
        {"prompt": right[:1], "completion": right[1:]},
        {"prompt": "2+2?", "chosen": "4", "rejected": "5", "subset": "sums", "id": 7},
        {"prompt": right[:1], "chosen": right[1:], "rejected": wrong[1:]},
        {"chosen": right, "rejected": wrong},
        # As UltraFeedback has it: the prompt is in both conversations, too.
        {"prompt": "2+2?", "chosen": right, "rejected": wrong, "messages": right,
         "score_chosen": 8.5, "score": 3},
        {"prompt": "2+2?", "chosen": ["4"], "rejected": ["5", "6"]},
    ]  # fmt: skip
    source, output = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    scored(source, output, "--batch-size", 4)
    lines = read(output)
    good = lines[0]["score"]
    bad = lines[4]["rejected"]["score"]
    assert good != bad
    assert [line["score"] for line in lines[:4]] == pytest.approx([good] * 4, abs=2e-6)
    assert lines[2]["label"] is True
    for line in lines[4:8]:
        assert line["chosen"]["score"] == pytest.approx(good, abs=2e-6)
        assert line["rejected"]["score"] == pytest.approx(bad, abs=2e-6)
    assert (lines[4]["subset"], lines[4]["id"]) == ("sums", 7)
    # What the output says itself is not mixed with what the input said.
    assert (lines[7]["score_chosen"], lines[7]["input"]) == (8.5, {"score": 3})
    assert "score" not in lines[7]
    assert [len(lines[8][side]) for side in ("chosen", "rejected")] == [1, 2]
    assert lines[8]["rejected"][0]["score"] == pytest.approx(bad, abs=2e-6)


def test_it_reads_stdin_and_writes_stdout(tmp_path):
    source, output = write(tmp_path / "in.jsonl", CHAT, CHAT), tmp_path / "out.jsonl"
    scored(source, output)
    result = scored("-", "-", stdin=source.read_text())
    assert result.stdout == output.read_text()
    assert "2 chats are scored in stdout" in result.stderr


def test_a_mark_at_the_files_beginning_changes_nothing(tmp_path):
    source, output = write(tmp_path / "in.jsonl", CHAT), tmp_path / "out.jsonl"
    scored(source, output)
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    before = output.read_bytes()
    scored(source, output)
    assert output.read_bytes() == before


def test_rows_that_fail_are_skipped_when_asked(tmp_path):
    long = {"prompt": "2+2?", "response": "4" * 600, "id": "long"}
    rows = [CHAT, long, "{broken", {"prompt": "no answer"}, CHAT]
    source, output = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    result = scored(source, output, "--on-error", "skip", code=1)
    lines = read(output)
    assert ["score" in line for line in lines] == [True, False, False, False, True]
    assert lines[1]["id"] == "long"
    assert "positions" in lines[1]["error"]
    assert f"{source}, line 3 cannot be scored: not JSON" in result.stderr
    assert f"{source}, line 4 cannot be scored: expected a chat that ends" in result.stderr
    assert "3 of 5 could not be scored" in result.stderr
    assert "Traceback" not in result.stderr
    # Nothing is left to do, and the exit code still says that something failed.
    done = output.read_bytes()
    assert "3 of 5" in scored(source, output, "--on-error", "skip", code=1).stderr
    assert output.read_bytes() == done


def test_what_is_skipped_is_said_in_flags(tmp_path):
    long = {"prompt": "2+2?", "response": "4" * 60}
    source, output = write(tmp_path / "in.jsonl", CHAT, long), tmp_path / "out.jsonl"
    result = scored(source, output, "--on-error", "skip", "--cache-tokens", 64, code=1)
    assert "line 2 cannot be scored: --cache-tokens 64 is too small for one row" in result.stderr
    assert read(output)[1]["error"].startswith("--cache-tokens 64 is too small for one row")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "\\ud800", "response": "b"}', r"half a character, '\ud800'"),
        ('{"prompt": "a", "response": "b", "id": NaN}', "NaN is no JSON number"),
        ('{"prompt": "a", "response": "b", "id": 1e999}', "not JSON (Out of range"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"chosen": "a", "rejected": "b"}', "chosen: expected a chat that ends"),
        ('{"prompt": "a", "chosen": 3, "rejected": "b"}', "chosen: message 1 has the content 3"),
    ],
    ids=["surrogate", "nan", "infinity", "depth", "no-prompt", "number"],
)
def test_what_cannot_be_written_again_is_refused_by_its_line(tmp_path, row, message):
    source, output = write(tmp_path / "in.jsonl", CHAT, row), tmp_path / "out.jsonl"
    result = scored(source, output, code=2)
    assert result.stderr.startswith(f"error: {source}, line 2: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not output.exists()


def test_text_in_latin_1_is_refused_by_its_line(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(json.dumps(CHAT).encode() + b'\n{"prompt": "na\xefve"}\n')
    result = scored(source, tmp_path / "out.jsonl", code=2)
    assert f"{source}, line 2: not UTF-8 text" in result.stderr


def test_a_template_that_raises_costs_its_own_line_only(tmp_path):
    critic = copy_of("value", tmp_path / "own")
    (critic / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if loop.index0 % 2 == 0 and m.role != 'user' %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    system = {"messages": [{"role": "system", "content": "x"}, *turns("a", "b")[1:]]}
    source, output = write(tmp_path / "in.jsonl", CHAT, system), tmp_path / "out.jsonl"
    own = (source, output, "--scorer", critic, "--kind", "ppo-critic")
    result = scored(*own, code=2)
    assert f"{source}, line 2 cannot be scored: the tokenizer's chat template refuses it: " in (
        result.stderr
    )
    assert "roles must alternate" in result.stderr
    assert len(read(output)) == 1
    scored(*own, "--on-error", "skip", code=1)
    assert len(read(output)) == 2


def test_files_that_did_not_arrive_whole_are_one_line(tmp_path):
    source, output = write(tmp_path / "in.jsonl", CHAT), tmp_path / "out.jsonl"
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    damages = {
        "model.safetensors": (pointer, ""),
        "tokenizer.json": (b'{"version": 1}', "one of its files lacks 'added_tokens'"),
        "config.json": (b'{"model_type": "llama", "hidden_size": "abc"}', "hidden_size"),
    }
    for i, (name, (contents, message)) in enumerate(damages.items()):
        critic = copy_of("value", tmp_path / str(i))
        (critic / name).write_bytes(contents)
        result = scored(source, output, "--scorer", critic, "--kind", "ppo-critic", code=2)
        assert result.stderr.count("\n") == 1
        assert str(critic) in result.stderr
        assert message in result.stderr
        policy = generated("--policy", critic, "--scorer", "tiny-tulu-value")
        assert str(critic) in policy.stderr
        assert not output.exists()


def generated(*args):
    result = CliRunner().invoke(app, ["generate", "--prompt", "a", *map(str, args)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    return result


def test_a_score_that_is_no_number_is_refused_by_its_line(tmp_path):
    critic = copy_of("value", tmp_path / "own")
    weights = load_file(critic / "model.safetensors")
    # Finite weights whose product is not.
    weights["score.weight"] = torch.full_like(weights["score.weight"], 3e38)
    save_file(weights, critic / "model.safetensors", metadata={"format": "pt"})
    source, output = write(tmp_path / "in.jsonl", CHAT), tmp_path / "out.jsonl"
    result = scored(source, output, "--scorer", critic, "--kind", "ppo-critic", code=2)
    assert f"{source}, line 1 cannot be scored" in result.stderr
    assert not output.exists()


def test_an_empty_input_is_said_to_be_empty(tmp_path):
    source = write(tmp_path / "in.jsonl", "", " ")
    assert "in.jsonl holds no chat" in scored(source, tmp_path / "out", code=2).stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_devices_are_neither_read_for_ever_nor_continued(tmp_path):
    source = write(tmp_path / "in.jsonl", CHAT)
    assert "no regular file" in scored(source, "/dev/full", code=2).stderr
    result = scored("/dev/zero", tmp_path / "out", code=2)
    assert "/dev/zero, line 1: more than 16 MiB" in result.stderr


def test_another_dtype_or_other_weights_are_not_mixed_in(tmp_path):
    critic = copy_of("value", tmp_path / "own")
    source, output = write(tmp_path / "in.jsonl", CHAT), tmp_path / "out.jsonl"
    own = ("--scorer", critic, "--kind", "ppo-critic")
    scored(source, output, *own)
    before = output.read_bytes()
    # The same, said otherwise: what auto is on a CPU, and what costs more or less.
    scored(source, output, *own, "--dtype", "float32", "--device", "cpu", "--cache-tokens", 600)
    weights = load_file(critic / "model.safetensors")
    for change in (["--dtype", "bfloat16"], ["--bos", "keep"], ["--terminal", "critic"],
                   ["--transform", "sigmoid"], ["--prompt-format", "tulu-2"]):  # fmt: skip
        result = scored(source, output, *own, *change, code=2)
        assert "line 1: made from another input or with other settings" in result.stderr
    weights["score.weight"] = weights["score.weight"] + 0.01
    save_file(weights, critic / "model.safetensors", metadata={"format": "pt"})
    assert "other weights under its name" in scored(source, output, *own, code=2).stderr
    assert output.read_bytes() == before


def test_overwrite_empties_nothing_before_the_scorer_is_loaded(tmp_path):
    source, output = write(tmp_path / "in.jsonl", CHAT), tmp_path / "out.jsonl"
    scored(source, output)
    before = output.read_bytes()
    broken = copy_of("value", tmp_path / "own")
    (broken / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for scorer in ("/no/such", broken):
        result = scored(source, output, "--overwrite", "--scorer", scorer, "--kind", "ppo-critic",
                        code=2)  # fmt: skip
        assert str(scorer) in result.stderr
        assert output.read_bytes() == before
    scored(source, output, "--overwrite", "--per-token")
    assert "values" in read(output)[0]


def test_the_second_run_on_one_output_is_refused(tmp_path):
    source, output = write(tmp_path / "in.jsonl", CHAT), tmp_path / "out.jsonl"
    with open(output, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for more in ([], ["--overwrite"]):
            result = scored(source, output, *more, code=2)
            assert f"{output} is being written by another run" in result.stderr
    scored(source, output)
    assert len(read(output)) == 1


def test_an_output_that_another_run_took_away_is_not_written_to(tmp_path, monkeypatch):
    """It had created it, ended with nothing, and removed it while this one opened it."""
    source, output = write(tmp_path / "in.jsonl", CHAT), tmp_path / "out.jsonl"
    output.touch()
    lock = fcntl.flock

    def too_late(file, how):
        output.unlink(missing_ok=True)
        return lock(file, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    result = scored(source, output, code=2)
    assert f"{output} was removed by another run just now" in result.stderr


def test_the_prompt_format_can_be_chosen(tmp_path):
    source = write(tmp_path / "in.jsonl", CHAT)
    by_format = {}
    for name in ("tulu-2", "tulu-3", "halos", "template"):
        output = tmp_path / f"{name}.jsonl"
        scored(source, output, "--prompt-format", name)
        by_format[name] = read(output)[0]["score"]
    # tiny-tulu's own is tulu-3, as its record and its template say.
    assert by_format["tulu-3"] == by_format["template"] != by_format["halos"]
    result = scored(source, tmp_path / "out", "--prompt-format", "tulu-9", code=2)
    assert "--prompt-format tulu-9: expected one of tulu-2" in result.stderr
