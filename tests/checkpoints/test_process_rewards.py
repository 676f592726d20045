"""Process reward models: each step's reward is the stock model's by the published recipe."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.checkpoints.examination import examine_scorer
from guided_decode.checkpoints.prompts import render
from guided_decode.checkpoints.steps import STEP_FORMATS
from guided_decode.guidance.step import guide_rows
from guided_decode.search import Blocks, Judged, Sampling, StepJudge, block_search, run
from guided_decode.search.local import load_generator
from guided_decode.serving.description import describe
from tests.look_alikes import look_alike, tokenizer_like
from tests.models import tiny

QWEN = "Qwen/Qwen2.5-Math-PRM-7B"
SKYWORK = "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B"
SHEPHERD = "peiyi9979/math-shepherd-mistral-7b-prm"
QUESTION = "What is 2+2? Say it."
STEPS = ["Two and two.", "That is 4.", "So: 4"]
ASK = [{"role": "user", "content": QUESTION}]


def load(name, **options):
    return load_scorer(look_alike(name), allow_pickle=name == SKYWORK, **options)


def qwen_card(question, steps):
    """The code of the model card, over the classes that its remote code has."""
    folder = look_alike(QWEN)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = load_file(f"{folder}/model.safetensors")
    hidden = weights["score.0.bias"].shape[0]
    score = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2))
    score.load_state_dict(
        {k.removeprefix("score."): v for k, v in weights.items() if k.startswith("score.")}
    )
    messages = [
        {"role": "system",
         "content": "Please reason step by step, and put your final answer within \\boxed{}."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": "<extra_0>".join(steps) + "<extra_0>"},
    ]  # fmt: skip
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    ids = tokenizer.encode(text, return_tensors="pt", add_special_tokens=False)
    logits = score(AutoModel.from_pretrained(folder)(ids).last_hidden_state)
    mask = ids == tokenizer.encode("<extra_0>", add_special_tokens=False)[0]
    return F.softmax(logits, dim=-1)[mask][:, 1].tolist()


def skywork_code(question, steps):
    """prepare_input and derive_step_rewards of skywork-o1-prm-inference, and the sigmoid."""
    folder = look_alike(SKYWORK)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = torch.load(f"{folder}/pytorch_model.bin")
    ids = tokenizer.encode(tokenizer.bos_token + question + "\n")
    flags = []
    for step in steps:
        ids += [*(tokenizer.encode(step) if step else []), tokenizer.encode("\n")[-1]]
        flags.append(len(ids) - 1)
    hidden = AutoModel.from_pretrained(folder)(torch.tensor([ids])).last_hidden_state[0]
    value = hidden @ weights["v_head.summary.weight"][0] + weights["v_head.summary.bias"]
    return torch.sigmoid(value)[flags].tolist()


def shepherd_card(question, steps):
    """The code of the model card: two logits at the tag."""
    folder = look_alike(SHEPHERD)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    good_and_bad = tokenizer.encode("+ -")[1:]
    tag = tokenizer.encode("ки")[-1]
    output = "\n".join(f"{step} ки" for step in steps)
    ids = torch.tensor([tokenizer.encode(f"{question} {output}")])
    logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[:, :, good_and_bad]
    return logits.softmax(dim=-1)[:, :, 0][ids == tag].tolist()


RECIPES = {
    QWEN: (qwen_card, "qwen-2.5-math", "\n\n", math.prod),
    SKYWORK: (skywork_code, "skywork-prm", "\n", lambda x: sum(x) / len(x)),
    SHEPHERD: (shepherd_card, "math-shepherd", "\n", min),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("whole", [True, False])
def test_rewards_are_those_of_the_published_code(name, whole):
    recipe, prompt_format, separator, aggregate = RECIPES[name]
    expected = recipe(QUESTION, STEPS)
    assert max(expected) - min(expected) > 1e-4
    scorer = load(name)
    prompt = render(ASK, prompt_format, add_generation_prompt=True)
    # A response that ends with the separator has the same steps as one that does not.
    response = separator.join(STEPS) + separator * whole
    (rewards,) = scorer.step_rewards([prompt], [response])
    assert rewards == pytest.approx(expected, abs=1e-5)
    assert scorer.values([prompt], [response]) == pytest.approx([aggregate(expected)], abs=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_a_partial_response_has_the_rewards_of_its_beginning_for_the_price_of_its_end(name):
    recipe, prompt_format, separator, _ = RECIPES[name]
    scorer = load(name)
    prompt = render(ASK, prompt_format, add_generation_prompt=True)
    (first,) = scorer.step_rewards([prompt], [separator.join(STEPS[:2]) + separator])
    before = scorer.stats.tokens
    (all_,) = scorer.step_rewards([prompt], [separator.join(STEPS)])
    assert first == pytest.approx(recipe(QUESTION, STEPS[:2]), abs=1e-5)
    assert all_[:2] == pytest.approx(first, abs=1e-5)
    # The last step, its mark, and what stands between.
    assert scorer.stats.tokens - before <= len(STEPS[2]) + 4


def test_empty_lines_are_steps_where_the_published_code_has_them_so():
    prompt = render(ASK, "skywork-prm", add_generation_prompt=True)
    (rewards,) = load(SKYWORK).step_rewards([prompt], ["One.\n\nTwo.\n"])
    assert rewards == pytest.approx(skywork_code(QUESTION, ["One.", "", "Two."]), abs=1e-5)
    qwen = STEP_FORMATS["extra-0"]
    assert qwen.split("One.\n\n\n\nTwo.\n\n") == ["One.", "Two."]
    assert [qwen.split(text) for text in ("", "\n\n", "One.")] == [[""], [""], ["One."]]


def test_a_mark_in_the_question_is_no_step():
    prompt = render([{"role": "user", "content": "What is ки in it?"}], "math-shepherd",
                    add_generation_prompt=True)  # fmt: skip
    (rewards,) = load(SHEPHERD).step_rewards([prompt], ["\n".join(STEPS)])
    assert rewards == pytest.approx(shepherd_card("What is ки in it?", STEPS)[1:], abs=1e-5)


@pytest.mark.parametrize(("name", "mark"), [(QWEN, "<extra_0>"), (SHEPHERD, " ки")])
def test_marks_that_a_policy_writes_end_steps_as_separators_do(name, mark):
    recipe, prompt_format, separator, _ = RECIPES[name]
    scorer, expected = load(name), recipe(QUESTION, STEPS)
    prompt = render(ASK, prompt_format, add_generation_prompt=True)
    for response in (
        "".join(step + mark + separator for step in STEPS),
        separator.join(step + mark for step in STEPS),
        STEPS[0] + mark + separator + STEPS[1] + separator + STEPS[2],
    ):
        (rewards,) = scorer.step_rewards([prompt], [response])
        assert rewards == pytest.approx(expected, abs=1e-5)


def test_a_word_that_begins_as_the_mark_does_is_no_mark():
    assert STEP_FORMATS["math-shepherd"].split("a кит\nb ки") == ["a кит", "b"]
    prompt = render(ASK, "math-shepherd", add_generation_prompt=True)
    # Where its tokenizer reads one in it, nobody knows which is which.
    with pytest.raises(ValueError, match=r"reads 2 marks ' ки' of 1 steps in .*: expected one tok"):
        load(SHEPHERD).step_rewards([prompt], ["a кит b"])


@pytest.mark.parametrize(
    ("how", "of"),
    [("last", lambda x: x[-1]), ("min", min), ("product", math.prod),
     ("mean", lambda x: sum(x) / len(x))],
)  # fmt: skip
def test_the_aggregate_is_chosen(how, of):
    prompt = render(ASK, "qwen-2.5-math", add_generation_prompt=True)
    (value,) = load(QWEN, aggregate=how).values([prompt], ["\n\n".join(STEPS)])
    assert value == pytest.approx(of(qwen_card(QUESTION, STEPS)), abs=1e-5)


def test_tokens_are_refused_with_the_reason_wherever_they_are_asked_for():
    scorer = load(QWEN)
    reason = "process reward model is read at the marks .* says nothing of single tokens"
    with pytest.raises(ValueError, match=reason):
        scorer.score([[5, 6]], torch.tensor([[7]]))
    with pytest.raises(ValueError, match=reason):
        guide_rows(scorer, torch.zeros(1, scorer.vocab_size), [[5, 6]], GuidanceConfig(top_k=4))
    with pytest.raises(ValueError, match=f"cannot be served: a {reason}"):
        describe(scorer)
    with pytest.raises(ValueError, match=reason):
        examine_scorer(look_alike(QWEN))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (QWEN, {"aggregate": "max"}, "aggregate='max': expected one of last, min, product, mean"),
        (QWEN, {"steps": "dots"}, "steps='dots': expected one of extra-0, newline, math-shepherd"),
        (SHEPHERD, {"steps": "extra-0"}, "has no token '<extra_0>', at which its steps are read"),
        ("allenai/Llama-3.1-Tulu-3-8B-RM", {"aggregate": "min"},
         "aggregate= came with .*, a reward-model, which is not read by steps"),
        (QWEN, {"terminal": "critic"}, "terminal= came with .*, a process reward model"),
        ("allenai/tulu-2-7b", {"kind": "process-reward"},
         "nothing says how its steps are marked: pass steps=, one of extra-0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        load(name, **options)


def test_a_class_that_only_one_trainer_writes_needs_no_name(tmp_path):
    (tmp_path / "mine").symlink_to(look_alike(QWEN))
    prompt = render(ASK, "qwen-2.5-math", add_generation_prompt=True)
    scorer = load_scorer(tmp_path / "mine")
    assert scorer.step_rewards([prompt], ["\n\n".join(STEPS)])[0] == pytest.approx(
        qwen_card(QUESTION, STEPS), abs=1e-5
    )


def test_a_token_classifier_of_trl_is_read_at_its_newlines(tmp_path):
    """PRMTrainer: BOS, prompt, and each step's tokens with the separator's, which has the label."""
    tokenizer = tokenizer_like("llama-3")
    model = tiny("llama", "token", labels=2, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = load_scorer(tmp_path, kind="process-reward", steps="newline", aggregate="last")
    newline = tokenizer.encode("\n", add_special_tokens=False)
    ids, marks = tokenizer.encode(QUESTION), []
    assert ids[0] == tokenizer.bos_token_id
    for step in STEPS:
        ids += [*tokenizer.encode(step, add_special_tokens=False), *newline]
        marks.append(len(ids) - 1)
    right = model(torch.tensor([ids])).logits[0].softmax(-1)[marks, 1].tolist()
    (rewards,) = scorer.step_rewards([QUESTION], ["\n".join(STEPS)])
    assert rewards == pytest.approx(right, abs=1e-5)
    assert scorer.values([QUESTION], ["\n".join(STEPS)]) == pytest.approx(right[-1:], abs=1e-5)


def test_it_judges_blocks_of_a_search_that_end_with_steps():
    """By the policy's token ids; the judge reads the question in its own format."""
    policy = AutoModelForCausalLM.from_pretrained(look_alike("Qwen2.5-Math-7B-Instruct"))
    tokenizer = AutoTokenizer.from_pretrained(look_alike("Qwen2.5-Math-7B-Instruct"))
    generator = load_generator(policy, tokenizer=tokenizer)
    text = render(ASK, "qwen-2.5-math", add_generation_prompt=True)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    scorer = load(QWEN)
    judge = StepJudge(scorer, tokenizer)
    searched = block_search(
        prompt, Blocks(2, 2, block=6), max_tokens=12, sampling=Sampling(stop=("\n\n",)), seed=3
    )
    found = run(searched, generator, judge)
    for each in found.candidates:
        response = tokenizer.decode(each.tokens, skip_special_tokens=True)
        parts = [part for part in response.split("\n\n") if part] or [""]
        expected = math.prod(qwen_card(QUESTION, parts))
        assert each.score == pytest.approx(expected, abs=1e-5)
    other = StepJudge(load(SKYWORK), tokenizer, lambda ids: QUESTION + "\n")
    response = tuple(tokenizer.encode("Two.\nFour."))
    assert other.judge([Judged(tuple(prompt), response, False)]) == pytest.approx(
        [sum(skywork_code(QUESTION, ["Two.", "Four."])) / 2], abs=1e-5
    )
