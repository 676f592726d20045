"""PPO-MCTS against a plain recursive search, and against the arithmetic of the paper's code."""

import math
from collections import Counter
from dataclasses import replace

import pytest
from scipy.stats import chisquare

from guided_decode.search import MCTS, Judged, best_of_n, ppo_mcts, run, run_all
from tests.search.toy import DEPTH, END, PROMPT, VOCAB, ToyJudge, ToyPolicy, tempered

TREES = range(50)


class Plain:
    """The definition, one prefix at a time: N(s) and V(s) of one tree."""

    def __init__(self, policy, judge, settings, depth):
        self.policy, self.judge, self.settings, self.depth = policy, judge, settings, depth
        self.n, self.v, self.pending = {}, {}, Counter()

    def ended(self, s):
        return s[-1:] == (END,) or (len(s) >= self.depth and not self.settings.look_past)

    def own(self, s):
        published = self.settings.end_value == "published" and self.settings.kl_coef == 0
        return self.judge.value(Judged(PROMPT, s, self.ended(s) and not published))

    def priors(self, s):
        p = tempered(self.policy.probabilities(PROMPT + s), self.settings.prior_temperature)
        best = sorted(range(VOCAB), key=lambda a: -p[a])[: self.settings.k]
        return {a: p[a] for a in best}

    def penalty(self, s, a):
        if self.settings.kl_coef == 0:
            return 0.0
        p = self.policy.probabilities(PROMPT + s)
        ref = self.policy.reference().probabilities(PROMPT + s)
        if self.settings.kl_term == "log-ratio":
            term = math.log(p[a] / ref[a])
        else:
            heat = self.settings.prior_temperature
            term = tempered(p, heat)[a] - tempered(ref, heat)[a]
        return -self.settings.kl_coef * (max(term, 0) if self.settings.clamp_kl else term)

    def q(self, s, a):
        child = (*s, a)
        if child not in self.n:
            return self.own(s)
        gamma = self.settings.gamma if self.settings.kl_coef else 1
        return gamma * self.v[child] + self.penalty(s, a)

    def best(self, s):
        def score(a):
            child, under_way = (*s, a), self.pending[(*s, a)]
            visits = self.n.get(child, 0) + under_way
            total = self.n[s] + sum(self.pending[(*s, b)] for b in priors)
            loss = self.settings.virtual_loss * under_way / visits if under_way else 0
            explore = self.settings.c_puct * priors[a] * math.sqrt(total) / (1 + visits)
            return self.q(s, a) - loss + explore

        priors = self.priors(s)
        return max(priors, key=score)

    def simulate(self, s=()):
        if s not in self.n or self.ended(s):
            self.n[s] = self.n.get(s, 0) + 1
            self.v[s] = self.own(s)
            return
        self.simulate((*s, self.best(s)))
        self.average(s)

    def average(self, s):
        self.n[s] += 1
        children = [a for a in range(VOCAB) if (*s, a) in self.n]
        total = sum(self.n[(*s, a)] * self.q(s, a) for a in children)
        self.v[s] = (self.own(s) + total) / self.n[s]

    def batch(self, root, most):
        """Leaves that are looked for one after the other and backed up at the end."""
        ways = []
        for _ in range(most):
            s = root
            while s in self.n and not self.ended(s):
                s = (*s, self.best(s))
            if s in self.n or not self.pending[s]:
                ways.append(s)
            self.pending.update(s[:i] for i in range(len(root) + 1, len(s) + 1))
        self.pending.clear()
        for s in ways:
            self.n[s] = self.n.get(s, 0) + 1
            self.v[s] = self.own(s)
            for i in range(len(s) - 1, len(root) - 1, -1):
                self.average(s[:i])
        return len(ways)

    def visits(self, s):
        return {a: self.n[(*s, a)] for a in range(VOCAB) if (*s, a) in self.n}


