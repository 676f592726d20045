"""Next-token distributions of the local generator, and the methods that live on them."""

import math

import pytest
import torch

from guided_decode import load_scorer
from guided_decode.search import (
    MCTS,
    NextTokens,
    ScorerJudge,
    Segments,
    load_generator,
    ppo_mcts,
    run,
    run_all,
    segment_rejection,
)
from tests import models

EOS = 2
PROMPTS = [tuple(prompt) for prompt in models.prompts([9, 4, 17], seed=1)]


def policy(**options):
    return load_generator(models.tiny("llama", "lm", seed=1), eos_token_ids=[EOS], **options)


def reference():
    return models.tiny("llama", "lm", seed=4)


def critic():
    return load_scorer(models.tiny("llama", "token"), kind="ppo-critic")


def ask(generator, prefixes, k=5, temperature=1.0, of_reference=False):
    count = len(prefixes)
    return generator.next_tokens(
        prefixes, [k] * count, temperatures=[temperature] * count, references=[of_reference] * count
    )


class Stock:
    """The same by the stock forward of the whole text, and V by that of the critic."""

    def __init__(self):
        self.policy, self.reference = models.tiny("llama", "lm", seed=1), reference()
        self.critic = models.tiny("llama", "token")

    @torch.inference_mode()
    def next_tokens(self, prefixes, k, *, temperatures, references, entropies=None):
        found = []
        for prefix, most, heat, wanted in zip(prefixes, k, temperatures, references, strict=True):
            logits = [
                m(torch.tensor([prefix])).logits[0, -1] for m in (self.policy, self.reference)
            ]
            tokens = logits[0].argsort(descending=True, stable=True)[:most]
            read = [
                tuple((each / t).log_softmax(-1)[tokens].tolist())
                for each in logits
                for t in (1.0, heat)
            ]
            p = logits[0].softmax(-1)
            found.append(
                NextTokens(
                    tuple(tokens.tolist()), read[0], read[1],
                    tuple(token == EOS for token in tokens.tolist()),
                    -(p * p.log()).sum().item(), *(read[2:] if wanted else ()),
                )
            )  # fmt: skip
        return found

    @torch.inference_mode()
    def judge(self, texts):
        values = []
        for text in texts:
            # The critic's family reads V at the token before the end.
            end = text.finished and text.response[-1] == EOS
            ids = (text.prompt + text.response)[: -1 if end else None]
            hidden = self.critic.model(torch.tensor([ids])).last_hidden_state[0, -1]
            values.append(self.critic.score(hidden).item())
        return values


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("of_reference", [False, True])
def test_distributions_are_the_stock_models(temperature, of_reference):
    own = ask(policy(reference=reference()), PROMPTS, 7, temperature, of_reference)
    for found, expected in zip(
        own, ask(Stock(), PROMPTS, 7, temperature, of_reference), strict=True
    ):
        assert (found.tokens, found.ends) == (expected.tokens, expected.ends)
        assert found.entropy == pytest.approx(expected.entropy, abs=1e-4)
        for name in ("log_probs", "tempered", "reference", "reference_tempered"):
            one, other = getattr(found, name), getattr(expected, name)
            assert one == (None if other is None else pytest.approx(other, abs=1e-4))


def test_rows_may_ask_for_different_things():
    both = policy(reference=reference())
    rows = both.next_tokens(
        PROMPTS, [2, 1000, 3], temperatures=[1.0, 0.5, 2.0], references=[False, True, False]
    )
    assert [len(each.tokens) for each in rows] == [2, models.VOCAB, 3]
    assert sum(map(math.exp, rows[1].tempered)) == pytest.approx(1, abs=1e-4)
    assert sum(rows[1].ends) == 1
    assert [each.reference is None for each in rows] == [True, False, True]
    for prompt, row, heat in zip(PROMPTS, rows, (1.0, 0.5, 2.0), strict=True):
        (alone,) = ask(both, [prompt], len(row.tokens), heat)
        assert alone.tokens == row.tokens
        assert alone.tempered == pytest.approx(row.tempered, abs=1e-5)
    assert ask(both, []) == []


