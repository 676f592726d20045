"""The hash of a growing token list: one a list, however it grew, and one at each of its lengths."""

import random
from hashlib import blake2b

import numpy as np
import pytest

from guided_decode.scoring.remote.prefix_hash import BLOCK, PrefixHash, as_bytes, hash_of

TOKENS = np.random.default_rng(0).integers(0, 2**31 - 1, 5 * BLOCK + 7)


def by_definition(tokens):
    chain = b""
    for start in range(0, len(tokens) // BLOCK * BLOCK, BLOCK):
        block = np.array(tokens[start : start + BLOCK], "<i4").tobytes()
        chain = blake2b(chain + block, digest_size=16).digest()
    rest = np.array(tokens[len(tokens) // BLOCK * BLOCK :], "<i4").tobytes()
    return blake2b(chain + rest, digest_size=16).digest()


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_definitions_however_the_list_grew(seed):
    pieces, grown, known = random.Random(seed), PrefixHash(), 0
    while known < len(TOKENS):
        new = TOKENS[known : known + pieces.choice([0, 1, 1, 2, BLOCK - 1, BLOCK, 3 * BLOCK])]
        grown.extend(as_bytes(new))
        known += len(new)
        assert len(grown) == known
        assert grown.digest == by_definition(TOKENS[:known])


def test_it_tells_the_hash_of_every_beginning():
    whole = hash_of(TOKENS)
    for length in range(len(TOKENS) + 1):
        assert whole.at(length, TOKENS) == by_definition(TOKENS[:length])
    for block in range(len(whole.chain)):
        assert whole.at_block(block) == by_definition(TOKENS[: block * BLOCK])


def test_any_other_token_is_another_hash():
    for at in (0, BLOCK - 1, BLOCK, len(TOKENS) - 1):
        other = TOKENS.copy()
        other[at] += 1
        assert hash_of(other).digest != hash_of(TOKENS).digest
    assert len({hash_of(TOKENS[:n]).digest for n in range(len(TOKENS))}) == len(TOKENS)


def test_what_two_lists_share_is_told_in_whole_blocks():
    other = TOKENS.copy()
    other[2 * BLOCK + 3] += 1
    assert hash_of(TOKENS).common(hash_of(other)) == 2 * BLOCK
    assert hash_of(TOKENS).common(hash_of(TOKENS[: BLOCK + 1])) == BLOCK
    assert hash_of(TOKENS).common(PrefixHash()) == 0


def test_a_token_more_hashes_one_block_at_most(monkeypatch):
    from guided_decode.scoring.remote import prefix_hash

    grown, hashed = hash_of(np.arange(100 * BLOCK)), []
    real = prefix_hash._hash

    def counted(before, tokens):
        hashed.append(tokens)
        return real(before, tokens)

    monkeypatch.setattr(prefix_hash, "_hash", counted)
    for token in range(3 * BLOCK):
        grown.extend(as_bytes(np.array([token])))
        assert grown.digest
        assert sum(map(len, hashed)) <= 2 * 4 * BLOCK
        hashed.clear()
