"""Slot tables grow with what is live, up to a share of the pool; and the handles they belong to."""

import copy

import numpy as np
import pytest
import torch

from guided_decode import PrefixHandle, load_scorer
from guided_decode.cache import prefix_cache
from guided_decode.cache.slot_tables import SlotTables
from tests import models

CPU = torch.device("cpu")


def critic(**options):
    return load_scorer(models.saved("llama", "token"), kind="verl-critic", **options)


def test_tables_take_no_more_than_their_bytes():
    tables = SlotTables(CPU, most_bytes=64 * 64 * 4)
    rows = [tables.open_row(10) for _ in range(64)]
    assert sorted(rows) == list(range(64))
    assert tables.open_row(10) is None
    assert not tables.widen(65)
    assert tables.nbytes == 64 * 64 * 4
    tables.close_row(rows[0])
    assert tables.open_row(10) == rows[0]


def test_the_first_rows_are_as_wide_as_they_must_be():
    tables = SlotTables(CPU, most_bytes=1)
    assert tables.open_row(5000) is not None
    assert tables.table.shape == (8, 5000)


def test_tables_that_follow_others_take_their_shape_and_keep_what_fits():
    tables = SlotTables(CPU, most_bytes=1 << 20)
    tables.write([(1, 2, np.array([7, 8, 9]))])
    tables.reshape(16, 128)
    assert tables.table.shape == (16, 128)
    assert tables.table[1, 2:5].tolist() == [7, 8, 9]
    assert tables.table.sum() == 24
    tables.reshape(2, 4)
    assert tables.table.tolist() == [[0, 0, 0, 0], [0, 0, 7, 8]]


@pytest.mark.parametrize("batch", [3, 24])
def test_handles_beyond_the_budget_are_scored_right(monkeypatch, batch):
    monkeypatch.setattr(prefix_cache, "_SMALL_TABLES", 16 * 64 * 4)
    monkeypatch.setattr(prefix_cache, "TABLE_SHARE", 0)
    scorer = critic(cache_tokens=2048)
    assert scorer.cache.tables._most_entries < 24 * 64
    handles = [PrefixHandle(ids) for ids in models.prompts([20, 30, 40] * 8)]
    candidates = torch.tensor([[3, 4, 5]] * batch)
    for _ in range(3):
        for start in range(0, 24, batch):
            part = handles[start : start + batch]
            expected = critic().score([each.tokens for each in part], candidates)
            got = scorer.score(part, candidates)
            torch.testing.assert_close(got.values, expected.values, rtol=1e-4, atol=1e-4)
            scorer.cache.check()
            for each in part:
                each.append(4)
    assert scorer.cache.tables.nbytes <= 16 * 64 * 4
    del handles, part, each
    assert scorer.cache.tables.open_rows == 0


def test_many_live_handles_and_one_long_row_stay_within_a_share_of_the_pool():
    scorer = critic(cache_tokens=3000, max_forward_tokens=512)
    handles = [PrefixHandle([5 + n % 90, 6 + n // 90]) for n in range(1500)]
    scorer.score(handles, torch.empty(1500, 0, dtype=torch.int64))
    scorer.score([models.prompts([500])[0]], torch.tensor([[3]]))
    most = max(scorer.cache.pool.nbytes * prefix_cache.TABLE_SHARE, 1 << 20)
    assert scorer.cache.tables.nbytes <= most
    assert scorer.cache.nbytes == scorer.cache.pool.nbytes + scorer.cache.tables.nbytes


# Handles.


def test_a_copied_handle_goes_its_own_way():
    handle = PrefixHandle([5, 6])
    copies = [copy.copy(handle), copy.deepcopy(handle)]
    handle.append(7)
    for each in copies:
        each.append(8)
        assert each.tokens.tolist() == [5, 6, 8]
    assert handle.tokens.tolist() == [5, 6, 7]


@pytest.mark.parametrize("token", [4.7, 4.0, "4", None, torch.tensor(4.0), 2**63, -(2**63) - 1])
def test_a_handle_takes_integers_only(token):
    handle = PrefixHandle([5])
    with pytest.raises(ValueError, match="expected one"):
        handle.append(token)
    assert handle.tokens.tolist() == [5]


def test_numpys_and_torchs_integers_are_integers():
    import numpy as np

    handle = PrefixHandle()
    for token in (np.int64(4), np.uint8(5), torch.tensor(6), np.array(7), 8):
        handle.append(token)
    assert handle.tokens.tolist() == [4, 5, 6, 7, 8]
    assert (handle.lowest, handle.highest) == (0, 8)


@pytest.mark.parametrize(
    "tokens",
    [[4.7], "abc", [[1, 2]], [[1], [2, 3]], torch.ones(2, dtype=torch.bfloat16), [2**70], 5],
)
def test_prefixes_that_are_no_integers_are_refused_in_our_words(tokens):
    for refused in (PrefixHandle, PrefixHandle([3]).extend, PrefixHandle([3]).sync):
        with pytest.raises(ValueError, match="expected one dimension of integer token ids"):
            refused(tokens)


def test_an_id_beyond_int64_is_refused_wherever_it_comes_from():
    import numpy as np

    with pytest.raises(ValueError, match="beyond int64"):
        PrefixHandle(np.array([2**63], np.uint64))