def plainly(policy, judge, settings, depth):
    """Visits of each token, and the response."""
    response, found, tree = (), [], Plain(policy, judge, settings, depth)
    while not (response[-1:] == (END,) or len(response) >= depth):
        if not settings.keep_subtree:
            tree = Plain(policy, judge, settings, depth)
        if response not in tree.n:
            tree.simulate(response)
        enough = tree.n[response] + settings.simulations
        while (missing := enough - tree.n[response]) > 0:
            if settings.leaves == 1:
                tree.simulate(response)
            else:
                tree.batch(response, min(missing, settings.leaves))
        visits = tree.visits(response)
        found.append(visits)
        response += (max(sorted(visits), key=visits.get),)
    return found, response


def check(settings, seed, depth=DEPTH):
    policy, judge = ToyPolicy(seed), ToyJudge(seed)
    result = run(ppo_mcts(PROMPT, settings, max_tokens=depth), policy, judge)
    visits, response = plainly(policy, judge, settings, depth)
    assert result.details["visits"] == visits
    assert result.best.tokens == response
    assert result.best.finished
    return result


@pytest.mark.parametrize("simulations", [10, 20, 50])
@pytest.mark.parametrize("seed", TREES)
def test_visits_at_the_papers_defaults_are_those_of_a_plain_search(seed, simulations):
    result = check(MCTS(simulations=simulations), seed)
    assert all(sum(each.values()) == simulations for each in result.details["visits"])
    policy, tokens = ToyPolicy(seed), result.best.tokens
    assert result.best.log_prob == pytest.approx(
        sum(math.log(policy.probabilities(PROMPT + tokens[:i])[a]) for i, a in enumerate(tokens))
    )
    assert result.best.score == ToyJudge(seed).value(Judged(PROMPT, tokens, True))


OTHER = {
    "k": MCTS(k=2),
    "c_puct": MCTS(c_puct=0.3, simulations=30),
    "prior temperature": MCTS(prior_temperature=0.4, c_puct=1.0),
    "KL, as in the paper": MCTS(kl_coef=0.3, gamma=0.9, c_puct=2.0),
    "KL, as in the code": MCTS(kl_coef=0.8, kl_term="probability", prior_temperature=2.0),
    "clamped": MCTS(kl_coef=0.5, clamp_kl=True, c_puct=1.0),
    "clamped, as in the code": MCTS(kl_coef=2.0, clamp_kl=True, kl_term="probability", c_puct=1),
    "published": MCTS.published(20),
    "published with KL": MCTS.published(20, kl_coef=0.5),
    "subtrees kept": MCTS(simulations=20, keep_subtree=True, c_puct=1.0),
    "batches": MCTS(simulations=20, leaves=4, c_puct=1.0),
    "batches without loss": MCTS(simulations=20, leaves=8, virtual_loss=0.0),
    "all": MCTS(30, c_puct=1.0, kl_coef=0.2, keep_subtree=True, leaves=3, virtual_loss=0.5),
}


@pytest.mark.parametrize("settings", OTHER.values(), ids=OTHER)
@pytest.mark.parametrize("seed", range(12))
def test_visits_with_other_settings_are_those_of_a_plain_search(seed, settings):
    check(settings, seed)


@pytest.mark.parametrize("settings", [MCTS(20), MCTS.published(20)], ids=["judge", "published"])
@pytest.mark.parametrize("seed", range(12))
def test_simulations_look_past_the_most_tokens_only_as_published(seed, settings):
    check(settings, seed, depth=2)


def test_each_setting_matters():
    changes = [
        {}, {"simulations": 30}, {"k": 2}, {"c_puct": 3.0}, {"prior_temperature": 0.5},
        {"kl_coef": 0.5}, {"kl_coef": 0.5, "kl_term": "probability"}, {"kl_coef": 0.7},
        {"kl_coef": 0.5, "clamp_kl": True}, {"kl_coef": 0.5, "gamma": 0.7}, {"leaves": 4},
        {"leaves": 4, "virtual_loss": 0.1}, {"end_value": "published"}, {"look_past": True},
        {"keep_subtree": True},
    ]  # fmt: skip
    found = []
    for changed in changes:
        settings = MCTS(**{"simulations": 20, "c_puct": 1.0} | changed)
        searches = [ppo_mcts(PROMPT, settings, max_tokens=3) for _ in TREES]
        found.append(
            [
                run(each, ToyPolicy(seed), ToyJudge(seed)).details["visits"]
                for seed, each in enumerate(searches)
            ]
        )
    for i, one in enumerate(found):
        assert one not in found[:i], changes[i]


