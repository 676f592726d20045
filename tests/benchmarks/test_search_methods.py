"""benchmarks.search_methods: what is counted, what is kept, what is chosen, what the page says."""

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks.search_methods import __main__ as command
from benchmarks.search_methods import table
from benchmarks.search_methods.choice import choose
from benchmarks.search_methods.decoding import Family, Measured
from benchmarks.search_methods.records import Batch, Records, Total
from benchmarks.search_methods.settings import BEST_OF_N, GREEDY, PLAIN, Setting, tried
from benchmarks.search_methods.table import Difference, Flops, Row, verdict
from guided_decode import tiny_tulu
from guided_decode.guidance.config import GuidanceConfig
from guided_decode.search import find_method

MESSAGES = tiny_tulu.validation_prompts(6)


@pytest.fixture(scope="module")
def family() -> Family:
    return Family("sft")


def setting(method: str) -> Setting:
    return next(each for each in tried() if each.method == method)


def prompt_tokens(family: Family) -> int:
    return sum(len(family.generator.encode(tiny_tulu.render(each))) for each in MESSAGES)


def test_every_method_of_the_comparison_is_tried_and_takes_its_settings():
    settings = tried()
    assert len({each.key for each in settings}) == len(settings)
    assert list(dict.fromkeys(each.method for each in settings)) == [
        GREEDY, PLAIN, BEST_OF_N, "vote", "weighted vote", "reweight", "prune", "value beam",
        "blockwise", "refill", "SMC", "MCTS",
    ]  # fmt: skip
    for each in settings:
        if each.runs == "guide":
            GuidanceConfig(**each.given)
        elif each.runs != "generate":
            find_method(each.runs).checked(each.given)


def test_a_plain_answer_costs_its_prompt_and_what_was_drawn(family):
    measured = family.measure(setting(GREEDY), MESSAGES, 0, seed=1)
    texts = []
    for message in MESSAGES:
        ids = torch.tensor([family.generator.encode(tiny_tulu.render(message))])
        output = family.model.generate(ids, max_new_tokens=80, do_sample=False)
        texts.append(output[0, ids.shape[1] :])
    lengths = sum(map(len, texts))
    assert (measured.drawn, measured.scorer) == (prompt_tokens(family) + lengths, 0)
    assert measured.forwarded == measured.drawn - len(MESSAGES)
    answers = [family.tokenizer.decode(each, skip_special_tokens=True) for each in texts]
    pairs = zip(MESSAGES, answers, strict=True)
    assert measured.right == [int(tiny_tulu.is_correct(m, a)) for m, a in pairs]


def test_what_draws_have_in_common_is_drawn_twice_and_forwarded_once(family):
    twice = Setting(BEST_OF_N, "best-of-n", {"n": 2, "temperature": 0.0})
    first = Setting(BEST_OF_N, "best-of-n", {"n": 1, "temperature": 0.0})
    greedy = family.measure(setting(GREEDY), MESSAGES, 0, seed=1)
    single, double = (family.measure(each, MESSAGES, 0, seed=1) for each in (first, twice))
    assert single.right == double.right == greedy.right
    # The critic reads what the policy reads: everything but the last token.
    assert single.forwarded == single.scorer == double.forwarded == double.scorer
    assert single.forwarded == greedy.forwarded
    prompts = prompt_tokens(family)
    assert double.drawn - prompts == 2 * (single.drawn - prompts)
    assert single.drawn == greedy.drawn


def test_draws_follow_from_the_seed_and_the_prompts_number(family):
    one = Setting(BEST_OF_N, "best-of-n", {"n": 2})
    whole = family.measure(one, MESSAGES, 0, seed=1)
    halves = [family.measure(one, MESSAGES[i : i + 3], i, seed=1) for i in (0, 3)]
    assert whole.right == halves[0].right + halves[1].right
    assert whole.drawn == halves[0].drawn + halves[1].drawn
    assert whole.scorer == halves[0].scorer + halves[1].scorer


def test_guidance_costs_what_its_counters_say(family):
    guided = family.measure(setting("reweight"), MESSAGES, 0, seed=1)
    assert sum(guided.right) >= 5
    assert guided.forwarded == guided.drawn - len(MESSAGES)
    # Two candidates a token, one of which is the next prefix's end, and the prompt.
    assert guided.drawn < guided.scorer < 2 * guided.drawn