def test_what_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match=r"a KL term needs the reference.*reference="):
        ask(policy(), PROMPTS, of_reference=True)
    with pytest.raises(ValueError, match=r"vocabulary of \d+ tokens but its reference"):
        policy(reference=models.tiny("llama", "lm", vocab_size=models.VOCAB + 9))


SETTINGS = {
    "defaults": MCTS(),
    "KL and subtrees": MCTS(20, k=4, kl_coef=0.1, keep_subtree=True, c_puct=2.0),
    "batches": MCTS(20, leaves=4, prior_temperature=0.7),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_tree_on_the_packed_forward_is_the_stock_forwards(settings):
    local, stock = policy(reference=reference()), Stock()
    judge = ScorerJudge(critic(), terminals=[EOS])
    for prompt in PROMPTS[:2]:
        own = run(ppo_mcts(prompt, settings, max_tokens=6), local, judge)
        plain = run(ppo_mcts(prompt, settings, max_tokens=6), stock, stock)
        assert own.details == plain.details
        assert own.best.tokens == plain.best.tokens
        assert own.best.score == pytest.approx(plain.best.score, abs=1e-4)
        assert own.best.log_prob == pytest.approx(plain.best.log_prob, abs=1e-3)


def test_segments_on_the_packed_forward_are_the_stock_forwards():
    local, stock = policy(), Stock()
    judge = ScorerJudge(critic(), terminals=[EOS])
    segments = Segments(target=0.5, entropy=4.0, shortest=2, longest=5, retries=3)
    for seed, prompt in enumerate(PROMPTS):
        search = segment_rejection(prompt, segments, max_tokens=9, seed=seed)
        own = run(search, local, judge)
        again = segment_rejection(prompt, segments, max_tokens=9, seed=seed)
        plain = run(again, stock, stock)
        assert (own.details, own.best.tokens) == (plain.details, plain.best.tokens)


SEARCHES = {
    "mcts": lambda prompt: ppo_mcts(prompt, MCTS(20, k=4), max_tokens=8),
    "mcts, one path": lambda prompt: ppo_mcts(prompt, MCTS(20, k=1), max_tokens=8),
    "mcts with KL": lambda prompt: ppo_mcts(prompt, MCTS.published(20, kl_coef=0.1), max_tokens=8),
    "mcts in batches": lambda prompt: ppo_mcts(
        prompt, MCTS(30, leaves=8, keep_subtree=True, c_puct=1.0), max_tokens=8
    ),
    "segments": lambda prompt: segment_rejection(
        prompt, Segments(target=0.3, entropy=4.0, longest=4, retries=5), max_tokens=12
    ),
}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_no_token_of_the_tree_is_forwarded_twice(search):
    generator, scorer = policy(reference=reference()), critic()
    judge, read, referred, judged = ScorerJudge(scorer, terminals=[EOS]), set(), set(), set()

    def nodes(tokens):
        return {tokens[: i + 1] for i in range(len(tokens))}

    class Watched:
        def next_tokens(self, prefixes, k, *, references, **how):
            for prefix, wanted in zip(prefixes, references, strict=True):
                read.update(nodes(prefix))
                referred.update(nodes(prefix) if wanted else ())
            return generator.next_tokens(prefixes, k, references=references, **how)

        def judge(self, texts):
            for text in texts:
                # V at the end is read at the token before it.
                end = text.finished and text.response[-1] == EOS
                judged.update(nodes((text.prompt + text.response)[: -1 if end else None]))
            return judge.judge(texts)

    watched = Watched()
    results = run_all([search(prompt) for prompt in PROMPTS], watched, watched)
    assert generator.stats.prefix_tokens == len(read)
    assert generator.reference.stats.prefix_tokens == len(referred)
    assert scorer.stats.prefix_tokens + scorer.stats.candidate_tokens == len(judged)
    assert sum(each.spent.policy_tokens for each in results) == len(read) + len(referred)
    assert sum(each.spent.scorer_tokens for each in results) >= len(judged)