class AsPublished:
    """The arithmetic of the paper's code: tables of edges, running means, children below ends."""

    def __init__(self, policy, judge, simulations, c_puct=8.0):
        self.policy, self.judge, self.c_puct = policy, judge, c_puct
        self.nodes = [self.node((), None)]
        for _ in range(simulations):
            self.simulate()

    def node(self, s, parent):
        value = self.judge.value(Judged(PROMPT, s, False))
        return {"s": s, "parent": parent, "n": 1, "v": value, "end": s[-1:] == (END,),
                "p": self.policy.probabilities(PROMPT + s), "q": [value] * VOCAB,
                "visits": [0] * VOCAB, "children": [None] * VOCAB}  # fmt: skip

    def simulate(self):
        node = self.nodes[0]
        while True:
            scores = [
                node["q"][a] + math.sqrt(node["n"]) * self.c_puct * node["p"][a]
                / (node["visits"][a] + 1)
                for a in range(VOCAB)
            ]  # fmt: skip
            a = scores.index(max(scores))
            if node["children"][a] is None:
                break
            node = node["children"][a]
        child = node["children"][a] = self.node(node["s"] + (a,), node)
        while (parent := child["parent"]) is not None:
            a = child["s"][-1]
            before, parent["q"][a] = parent["q"][a], child["v"]
            parent["visits"][a] += 1
            if not parent["end"]:
                gone = parent["v"] * parent["n"] - before * (child["n"] - 1)
                parent["v"] = (gone + child["v"] * child["n"]) / (parent["n"] + 1)
            parent["n"] += 1
            child = parent


@pytest.mark.parametrize("simulations", [10, 50])
@pytest.mark.parametrize("seed", TREES)
def test_the_published_preset_counts_as_the_published_code_does(seed, simulations):
    policy, judge = ToyPolicy(seed), ToyJudge(seed)
    settings = MCTS.published(simulations)
    result = run(ppo_mcts(PROMPT, settings, max_tokens=DEPTH), policy, judge)
    tree = AsPublished(policy, judge, simulations)
    visits = dict(enumerate(tree.nodes[0]["visits"]))
    assert result.details["visits"][0] == {a: n for a, n in visits.items() if n}
    assert result.best.tokens[0] == max(visits, key=visits.get)


@pytest.mark.parametrize("anneal", [False, True])
def test_tokens_may_be_drawn_by_their_visits(anneal):
    policy, judge, heat = ToyPolicy(4), ToyJudge(4), 1.5
    settings = MCTS(20, sample=True, visit_temperature=heat, anneal=anneal, c_puct=3.0)
    drawn, second = Counter(), Counter()
    for seed in range(500):
        result = run(ppo_mcts(PROMPT, settings, max_tokens=2, seed=seed), policy, judge)
        visits = result.details["visits"]
        drawn[result.best.tokens[0]] += 1
        if result.best.tokens[0] == 0:
            second[result.best.tokens[1]] += 1
            after = visits[1]
    for counts, own, power in (
        (drawn, visits[0], 1 / heat),
        (second, after, 1 / (heat * (0.5 if anneal else 1))),
    ):
        weights = {a: n**power for a, n in own.items()}
        scale = counts.total() / sum(weights.values())
        expected = [each * scale for each in weights.values()]
        assert chisquare([counts[a] for a in weights], expected).pvalue > 1e-3


def test_an_annealed_temperature_of_visits_ends_at_the_most_visited():
    settings = MCTS(20, sample=True, visit_temperature=0.01)
    for seed in range(20):
        policy, judge = ToyPolicy(seed), ToyJudge(seed)
        greedy = run(ppo_mcts(PROMPT, MCTS(20), max_tokens=400), policy, judge)
        drawn = run(ppo_mcts(PROMPT, settings, max_tokens=400), policy, judge)
        visits = greedy.details["visits"][0]
        if Counter(visits.values())[max(visits.values())] == 1:
            assert drawn.best.tokens[0] == greedy.best.tokens[0]


