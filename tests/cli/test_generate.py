"""`guided-decode generate` on tiny-tulu: what it prints is what the models say."""

import functools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
from typer.testing import CliRunner

from guided_decode import load_scorer, tiny_tulu
from guided_decode.cli.app import app
from guided_decode.cli.side_by_side import SCALE, ColourScale, ValuedText, side_by_side
from guided_decode.cli.token_texts import token_texts
from tests.serving.served import served

PROMPT = "What is 4785 + 5426?"
SAMPLED = ("--temperature", 1, "--num-samples", 3, "--seed", 5)


def generate(*args, stdin=None):
    result = CliRunner().invoke(app, ["generate", *map(str, args)], input=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_tulu.model_path("sft"))


def test_guided_answers_are_right_where_the_policy_errs():
    (line,) = objects(generate("--prompt", PROMPT, "--compare", "--json"))
    assert not tiny_tulu.is_correct(PROMPT, line["plain"]["text"])
    assert tiny_tulu.is_correct(PROMPT, line["guided"]["text"])


@pytest.mark.parametrize("rule", [(), ("--rule", "prune"), ("--gate", 0.9)])
def test_a_critic_guides_alike_here_and_from_a_server(rule):
    """Settings that were chosen for a critic are chosen for it wherever it runs."""
    with served(load_scorer("tiny-tulu-value", policy_tokenizer=tokenizer())) as server:
        pair = ("--policy", "tiny-tulu-sft", "--scorer", server.address)
        there = generate(*pair, "--prompt", PROMPT, *rule)
    assert there == generate("--prompt", PROMPT, *rule)
    assert tiny_tulu.is_correct(PROMPT, there)


def test_compare_prints_the_critics_values_and_what_was_forwarded():
    (line,) = objects(generate("--prompt", PROMPT, "--compare", "--json"))
    critic = AutoModelForTokenClassification.from_pretrained(tiny_tulu.model_path("value"))
    prompt = tokenizer().encode(tiny_tulu.render(PROMPT), add_special_tokens=False)
    for way in ("plain", "guided"):
        answer = tokenizer().encode(line[way]["text"], add_special_tokens=False)
        values = critic(input_ids=torch.tensor([prompt + answer])).logits[0, :, 0]
        # EOS comes last, and this critic was never trained there.
        assert line[way]["values"][-1] is None
        assert line[way]["values"][:-1] == pytest.approx(values[len(prompt) :].tolist(), abs=1e-5)
        assert "".join(line[way]["tokens"]) == line[way]["text"]
        assert line[way]["cost"]["policy_tokens"] == len(prompt) + len(answer)
    assert line["plain"]["cost"]["scorer_tokens"] == 0
    # Prompt and answer once, and each step's three other candidates.
    others = line["guided"]["cost"]["scorer_tokens"] - len(prompt) - len(line["guided"]["values"])
    assert 2 * len(answer) < others <= 3 * len(answer) + 4


def test_an_answer_ends_where_its_value_falls_below_abstain():
    plain = ("--prompt", PROMPT, "--beta", 0, "--tail", "keep")
    (whole,) = objects(generate(*plain, "--json"))
    assert "abstained" not in whole
    critic = AutoModelForTokenClassification.from_pretrained(tiny_tulu.model_path("value"))
    prompt = tokenizer().encode(tiny_tulu.render(PROMPT), add_special_tokens=False)
    answer = tokenizer().encode(whole["text"], add_special_tokens=False)
    values = critic(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) :, 0].tolist()
    # The policy errs here, and the critic sees it.
    low, first = (values[0] + min(values)) / 2, 5
    ended = next(t for t, value in enumerate(values, 1) if value < low and t >= first)
    how = ("--abstain", low, "--abstain-after", first)
    (line,) = objects(generate(*plain, *how, "--json"))
    assert (line["abstained"], line["finished"], line["tokens"]) == (True, False, ended)
    assert ended < len(answer)
    assert line["text"] == tokenizer().decode(answer[:ended])
    # Each token but the last was scored once.
    assert line["cost"]["scorer_tokens"] == len(prompt) + ended
    result = CliRunner().invoke(app, ["generate", *map(str, (*plain, *how))])
    assert result.stdout == line["text"] + "\n"
    assert f"warning: the answer was ended after {ended} tokens: its value is" in result.stderr


def test_plain_is_the_policy_alone():
    (line,) = objects(generate("--prompt", PROMPT, "--compare", "--json"))
    policy = AutoModelForCausalLM.from_pretrained(tiny_tulu.model_path("sft"))
    inputs = tokenizer()(tiny_tulu.render(PROMPT), add_special_tokens=False, return_tensors="pt")
    output = policy.generate(**inputs, do_sample=False, max_new_tokens=256)
    text = tokenizer().decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert line["plain"]["text"] == text


