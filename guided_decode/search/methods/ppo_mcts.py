"""PPO-MCTS: a tree search for each token, with the policy's priors and the critic's values."""

from __future__ import annotations

import math
from collections.abc import Generator as Coroutine
from collections.abc import Sequence
from typing import Any

from guided_decode.search.budget import BudgetSpent
from guided_decode.search.methods.mcts_tree import MCTS, Edge, Node, Walk
from guided_decode.search.methods.pieces import require_counts
from guided_decode.search.requests import Judge, Judged, Next, Request, Tokens
from guided_decode.search.result import Candidate, Search, SearchResult
from guided_decode.search.seeds import uniform


def ppo_mcts(
    prompt: Sequence[int],
    settings: MCTS = MCTS(),  # noqa: B008
    *,
    max_tokens: int = 512,
    seed: int = 0,
) -> Search:
    """Monte Carlo tree search for each token (Liu et al., "Don't throw away your value model!",
    arXiv 2309.15028), with a fresh tree a token.

    The paper's defaults: 10 simulations (it tries 10, 20 and 50), k 10, c_puct 8, τ_e 1, gamma 1,
    no KL term, the most visited token. A simulation follows the largest Q + c_puct·P·√N(s)/(1 +
    N(s,a)), where P is the policy's softmax at τ_e, its k largest not renormalised, and a new
    child's Q is its parent's V; a leaf is worth V at its last token; V(s) becomes the
    visit-weighted mean of its own evaluation and its children's Q, and Q is V(s'), or γV(s') and
    the KL term where kl_coef is not 0. Of tokens with equally many visits the lower id is taken.
    An end has no children: a simulation that comes to it again adds its value again.

    What one tree has evaluated the next one knows, and priors are asked for when a simulation
    first needs them: both change the cost and no choice.

    `details`: "visits", for each token of the response, how often the simulations took each next
    token; "simulations", how many there were.

    Args:
        prompt: token ids.
        settings: see `MCTS`.
        max_tokens: of the response.
        seed: of the draws by visits, where settings.sample.
    """
    require_counts(max_tokens=max_tokens)
    tree = _Tree(tuple(prompt), settings, max_tokens)
    response, log_prob = Candidate(), 0.0
    visits: list[dict[int, int]] = []
    stopped = None
    try:
        root = yield from tree.plant()
        while len(root.response) < max_tokens and not response.finished:
            yield from tree.grow(root)
            visits.append({edge.token: edge.visits for edge in root.edges or () if edge.visits})
            edge = _chosen(root, settings, len(root.response) / max_tokens, seed)
            log_prob += edge.log_prob
            assert edge.child is not None
            root = edge.child
            ended = edge.ends or len(root.response) >= max_tokens
            response = Candidate(root.response, log_prob, ended, root.own)
    except BudgetSpent as limit:
        stopped = str(limit)
    candidates = (response,) if response.tokens else ()
    return SearchResult(candidates, 0 if candidates else None, stopped,
                        {"visits": visits, "simulations": tree.simulated})  # fmt: skip


def _chosen(root: Node, settings: MCTS, share: float, seed: int) -> Edge:
    """The next token, by the visits of the root's edges; share: of the response that is done."""
    assert root.edges is not None
    # By token id, as the paper's code has its visits.
    edges = sorted((edge for edge in root.edges if edge.visits), key=lambda edge: edge.token)
    if not settings.sample:
        return max(edges, key=lambda edge: edge.visits)
    heat = settings.visit_temperature * (1 - share if settings.anneal else 1)
    most = max(edge.visits for edge in edges)
    # By the largest, so that no power overflows as τ_d falls to 0.
    weights = [(edge.visits / most) ** (1 / heat) for edge in edges]
    point = uniform(seed, len(root.response)) * math.fsum(weights)
    for edge, weight in zip(edges, weights, strict=True):
        point -= weight
        if point < 0:
            return edge
    return edges[-1]


class _Tree:
    """What grows a tree: the requests of its simulations."""

    def __init__(self, prompt: Tokens, settings: MCTS, max_tokens: int) -> None:
        self.prompt = prompt
        self.settings = settings
        self.max_tokens = max_tokens
        self.simulated = 0

    def plant(self) -> Coroutine[Request, Any, Node]:
        """The first root."""
        (value,) = yield Judge([Judged(self.prompt, (), False)], per_token=True)
        return Node((), value, False)

    def grow(self, root: Node) -> Coroutine[Request, Any, None]:
        """Runs the simulations of one token."""
        if root.visits == 0 or not self.settings.keep_subtree:
            root.forget()
            root.enter()
        if root.edges is None:
            yield from self._ask([root])
        enough = root.visits + self.settings.simulations
        while (missing := enough - root.visits) > 0:
            walks = yield from self._walks(root, min(missing, self.settings.leaves))
            made = [walk for walk in walks if not walk.met]
            yield from self._evaluate([walk for walk in made if walk.edges[-1].child is None])
            for walk in walks:
                walk.end()
            for walk in made:
                walk.back_up(self.settings)
            self.simulated += len(made)

    def _walks(self, root: Node, most: int) -> Coroutine[Request, Any, list[Walk]]:
        """Simulations up to their leaves, each led by those before it, in one call at most."""
        walks = [Walk() for _ in range(most)]
        for walk in walks:
            walk.go_on(root, self.settings)
        waiting = [walk for walk in walks if walk.waits is not None]
        if waiting:
            # What one of them would change for the next is at or below the node of both.
            nodes = {id(walk.waits): walk.waits for walk in waiting if walk.waits is not None}
            yield from self._ask(list(nodes.values()))
            for walk in waiting:
                assert walk.waits is not None
                walk.go_on(walk.waits, self.settings)
        return walks

    def _ask(self, nodes: Sequence[Node]) -> Coroutine[Request, Any, None]:
        """The priors of nodes."""
        settings = self.settings
        answers = yield Next(
            [self.prompt + each.response for each in nodes], settings.k,
            settings.prior_temperature, settings.kl_coef != 0,
        )  # fmt: skip
        for each, answer in zip(nodes, answers, strict=True):
            each.learn(answer, settings)

    def _evaluate(self, walks: Sequence[Walk]) -> Coroutine[Request, Any, None]:
        """New nodes at the ends of these ways."""
        if not walks:
            return
        settings, texts, ends = self.settings, [], []
        for walk in walks:
            edge = walk.edges[-1]
            response = (*walk.nodes[-1].response, edge.token)
            ends.append(edge.ends or (len(response) >= self.max_tokens and not settings.look_past))
            by_judge = settings.end_value == "judge" or settings.kl_coef != 0
            texts.append(Judged(self.prompt, response, ends[-1] and by_judge))
        values = yield Judge(texts, per_token=True)
        for walk, text, ended, value in zip(walks, texts, ends, values, strict=True):
            walk.edges[-1].child = Node(text.response, value, ended)