def asked(settings, seed=0):
    """What a search asked: prefixes of the policy, texts of the judge, and calls of each."""
    policy, judge = ToyPolicy(seed), ToyJudge(seed)
    read, judged = [], []

    class Watching:
        def next_tokens(self, prefixes, k, **how):
            read.append(list(prefixes))
            return policy.next_tokens(prefixes, k, **how)

        def judge(self, texts):
            judged.append(list(texts))
            return judge.judge(texts)

    watching = Watching()
    result = run(ppo_mcts(PROMPT, settings, max_tokens=DEPTH), watching, watching)
    return result, read, judged


@pytest.mark.parametrize("settings", [MCTS(), MCTS(50), MCTS(20, leaves=4)], ids=str)
@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_asked_twice_and_no_prior_that_no_simulation_needs(seed, settings):
    result, read, judged = asked(settings, seed)
    prefixes = [each for call in read for each in call]
    texts = [each for call in judged for each in call]
    assert len(set(prefixes)) == len(prefixes)
    assert len(set(texts)) == len(texts)
    # A node is evaluated before its priors are asked for, and an end's never are.
    responses = {PROMPT + text.response for text in texts if not text.finished}
    assert set(prefixes) <= responses
    assert len(prefixes) < len(responses)
    assert result.spent.generated == len(prefixes)
    if settings.leaves == 1:
        assert {len(call) for call in (*read, *judged)} == {1}


def test_leaves_of_a_batch_share_calls():
    single, *of_single = asked(MCTS(50, c_puct=1.0))
    batched, *of_batched = asked(MCTS(50, leaves=8, c_puct=1.0))
    assert single.details["simulations"] == 50 * len(single.details["visits"])
    assert batched.details["simulations"] == 50 * len(batched.details["visits"])
    assert 2 * sum(map(len, of_batched)) < sum(map(len, of_single))


@pytest.mark.parametrize("seed", TREES)
def test_simulations_come_on_top_of_a_kept_subtree(seed):
    settings = MCTS(30, keep_subtree=True)
    result = run(ppo_mcts(PROMPT, settings, max_tokens=DEPTH), ToyPolicy(seed), ToyJudge(seed))
    kept = 0
    for token, visits in zip(result.best.tokens, result.details["visits"], strict=True):
        assert sum(visits.values()) == kept + 30
        # A node's visits but its own first one are its children's.
        kept = visits[token] - 1
    assert result.details["simulations"] == 30 * len(result.best.tokens)


def test_searches_side_by_side_share_calls():
    policy, judge = ToyPolicy(), ToyJudge()
    searches = [lambda i=i: ppo_mcts((0, i % 3), MCTS(), max_tokens=DEPTH) for i in range(6)]
    alone = [run(each(), policy, judge) for each in searches]
    many, judged = ToyPolicy(), ToyJudge()
    others = [best_of_n(PROMPT, n=3, max_tokens=DEPTH)]
    together = run_all([*(each() for each in searches), *others], many, judged)
    assert [each.details for each in together[:-1]] == [each.details for each in alone]
    assert len(many.calls) < len(policy.calls) / 2
    assert len(judged.calls) < len(judge.calls) / 2


def test_a_generator_without_distributions_is_refused():
    class OnlyExtends:
        def extend(self, prefixes, n, **how):
            return []

    with pytest.raises(ValueError, match=r"OnlyExtends has no next_tokens: this method needs"):
        run(ppo_mcts(PROMPT), OnlyExtends(), ToyJudge())


def test_settings_without_meaning_are_refused():
    for wrong in (
        {"simulations": 0}, {"k": 0}, {"leaves": -1}, {"c_puct": 0.0}, {"prior_temperature": 0.0},
        {"visit_temperature": -1.0}, {"kl_coef": -0.1}, {"virtual_loss": math.nan}, {"gamma": 1.1},
        {"kl_term": "forward"}, {"end_value": "none"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MCTS(**wrong)
    assert replace(MCTS.published(), kl_term="log-ratio", end_value="judge", look_past=False) == (
        MCTS()
    )
