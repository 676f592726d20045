"""`guide` and `select_candidates` equal the definition on any row: ties, −inf, any config."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_decode import GuidanceConfig, Scores, guide
from guided_decode.guidance.rule import select_candidates
from tests import oracle

# Few distinct logits, so that ties are the rule.
LOGIT = st.one_of(
    st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 0.5, 3.0, 3.0000002]), st.floats(-30, 30, width=32)
)
VALUE = st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 0.5]), st.floats(-5, 5, width=32))
CONFIG = st.builds(
    lambda prune, margin, **fields: GuidanceConfig(
        rule="prune" if prune else "reweight", margin=margin if prune else None, **fields
    ),
    prune=st.booleans(),
    margin=st.sampled_from([0.0, 0.5, 2.0]),
    beta=st.sampled_from([-2.0, 0.0, 1.0, 30.0]),
    top_k=st.integers(1, 8),
    top_p=st.sampled_from([0.2, 0.65, 0.93, 1.0]),
    tail=st.sampled_from(["mask", "keep"]),
    baseline=st.sampled_from(["prefix", "mean"]),
    gate=st.sampled_from([None, 0.4]),
    kl_coef=st.sampled_from([0.0, 0.3]),
)


class Table:
    """Values that the test chose, in the place of a model's."""

    def __init__(self, baseline, quality):
        self.baseline, self.quality = baseline, quality

    def __call__(self, sequences):
        return [self.baseline for _ in sequences]

    def after(self, prefix, tokens):
        return [self.quality[token] for token in tokens]


def mass_is_near(logits, top_p):
    """Whether float32 may cut the candidates at another place than float64."""
    alive = sorted((math.exp(x) for x in oracle.log_softmax(logits)), reverse=True)
    sums = [math.fsum(alive[: n + 1]) for n in range(len(alive))]
    return any(abs(total - top_p) < 1e-5 for total in sums)


@settings(max_examples=300)
@given(
    rows=st.lists(st.lists(LOGIT, min_size=8, max_size=8), min_size=1, max_size=4),
    top_k=st.integers(1, 8),
    top_p=st.sampled_from([1e-3, 0.2, 0.65, 0.93, 1.0]),
)
def test_candidates_are_those_of_the_definition(rows, top_k, top_p):
    chosen = select_candidates(torch.tensor(rows), top_k, top_p)
    assert chosen.shape == (len(rows), top_k)
    for logits, got in zip(torch.tensor(rows).tolist(), chosen.tolist(), strict=True):
        if all(x == -math.inf for x in logits):
            assert got == [-1] * top_k
        elif top_p == 1 or not mass_is_near(logits, top_p):
            wanted = oracle.candidates(logits, top_k, top_p)
            assert got == wanted + [-1] * (top_k - len(wanted))


@settings(max_examples=400)
@given(
    logits=st.lists(LOGIT, min_size=8, max_size=8).filter(lambda row: max(row) > -math.inf),
    quality=st.lists(VALUE, min_size=8, max_size=8),
    reference=st.lists(st.floats(-6, 6, width=32), min_size=8, max_size=8),
    baseline=VALUE,
    config=CONFIG,
    terminals=st.sets(st.integers(0, 7), max_size=3),
)
def test_guided_logits_are_those_of_the_definition(
    logits, quality, reference, baseline, config, terminals
):
    brute = oracle.Oracle(
        Table(baseline, quality), reference=lambda prefix: oracle.log_softmax(reference)
    )
    row = brute.row([1], logits, config, terminals)
    logp = oracle.log_softmax(logits)
    top = max(logp)
    if config.gate is not None and abs(math.exp(top) - config.gate) < 1e-5:
        return
    chosen = torch.tensor([row.candidates])
    ratio = [logp[a] - oracle.log_softmax(reference)[a] for a in row.candidates]
    result = guide(
        torch.tensor([logits]),
        chosen,
        Scores(torch.tensor([[quality[a] for a in row.candidates]]), torch.tensor([baseline])),
        config,
        exempt=torch.tensor([[a in terminals for a in row.candidates]]),
        log_ratio=torch.tensor([ratio]),
        active=torch.tensor([config.gate is None or math.exp(top) < config.gate]),
    )
    decided = [a for a in range(8) if a not in row.undecided]
    torch.testing.assert_close(
        result[0, decided].double(),
        torch.tensor(row.logits).double()[decided],
        rtol=1e-6,
        atol=1e-4,
    )
    for a in row.undecided:
        assert result[0, a] in (logits[a], -math.inf)
