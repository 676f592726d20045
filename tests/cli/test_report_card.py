"""`guided-decode report-card`: any critic, on a file of rollouts."""

import json

import pytest
import torch

from guided_decode import load_scorer, tiny_tulu
from guided_decode.lab.ranks import auc
from tests.cli.critic_runs import POLICY, done, refused, rollouts, write

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def test_a_registered_critics_card_is_made_of_its_values(tmp_path):
    source, out = write(tmp_path / "in.jsonl", lines := rollouts(12)), tmp_path / "card"
    words = ["tiny-tulu-value", "--rollouts", source, *POLICY, "--output", out, "--positions", 20]
    printed = done("report-card", *words, "--budget", 0.05, "--tail", "keep").stdout
    card = json.loads((out / "report_card.json").read_text())
    assert printed == (out / "report_card.md").read_text()
    assert (out / "report_card.png").read_bytes().startswith(b"\x89PNG")
    assert (card["rollouts"], card["positions"], card["top_k"]) == (12, 20, 16)
    assert [each["budget"] for each in card["suggestions"]] == [0.05]
    assert card["suggestions"][0]["beta"] > 0
    # The oracle: V after half of each response, and at its last token but EOS.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tulu.model_path("sft"))
    scorer = load_scorer("tiny-tulu-value", policy_tokenizer=tokenizer)
    for i, fraction in ((1, 0.5), (3, 1.0)):
        read = []
        for line in lines:
            prompt, response = (
                tokenizer(text, add_special_tokens=False).input_ids
                for text in (tiny_tulu.render(line["prompt"]), line["response"])
            )
            ids = prompt + response[: -int(-fraction * len(response) // 1)]
            read.append(scorer.score([ids], torch.empty(1, 0, dtype=torch.int64)).baseline.item())
        wanted = auc(read, [line["reward"] for line in lines])
        assert card["ranks"][i]["auc"] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "1+1"}, "in.jsonl, line 1: no response: expected rollouts with response and"),
        ({"prompt": "1+1", "response": "2"}, "in.jsonl, line 1: no reward: expected rollouts"),
    ],
)
def test_lines_without_rewards_are_refused(tmp_path, line, message):
    source = write(tmp_path / "in.jsonl", [line])
    assert message in refused("report-card", "tiny-tulu-value", "--rollouts", source, *POLICY)


def test_what_has_no_value_of_prefixes_is_refused(tmp_path):
    source = write(tmp_path / "in.jsonl", rollouts(2))
    words = ["report-card", "tiny-tulu-ppo", "--rollouts", source, *POLICY]
    said = refused(*words, "--output", tmp_path / "card")
    assert "an implicit reward has no value of a prefix" in said
    assert not (tmp_path / "card").exists()
    said = refused(*words, "--budget", 0)
    assert "--budget 0.0: expected nats a token" in said