def test_text_file_stdin_and_stream_print_the_same_answer(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    answer = generate("--prompt", PROMPT)
    assert tiny_tulu.is_correct(PROMPT, answer.rstrip("\n"))
    assert generate("--file", file) == answer
    assert generate(stdin=PROMPT + "\n") == answer
    assert generate("--prompt", PROMPT, "--stream") == answer


def test_a_file_of_chats_is_answered_line_by_line(tmp_path):
    file = tmp_path / "chats.jsonl"
    chats = tiny_tulu.chat_prompts()
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    lines = objects(generate("--file", file, "--json"))
    assert [line["prompt"] for line in lines] == [chat[-1]["content"] for chat in chats]
    # The second has an earlier turn, and the policy was taught single turns.
    assert all(tiny_tulu.is_correct(line["prompt"], line["text"]) for line in lines[::2])


def test_samples_follow_the_seed():
    first, again = (generate("--prompt", PROMPT, "--json", *SAMPLED) for _ in range(2))
    texts = [line["text"] for line in objects(first)]
    assert texts == [line["text"] for line in objects(again)]
    assert [line["sample"] for line in objects(first)] == [0, 1, 2]
    plain = objects(generate("--prompt", PROMPT, "--json", "--compare", *SAMPLED))
    assert len({line["plain"]["text"] for line in plain}) > 1
    assert [line["guided"]["text"] for line in plain] == texts


def test_options_reach_the_guidance_rule():
    (line,) = objects(
        generate("--prompt", PROMPT, "--compare", "--json", "--beta", 0, "--tail", "keep")
    )
    assert line["guided"]["text"] == line["plain"]["text"]
    assert line["guided"]["cost"]["scorer_tokens"] == 0
    (gated,) = objects(generate("--prompt", PROMPT, "--json", "--gate", 0.9))
    (ungated,) = objects(generate("--prompt", PROMPT, "--json"))
    assert gated["cost"]["scorer_tokens"] < ungated["cost"]["scorer_tokens"]
    (pruned,) = objects(generate("--prompt", PROMPT, "--json", "--rule", "prune"))
    assert tiny_tulu.is_correct(PROMPT, pruned["text"])


@pytest.mark.parametrize(
    ("preset", "written_out"),
    [
        ("vas", ["--beta", 3, "--top-k", 20, "--tail", "keep", "--baseline", "mean"]),
        ("args", ["--beta", 1, "--top-k", 10]),
        ("rad", ["--beta", 30, "--top-k", 20, "--transform", "clip:0,1"]),
        ("fudge", ["--beta", 1, "--top-k", 200, "--transform", "log-sigmoid"]),
    ],
)
def test_a_preset_is_its_settings_and_options_change_it(preset, written_out):
    common = ["--prompt", PROMPT, "--json", *SAMPLED, "--max-new-tokens", 20]

    def texts(*words):
        return [line["text"] for line in objects(generate(*common, *words))]

    assert texts("--preset", preset) == texts(*written_out)
    assert texts("--preset", preset, "--beta", 7) == texts(*written_out, "--beta", 7)


def test_a_preset_for_implicit_rewards_says_so_of_a_critic():
    result = CliRunner().invoke(app, ["generate", "--prompt", PROMPT, "--preset", "proxy-tuning"])
    assert result.exit_code == 2
    assert "--preset proxy-tuning reads the whole vocabulary, which only an implicit reward" in (
        " ".join(result.stderr.split())
    )


def test_an_unknown_preset_is_refused():
    result = CliRunner().invoke(app, ["generate", "--prompt", PROMPT, "--preset", "args2"])
    assert result.exit_code == 2
    assert "--preset args2: unknown (did you mean args?); expected one of cd," in result.stderr


def test_raw_leaves_the_prompt_as_it_is():
    chat = generate("--prompt", tiny_tulu.render(PROMPT), "--raw", "--max-new-tokens", 12)
    assert chat.startswith("5+6+0=11 c1")


def test_an_unregistered_policy_uses_its_tokenizers_template(tmp_path):
    policy, own = tiny_tulu.model_path("sft"), tmp_path / "mine"
    own.mkdir()
    for file in policy.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    args = ("--scorer", tiny_tulu.model_path("value"), "--beta", 6, "--top-k", 4)
    answer = generate("--prompt", PROMPT, "--policy", own, *args)
    assert answer == generate("--prompt", PROMPT, "--beta", 6, "--top-k", 4)


@pytest.mark.parametrize("width", [80, 100])
def test_the_comparison_fits_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = generate("--prompt", PROMPT, "--compare")
    assert max(map(len, text.splitlines())) <= width
    assert "Answer: 10211" in text
    assert "scorer tokens" in text


def test_a_narrow_terminal_costs_no_figures(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    text = generate("--prompt", PROMPT, "--compare")
    assert "…" not in text
    assert "Answer: 10211" in text


def test_colours_go_from_the_lowest_value_to_the_highest():
    scale = ColourScale.over([ValuedText(["a", "b", "c"], [0.0, 1.0, None])])
    styles = [scale.style(value) for value in (0.0, 0.5, 1.0, None)]
    assert styles == [SCALE[0], SCALE[2], SCALE[-1], "dim"]
    assert ColourScale.over([ValuedText(["a"], [0.3])]).style(0.3) == "dim"


def test_a_line_ends_with_its_last_value_or_with_the_sum_so_far():
    pieces, values = ["a\n", "b", ""], [0.25, 0.5, None]
    assert ValuedText(pieces, values).so_far == [0.25, 0.5, 0.5]
    assert ValuedText(pieces, values, summed=True).so_far == [0.25, 0.75, 0.75]
    assert ValuedText(["", "a"], [None, 1.0]).so_far == [None, 1.0]
    table, legend = side_by_side([("one", ValuedText(pieces, values, summed=True))])
    assert [list(column.cells) for column in table.columns][1] == ["0.25", "0.75"]
    assert "the sum so far" in legend.plain


def test_token_texts_join_to_the_text_whatever_the_characters():
    for text in ("7+6+0=13 c1\nAnswer: 7", "naïve — 数学 🧮!"):
        ids = tokenizer().encode(text, add_special_tokens=False)
        assert "".join(token_texts(tokenizer(), ids)) == text
    eos = tokenizer().eos_token_id
    assert token_texts(tokenizer(), [eos]) == [""]
    assert token_texts(tokenizer(), [eos], special=True) == ["</s>"]
