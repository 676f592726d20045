"""The embedded family's task: prompts, answers, the answer checker, the tokenizer, the metrics."""

import random

import numpy as np
import pytest

from guided_decode import tiny_tulu
from recipes.tiny_tulu.metrics import auc, paired_bootstrap
from recipes.tiny_tulu.sft import IGNORED, SFTConfig, WorkedAnswers, collate
from recipes.tiny_tulu.tokenizer import build_tokenizer

ANSWER = """\
7+6+0=13 c1
3+5+1=9 c0
8+9+0=17 c1
4+2+1=7 c0
Answer: 7793"""


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def sums(prompts: list[str]) -> set[frozenset[int]]:
    return {frozenset(tiny_tulu.operands(prompt)) for prompt in prompts}


def test_the_three_sets_of_prompts_are_disjoint_and_fixed() -> None:
    held_out, validation = tiny_tulu.held_out_prompts(), tiny_tulu.validation_prompts()
    training = tiny_tulu.training_prompts(20_000, seed=0)
    assert (len(held_out), len(validation)) == (1_000, 500)
    assert (len(sums(held_out)), len(sums(validation))) == (1_000, 500)
    assert not sums(held_out) & sums(validation)
    assert not sums(training) & (sums(held_out) | sums(validation))
    assert held_out[:2] == ["9272+4898=?", "What is 7301 + 1593?"]
    assert validation[0] == "What is 8198 + 9949?"
    assert tiny_tulu.held_out_prompts(10) == held_out[:10]
    assert tiny_tulu.training_prompts(50, seed=1) == tiny_tulu.training_prompts(50, seed=1)
    assert tiny_tulu.training_prompts(50, seed=1) != training[:50]


def test_more_prompts_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="1000 held-out prompts, 1001 were asked for"):
        tiny_tulu.held_out_prompts(1_001)
    with pytest.raises(ValueError, match="no model 'reward'"):
        tiny_tulu.model_path("reward")


def test_worked_answers_are_right_unless_a_carry_is_dropped() -> None:
    assert tiny_tulu.worked_answer(4837, 2956) == ANSWER
    assert tiny_tulu.worked_answer(9999, 9999).endswith("Answer: 19998")
    always = random.Random(0)
    dropped = tiny_tulu.worked_answer(4837, 2956, always, rate=1.0)
    assert dropped.splitlines() == [
        "7+6+0=13 c0",  # 7 > 6: dropped
        "3+5+0=8 c0",
        "8+9+0=17 c1",  # 8 < 9: kept
        "4+2+1=7 c0",
        "Answer: 7783",
    ]


def test_is_correct_reads_the_last_line_only() -> None:
    prompt = "What is 4837 + 2956?"
    assert tiny_tulu.is_correct(prompt, ANSWER)
    assert tiny_tulu.is_correct(tiny_tulu.render(prompt), ANSWER + "</s>")
    assert tiny_tulu.is_correct(prompt, "Answer: 7793")
    assert not tiny_tulu.is_correct(prompt, ANSWER.replace("7793", "7783"))
    assert not tiny_tulu.is_correct(prompt, ANSWER + "\nAnswer: 1")
    assert not tiny_tulu.is_correct(prompt, ANSWER + "1")
    assert not tiny_tulu.is_correct(prompt, "")
    with pytest.raises(ValueError, match="two numbers"):
        tiny_tulu.is_correct("Hello", ANSWER)


def test_every_held_out_worked_answer_is_correct() -> None:
    for prompt in tiny_tulu.held_out_prompts():
        assert tiny_tulu.is_correct(prompt, tiny_tulu.worked_answer(*tiny_tulu.operands(prompt)))


