"""`check_scorer`: the package's scorers keep the contract; each promise catches who breaks it."""

import re
import subprocess
import sys
from contextlib import closing

import pytest
import torch

from guided_decode import load_scorer
from guided_decode.testing import PROMISES, BrokenPromise, broken_promises, check_scorer
from tests import PATIENCE, ROOT, models, oracle
from tests.serving.served import client, every_kind, served
from tests.testing.broken_scorers import BROKEN
from tests.testing.plain_scorer import VOCAB, PlainScorer


@pytest.mark.parametrize("kind", every_kind())
def test_the_packages_scorers_keep_the_contract(kind):
    make = every_kind()[kind]
    check_scorer(make(), fresh=make)


def test_a_small_cache_that_evicts_all_the_time_keeps_it():
    make = every_kind()["critic"]
    scorer = load_scorer(models.tiny("llama", "token"), kind="verl-critic", cache_tokens=60)
    check_scorer(scorer, fresh=make)
    assert scorer.stats.evictions > 100


def test_a_sliding_window_keeps_it():
    model = models.tiny("gemma2", "token")
    check_scorer(load_scorer(model, kind="verl-critic"))


@pytest.mark.parametrize("kind", ["companions", "implicit"])
def test_a_client_of_a_scorer_server_keeps_it(kind):
    make = every_kind()[kind]
    with served(make()) as server, closing(client(server)) as scorer:
        check_scorer(scorer, fresh=make)


def test_a_function_of_ids_keeps_it():
    check_scorer(PlainScorer(), fresh=PlainScorer)


def test_the_stock_forward_keeps_it():
    """What the other scorers are held to elsewhere: one forward of the whole for each value."""
    values = oracle.Values(models.tiny("llama", "token"))
    check_scorer(PlainScorer(lambda ids: values.forward([tuple(ids)])[0]))


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_catches_who_breaks_it_and_only_it_does(promise):
    make = BROKEN[promise]
    found = broken_promises(make(), fresh=make)
    assert [each.promise for each in found] == [promise], found
    with pytest.raises(BrokenPromise) as caught:
        check_scorer(make(), fresh=make)
    assert str(caught.value).startswith(f"{promise}: {PROMISES[promise].sentence}. Found: ")
    if promise != "protocol":  # what is missing is asked for again
        check_scorer(make(), fresh=make, leave_out=[promise])


def test_the_error_names_rows_and_figures():
    with pytest.raises(BrokenPromise, match=r"alone") as caught:
        check_scorer(BROKEN["batch"]())
    assert caught.value.rows == (0, 1, 2)
    assert "values of row 0, candidate " in str(caught.value)
    assert isinstance(caught.value, AssertionError)


def test_an_exception_is_told_with_the_promise_and_kept_as_the_cause():
    with pytest.raises(BrokenPromise, match="forms: .* TypeError: unhashable tensor") as caught:
        check_scorer(BROKEN["forms"]())
    assert isinstance(caught.value.__cause__, TypeError)


def test_only_some_ids_and_a_wider_tolerance():
    def only_these(ids):
        assert {*ids} <= {*range(20, 40), 2}
        # Of the size of bfloat16's rounding.
        return float(torch.tensor(sum(ids) * 0.013).bfloat16()) + 1e-3 * (len(ids) % 2)

    check_scorer(PlainScorer(only_these), token_ids=range(20, 40), atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"leave_out": ["order"]}, "leave_out=['order']: expected names of protocol, form"),
        ({"longest": 5}, "longest=5"),
        ({"token_ids": [3, 4]}, "2 token_ids: expected at least 24 tokens"),
    ],
)
def test_settings_that_are_none_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_scorer(PlainScorer(), **settings)


def test_it_needs_no_test_framework_and_no_models():
    code = (
        "import sys; from guided_decode.testing import check_scorer; "
        "print([name for name in ('pytest', 'transformers') if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert ended.stdout == "[]\n", ended.stderr


def test_every_promise_has_a_broken_scorer():
    assert list(BROKEN) == list(PROMISES)
    assert VOCAB > 40
