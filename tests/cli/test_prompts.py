"""The prompts of `guided-decode generate`: where they come from, and what one that fails costs."""

import builtins
import json
import shutil

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.cli.app import app

PROMPT = "What is 4785 + 5426?"
SHORT = ("--max-new-tokens", 4)


def generate(*args, code=0, **options):
    result = CliRunner().invoke(app, ["generate", *map(str, args)], **options)
    assert result.exit_code == code, result.output
    return result


def test_a_mark_at_a_prompts_beginning_changes_no_answer(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbf" + PROMPT.encode())
    answer = generate("--prompt", PROMPT).stdout
    assert generate("--file", file).stdout == answer
    assert generate(input=file.read_bytes()).stdout == answer


@pytest.mark.parametrize("args", [["--prompt", "a \udcff b"], ["--raw", "--prompt", "\ud800"]])
def test_text_that_is_no_text_is_refused(args):
    assert "which is no character" in generate(*args, code=2).stderr


def test_a_pipe_in_another_encoding_is_refused():
    result = generate(input="naïve".encode("latin-1"), code=2)
    assert result.stderr == "error: stdin: not UTF-8 text (invalid continuation byte)\n"


def test_a_device_is_not_read_for_ever():
    assert "/dev/zero: more than 16 MiB" in generate("--file", "/dev/zero", code=2).stderr


@pytest.mark.parametrize(
    "args",
    [("--temperature", "1e-40"), ("--temperature", "1e300"), ("--seed", 10**30),
     ("--seed", -(2**64)),
     ("--max-new-tokens", 10**30), ("--num-samples", 10**30, "--temperature", 1),
     ("--cache-tokens", 10**30), ("--cache-tokens", 2**31 - 1), ("--top-k", 10**30),
     ("--beta", "1e400"), ("--max-forward-tokens", -1)],
    ids=lambda args: " ".join(map(str, args[:2])),
)  # fmt: skip
def test_numbers_beyond_all_bounds_are_one_line(args):
    result = generate("--prompt", "4+4?", *SHORT, *args, code=2)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert args[0] in result.stderr or "Invalid value" in result.stderr


@pytest.mark.parametrize("args", [("--temperature", 1e-6), ("--seed", 2**64 - 1), ("--seed", -5)])
def test_numbers_at_the_bounds_are_taken(args):
    given = args if "--temperature" in args else (*args, "--temperature", 1)
    assert generate("--prompt", "4+4?", *SHORT, *given).stdout


@pytest.fixture
def chats(tmp_path):
    file = tmp_path / "chats.jsonl"
    rows = [PROMPT, "4" * 600, PROMPT]
    file.write_text("".join(json.dumps({"prompt": text, "n": 1}) + "\n" for text in rows))
    return file


def test_a_chat_that_fails_while_decoding_is_named_by_its_line(chats):
    result = generate("--file", chats, "--json", *SHORT, code=2)
    assert result.stderr.startswith(f"error: {chats}, line 2: ")
    assert "positions" in result.stderr
    assert [json.loads(line)["line"] for line in result.stdout.splitlines()] == [1]


def test_the_others_are_answered_when_asked(chats):
    with chats.open("a") as file:
        file.write("{broken\n")
    result = generate("--file", chats, "--json", "--on-error", "skip", *SHORT, code=1)
    assert [json.loads(line)["line"] for line in result.stdout.splitlines()] == [1, 3]
    assert f"error: {chats}, line 2: " in result.stderr
    assert f"error: {chats}, line 4: not JSON" in result.stderr
    assert result.stderr.endswith("error: 2 prompts have no answer\n")


def test_an_empty_file_of_chats_is_said_to_be_empty(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n")
    assert "chats.jsonl holds no prompt" in generate("--file", file, code=2).stderr


def test_a_typed_prompt_that_fails_does_not_end_the_session(monkeypatch):
    typed = iter(["4" * 600, "\udcff", "", PROMPT])

    def answer(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr("guided_decode.cli.prompts_in.sys", AtATerminal)
    result = generate()
    assert tiny_tulu.is_correct(PROMPT, result.stdout.strip())
    assert "positions" in result.stderr
    assert "which is no character" in result.stderr


class AtATerminal:
    class stdin:
        @staticmethod
        def isatty():
            return True


@pytest.fixture
def kto_pair(tmp_path):
    """The registered KTO policy as a scorer, whose policy has another template; both tiny-tulu."""
    policy, scorer = tmp_path / "instruct", tmp_path / "Contextual_KTO_Mistral_PairRM"
    shutil.copytree(tiny_tulu.model_path("sft"), policy)
    shutil.copytree(tiny_tulu.model_path("ppo"), scorer)
    (policy / "chat_template.jinja").write_text(
        "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    )
    return ("--policy", policy, "--scorer", scorer, "--reference", "tiny-tulu-sft")


def test_a_scorer_of_another_prompt_format_is_warned_of(kto_pair):
    result = generate("--prompt", "4+4?", *SHORT, *kto_pair)
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("warning: ")
    assert "was trained on the tulu-2 format and reads prompts in the policy's own chat" in (
        result.stderr
    )
    assert "pass --prompt-format tulu-2" in result.stderr
    result = generate("--prompt", "4+4?", "--json", *SHORT, *kto_pair, "--prompt-format", "tulu-2")
    assert result.stderr == ""
    # BOS and all: the prompt is what `score` reads.
    tulu = "<|user|>\n4+4?\n<|assistant|>\n"
    tokenizer = AutoTokenizer.from_pretrained(kto_pair[1])
    cost = json.loads(result.stdout)["cost"]["policy_tokens"]
    tokens = json.loads(result.stdout)["tokens"]
    assert cost == 1 + len(tokenizer.encode(tulu, add_special_tokens=False)) + tokens - 1


def test_a_format_that_is_the_same_text_is_not_warned_of(tmp_path):
    own = tmp_path / "own"
    shutil.copytree(tiny_tulu.model_path("sft"), own)
    args = ("--policy", own, "--scorer", "tiny-tulu-value", *SHORT)
    assert generate("--prompt", "4+4?", *args).stderr == ""
    assert "--raw takes text as it is" in generate(
        "--prompt", "a", "--raw", "--prompt-format", "halos", code=2
    ).stderr  # fmt: skip