def test_records_go_on_after_a_line_that_was_cut(tmp_path):
    path = tmp_path / "runs" / "records.jsonl"
    records = Records(path)
    batches = [Batch("sft", "held-out", "x", first, 2) for first in (0, 2)]
    for batch in batches:
        records.add(batch, Measured([1, batch.first // 2], 20, 10, 6, 0.5))
    whole = path.read_text()
    path.write_text(whole[:-20])
    again = Records(path)
    assert batches[0] in again
    assert batches[1] not in again
    again.add(batches[1], Measured([1, 1], 20, 10, 6, 0.5))
    total = Records(path).totals("sft", "held-out", 4)["x"]
    assert total.right.tolist() == [1, 0, 1, 1]
    assert (total.drawn, total.forwarded, total.scorer) == (10, 5, 3)
    assert total.tokens("drawn") == 13
    assert total.tokens("forwarded") == 8
    assert Records(path).totals("ppo", "held-out", 4) == {}
    # Prompts that all of some settings have had.
    assert again.common("sft", "held-out", {"x"}) == 4
    again.add(Batch("sft", "held-out", "y", 0, 2), Measured([0, 0], 1, 1, 1, 0.1))
    assert again.common("sft", "held-out", {"x", "y"}) == 2
    assert again.common("sft", "held-out", {"z"}) == 0


def total(accuracy: float, drawn: float, forwarded: float = 0.0) -> Total:
    right = np.zeros(100)
    right[: round(100 * accuracy)] = 1
    return Total(right, drawn, forwarded, 0.0)


def test_the_best_setting_within_the_budget_is_chosen_and_of_equals_the_cheapest():
    names = ("cheap", "equal", "best", "dear")
    settings = [Setting("m", "best-of-n", {"n": i}) for i, _ in enumerate(names)]
    other = Setting("other", "vote", {"n": 9})
    figures = (total(0.7, 150, 100), total(0.7, 140, 130), total(0.8, 209, 150),
               total(0.9, 211, 160), total(1.0, 900, 900))  # fmt: skip
    totals = {each.key: f for each, f in zip([*settings, other], figures, strict=True)}
    plain = total(0.5, 100, 80)

    def chosen(rung: float, counting: str = "drawn") -> dict:
        picked = choose([*settings, other], totals, plain, rung, counting)
        return {method: names[each.given["n"]] for method, each in picked.items()}

    # 5% more are within.
    assert chosen(2.0) == {"m": "best"}
    assert chosen(1.5) == {"m": "equal"}
    assert chosen(2.2) == {"m": "dear"}
    assert chosen(1.0) == {}
    # The forwarded ones: 1.3 times 80 and 5% more hold the first alone.
    assert chosen(1.3, "forwarded") == {"m": "cheap"}


def row(method: str, accuracy: float, low: float, high: float) -> Row:
    over = None if method == BEST_OF_N else Difference((low + high) / 2, low, high)
    return Row("drawn", 2.0, method, {}, "", 100.0, 1.0, accuracy, 0.0, 1.0, None, over)


def test_a_table_says_what_came_out_whichever_way():
    rows = [row(PLAIN, 0.4, -0.3, -0.2), row(BEST_OF_N, 0.7, 0, 0), row("vote", 0.5, -0.2, -0.1),
            row("MCTS", 0.9, 0.1, 0.3), row("SMC", 0.72, -0.01, 0.05)]  # fmt: skip
    assert verdict(rows) == (
        "Best: MCTS, 90.0% for 100 tokens. Better than best-of-n: MCTS; worse: plain, vote; "
        "not told apart: SMC."
    )
    assert verdict(rows[:1]) == "Nothing but plain decoding fits."
    alone = Row("drawn", 2.0, "MCTS", {}, "", 100.0, 1.0, 0.9, 0.0, 1.0, None, None)
    assert verdict([alone]) == "Best: MCTS, 90.0% for 100 tokens. No best-of-n fits."


def test_the_command_runs_what_is_missing_and_says_where_it_was_cut_short(tmp_path, monkeypatch):
    few = [setting(GREEDY), setting(PLAIN), Setting(BEST_OF_N, "best-of-n", {"n": 2}),
           setting("reweight"), setting("MCTS")]  # fmt: skip
    for module in (command, table):
        monkeypatch.setattr(module, "tried", lambda: few)
    words = ["x", "--policies", "sft", "--validation", "4", "--prompts", "6", "--batch", "4",
             "--records", str(tmp_path / "r.jsonl"), "--out", str(tmp_path)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    assert command.main() == 0
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    found = json.loads((tmp_path / "search_methods.json").read_text())
    assert found["policies"]["sft"]["prompts"] == 6
    rows = found["policies"]["sft"]["rows"]
    assert {r["method"] for r in rows} == {each.method for each in few}
    flops = 2 * sum(
        p.numel() for n, p in Family("sft").model.named_parameters()
        if p.ndim == 2 and "embed" not in n
    )  # fmt: skip
    plain = next(r for r in rows if r["method"] == PLAIN)
    records = Records(tmp_path / "r.jsonl").totals("sft", "held-out", 6)
    assert plain["mflops"] == pytest.approx(records[setting(PLAIN).key].forwarded * flops / 1e6)
    text = (tmp_path / "search_methods.md").read_text()
    assert "**6 of the 1,000 held-out prompts, the same for every method" in text
    assert "### Tokens forwarded" in text
    # Four and eight times plain hold the same of these few.
    assert text.count("The table is the last one.") == 2
    # Nothing is run again, and a table can be made without running.
    assert command.main() == 0
    assert (tmp_path / "r.jsonl").read_text().splitlines() == lines
    (tmp_path / "r.jsonl").write_text("\n".join(lines[:5]) + "\n")
    with pytest.raises(ValueError, match="no held-out prompts of sft that every chosen setting"):
        table.compare(Records(tmp_path / "r.jsonl"), "sft", Flops(1, 1), {"validation": 4})
