"""A critic that reads what is in the slots it is told to read, and knows nothing else: a thousand
steps a second, and a wrong slot, table or position is a wrong value."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel

from guided_decode.cache.slot_tables import SlotTables
from guided_decode.forward.packed_model import PackedModel
from guided_decode.scoring.critic import CriticScorer

VOCAB = 64
_MODULUS = 9973


def value(tokens):
    """V of a prefix: a number of all its tokens, in order."""
    found = 0
    for token in tokens:
        found = (found * 131 + int(token) + 1) % _MODULUS
    return found / _MODULUS


class Follower:
    """Slot tables that know what they were told, as those of a shard's other ranks do: after each
    write they hold what the critic's own do, and no write names an entry twice, which numpy, a
    follower and a GPU would each take another way."""

    closed = None

    def __init__(self):
        self.followed = self.tables = None
        self.writes = 0

    def follow(self, model):
        pass

    def wrote(self, model, written):
        own = model.cache.tables
        if own is not self.followed:
            self.followed, self.tables = own, SlotTables(own.table.device, 1 << 30)
        self.tables.reshape(*own.table.shape)
        named = [(row, start + i) for row, start, slots in written for i in range(len(slots))]
        assert len(set(named)) == len(named), "an entry is written twice"
        self.tables.write(written)
        assert torch.equal(self.tables.table, own.table), "a follower's tables are others"
        self.writes += len(written)


class ReadingCritic(CriticScorer):
    """Its keys are the tokens themselves; its values are `value` of the keys that a query reads."""

    def __init__(self, cache_tokens, max_forward_tokens=8192, positions=4096, skip_token=None):
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, max_position_embeddings=positions,
        )  # fmt: skip
        model = PackedModel(
            LlamaModel(config).eval(),
            "the reading critic",
            cache_tokens=cache_tokens,
            max_forward_tokens=max_forward_tokens,
        )
        model.leader = self.follower = Follower()
        super().__init__(model, lambda hidden: hidden, graphs=False, skip_token=skip_token)
        self.keys = np.full(cache_tokens + 2, -1, np.int64)

    def _write_values(self, batch):
        ids, positions, slots = (each.numpy() for each in batch.stacked)
        assert len(np.unique(slots)) == len(slots)
        self.keys[slots] = ids
        found = torch.empty(len(ids))
        table = batch.table.numpy()
        for segment in batch.segments:
            count = segment.prefix + segment.candidates
            for at in range(segment.start, segment.start + count):
                read = table[segment.table_row, : positions[at]].tolist()
                found[at] = value(self.keys[[*read, slots[at]]])
        self.cache.pool.values.index_copy_(0, batch.slots, found)
