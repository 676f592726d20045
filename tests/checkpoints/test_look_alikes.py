"""Every registered scorer loads by its name, and scores as its own module does by its recipe."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from guided_decode import load_scorer
from guided_decode.checkpoints.prompts import tokenise
from guided_decode.checkpoints.registry import CHAT_TEMPLATE, REGISTRY, find
from guided_decode.scoring.step_scorer import StepScorer
from guided_decode.search import Judged, ScorerJudge
from tests.look_alikes import LIKES, look_alike

SCORERS = [record for record in REGISTRY if record.kind is not None and record.assets is None]
NOTHING = torch.empty(1, 0, dtype=torch.int64)
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because. So."}]


def load(name, **options):
    record = find(name)
    given = {} if record.reference is None else {"reference": look_alike(record.reference)}
    tokenizer = AutoTokenizer.from_pretrained(look_alike(record.name))
    return load_scorer(look_alike(name), policy_tokenizer=tokenizer, **given, **options)


def test_every_registered_checkpoint_has_a_look_alike_under_its_name():
    for record in SCORERS:
        assert find(look_alike(record.name)) is record, record.name
    policies = [record for record in REGISTRY if record.kind is None and record.assets is None]
    assert {record.name.rpartition("/")[2] for record in policies} <= set(LIKES)


@pytest.mark.parametrize("name", [record.name for record in SCORERS])
def test_each_loads_as_its_record_says(name):
    record = find(name)
    scorer = load(name, allow_pickle=name.startswith("Skywork/Skywork-o1"))
    if record.kind == "process-reward":
        assert isinstance(scorer, StepScorer)
        return
    wanted = {"implicit": "included", "reward-model": "critic", "classifier": "critic"}
    assert scorer.terminal == wanted.get(record.kind, "baseline")
    assert (scorer.eos_token_id is None) == (record.name is None)


def hidden_states(folder, ids):
    """The stock trunk's, [tokens, hidden]."""
    return AutoModel.from_pretrained(folder)(torch.tensor([ids])).last_hidden_state[0]


def chat_ids(tokenizer, record, messages=CHAT, **how):
    if record.prompt_format != CHAT_TEMPLATE:
        return tokenise(tokenizer, messages, record.prompt_format, **how)
    text = tokenizer.apply_chat_template(messages, tokenize=False, **how)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("size", ["0.5B", "1.5B", "7B", "32B"])
def test_open_reasoner_zero_reads_a_head_without_bias_at_each_token(size):
    name = f"Open-Reasoner-Zero/Open-Reasoner-Zero-Critic-{size}"
    policy = AutoTokenizer.from_pretrained(look_alike(find(name).policy))
    scorer = load_scorer(look_alike(name), policy_tokenizer=policy)
    ids = chat_ids(policy, find(name), CHAT[:1], add_generation_prompt=True)
    head = load_file(f"{look_alike(name)}/model.safetensors")["value_head.weight"]
    values = hidden_states(look_alike(name), [*ids, 7]) @ head[0]
    scored, baseline = scorer.score([ids], torch.tensor([[7, policy.eos_token_id]]))
    torch.testing.assert_close(baseline[0], values[-2], atol=1e-5, rtol=0)
    torch.testing.assert_close(scored[0, 0], values[-1], atol=1e-5, rtol=0)
    # Its trainer has no target behind the last token: an end has no advantage.
    assert scorer.terminal == "baseline"


def test_value_guided_search_reads_class_1_of_a_head_with_two_layers():
    folder = look_alike("VGS-AI/DeepSeek-VM-1.5B")
    scorer = load("VGS-AI/DeepSeek-VM-1.5B")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = chat_ids(tokenizer, find(folder), end="eos")
    weights = load_file(f"{folder}/model.safetensors")
    hidden = hidden_states(folder, ids)
    logits = F.relu(hidden @ weights["score.0.weight"].T) @ weights["score.2.weight"].T
    success = logits.softmax(-1)[:, 1]
    prompt, response = tuple(ids[:-4]), tuple(ids[-4:])
    judged = ScorerJudge(scorer).judge(
        [Judged(prompt, response, True), Judged(prompt, response[:2], False)]
    )
    assert judged == pytest.approx([success[-1].item(), success[-3].item()], abs=1e-5)
    # "auto" knows the class, wherever the folder lies.
    assert 0 < success.min() < success.max() < 1