def test_chat_template_is_tulus_to_the_byte(tokenizer) -> None:
    one, several, _ = tiny_tulu.chat_prompts()

    def rendered(messages: list[dict[str, str]], generate: bool) -> str:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )

    assert rendered(one, True) == "<|user|>\nWhat is 4837 + 2956?\n<|assistant|>\n"
    assert rendered(one, True) == tiny_tulu.render(one[0]["content"])
    assert rendered(one, False) == "<|user|>\nWhat is 4837 + 2956?\n"
    turn = tiny_tulu.worked_answer(1204, 3311)
    assert rendered(several, True) == (
        f"<|user|>\nAdd 1204 and 3311.\n<|assistant|>\n{turn}</s>\n"
        "<|user|>\nAdd 9075 and 1846.\n<|assistant|>\n"
    )
    finished = [*one, {"role": "assistant", "content": ANSWER}]
    assert rendered(finished, False).endswith("Answer: 7793</s>")


def test_tokenizer_keeps_bytes_digits_and_bos(tokenizer) -> None:
    assert [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer.pad_token_id == 0
    text = tiny_tulu.render("Add 12345 and ½ → 漢字 🙂\x00") + ANSWER
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert 0 not in ids
    assert tokenizer(text).input_ids == [1, *ids]
    assert tokenizer("4837", add_special_tokens=False).input_ids == [
        tokenizer.convert_tokens_to_ids(digit) for digit in "4837"
    ]
    chat = tokenizer.apply_chat_template(tiny_tulu.chat_prompts()[0], add_generation_prompt=True)
    assert chat.input_ids[0] != tokenizer.bos_token_id


def test_sft_examples_are_reproducible_and_teach_the_answer_alone(tokenizer) -> None:
    config = SFTConfig(steps=2, batch_size=4, seed=5)
    first, second = WorkedAnswers(tokenizer, config), WorkedAnswers(tokenizer, config)
    rows = [first[i] for i in range(8)]
    assert rows == [second[i] for i in range(8)]
    for index, row in enumerate(rows):
        taught = [t for t in row["labels"] if t != IGNORED]
        assert row["input_ids"][-len(taught) :] == taught
        assert taught[-1] == tokenizer.eos_token_id
        assert (row["input_ids"][0] == tokenizer.bos_token_id) == (index % 2 == 1)
        text = tokenizer.decode(row["input_ids"][: -len(taught)], skip_special_tokens=True)
        assert text.startswith("<|user|>\n")
        assert text.endswith("\n<|assistant|>\n")
    batch = collate(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_carries_are_dropped_at_the_configured_rate(tokenizer) -> None:
    prompts = tiny_tulu.training_prompts(2_000, seed=3)
    drop = random.Random(0)
    kept = dropped = 0
    for prompt in prompts:
        a, b = tiny_tulu.operands(prompt)
        for line in tiny_tulu.worked_answer(a, b, drop, rate=0.65).splitlines()[:4]:
            total, carry = line.partition("=")[2].split(" c")
            due = int(total) >= 10
            assert due or carry == "0"
            if due and line[0] > line[2]:
                kept, dropped = kept + (carry == "1"), dropped + (carry == "0")
            else:
                assert carry == str(int(due))
    assert dropped / (kept + dropped) == pytest.approx(0.65, abs=0.03)


def test_auc_is_the_share_of_ordered_pairs() -> None:
    rng = np.random.default_rng(0)
    scores, right = rng.integers(0, 6, 60), rng.random(60) < 0.4
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[right] for b in scores[~right]
    ]
    assert auc(scores, right) == pytest.approx(np.mean(pairs))
    assert auc([0.1, 0.2, 0.3], [False, True, True]) == 1.0
    assert auc([1.0, 1.0], [False, True]) == 0.5
    with pytest.raises(ValueError, match="2 right and 0 wrong"):
        auc([1.0, 2.0], [True, True])


def test_paired_bootstrap_brackets_the_mean_difference() -> None:
    rng = np.random.default_rng(1)
    second = rng.random(400) < 0.4
    first = second | (rng.random(400) < 0.2)
    gain, low, high = paired_bootstrap(first, second)
    assert gain == pytest.approx(first.mean() - second.mean())
    assert 0 < low < gain < high < 0.25
    assert paired_bootstrap(second, second) == (0.0, 0.0, 0.0)