@pytest.mark.parametrize(
    "name",
    [record.name for record in SCORERS if record.kind == "reward-model"],
)
def test_reward_models_score_as_the_stock_class_on_the_published_text(name):
    folder, record = look_alike(name), find(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    # The whole turn of a chat template is what its cards hand to the model; Tulu's read EOS.
    how = {} if record.prompt_format == CHAT_TEMPLATE else {"end": "eos"}
    ids = chat_ids(tokenizer, record, **how)
    reward = stock(torch.tensor([ids])).logits[0, 0].item()
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    prompt, response = tuple(ids[: end - 4]), tuple(ids[end - 4 : end])
    judged = ScorerJudge(load(name)).judge([Judged(prompt, response, True)])
    assert judged == pytest.approx([reward], abs=1e-5)
    assert len(ids) - end == (1 if record.turn_end else 0)


def test_a_score_behind_eos_leaves_all_other_candidates_where_they_are():
    name = "Skywork/Skywork-Reward-V2-Qwen3-8B"
    folder, scorer = look_alike(name), load(name)
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, eos = tokenizer.encode("Why?"), tokenizer.eos_token_id
    candidates = torch.tensor([[5, eos, -1], [eos, 9, 11]])
    values, baseline = scorer.score([ids, ids[:-1]], candidates)
    newline = tokenizer.encode("\n")

    def stock_reward(*rows):
        return stock(torch.tensor([[*rows]])).logits[0, 0].item()

    expected = [
        [stock_reward(*ids, 5), stock_reward(*ids, eos, *newline)],
        [stock_reward(*ids[:-1], eos, *newline), stock_reward(*ids[:-1], 9)],
    ]
    assert values[0, :2].tolist() == pytest.approx(expected[0], abs=1e-5)
    assert values[1, :2].tolist() == pytest.approx(expected[1], abs=1e-5)
    assert values[0, 2].isnan()
    assert baseline[0].item() == pytest.approx(stock_reward(*ids), abs=1e-5)


@pytest.mark.parametrize("name", ["allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm-value"])
def test_the_tulu_2_5_critic_sees_no_bos_and_has_a_zero_bias(name):
    folder = look_alike(name)
    assert "score.bias" not in load_file(f"{folder}/model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id is None
    stock = AutoModelForTokenClassification.from_pretrained(folder)
    stock.score.bias.zero_()
    ids = chat_ids(tokenizer, find(name), CHAT[:1], add_generation_prompt=True)
    assert ids[0] == tokenizer.bos_token_id
    expected = stock(torch.tensor([ids[1:]])).logits[0, -1, 0].item()
    assert load(name).score([ids], NOTHING).baseline.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "name", ["allenai/tulu-2-dpo-7b", "ContextualAI/Contextual_KTO_Mistral_PairRM"]
)
def test_implicit_rewards_are_log_ratios_of_the_two_stock_models(name):
    record = find(name)
    tuned, reference = (
        AutoModelForCausalLM.from_pretrained(look_alike(one)) for one in (name, record.reference)
    )
    tokenizer = AutoTokenizer.from_pretrained(look_alike(name))
    ids = chat_ids(tokenizer, record, CHAT[:1], add_generation_prompt=True)
    text = torch.tensor([ids])
    ratio = (tuned(text).logits.log_softmax(-1) - reference(text).logits.log_softmax(-1))[0, -1]
    values, baseline = load(name).score([ids], torch.arange(len(ratio))[None])
    torch.testing.assert_close(values[0], ratio, atol=1e-4, rtol=0)
    assert baseline.item() == 0
