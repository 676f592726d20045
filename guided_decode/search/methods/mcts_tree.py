"""The tree of PPO-MCTS: nodes, the PUCT rule, and what a simulation changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from guided_decode.search.methods.pieces import require_counts
from guided_decode.search.requests import NextTokens, Tokens

KLTerm = Literal["log-ratio", "probability"]


@dataclass(frozen=True, slots=True)
class MCTS:
    """The settings of PPO-MCTS; the defaults are the paper's (Liu et al., arXiv 2309.15028).

    simulations: S, a token; the paper tries 10, 20 and 50. k: next tokens that a node may have.
    c_puct: weight of exploration, in units of value. prior_temperature: τ_e, of the priors.

    sample: the token is drawn by visits^(1/τ_d), and not the most visited one. visit_temperature:
    τ_d of the first token. anneal: τ_d falls linearly to 0 at the most tokens.

    gamma: discount; like the paper's code, only where kl_coef is not 0. kl_coef: weight of the KL
    term, which wants a reference beside the policy. kl_term: "log-ratio", log p − log p_ref, as in
    the paper (at temperature 1); "probability", p − p_ref, as in its code (at τ_e). clamp_kl: no
    term below 0 counts.

    end_value: of a finished response: "judge", what its judge says by the critic's terminal rule;
    "published", that only where kl_coef is not 0, and else the critic's output at the
    end-of-sequence token. look_past: simulations go on where the response has its most tokens, as
    in the paper's code; else they end there.

    Beyond the paper, and off: keep_subtree: what was simulated below the chosen token is kept, and
    the next token's simulations come on top of it. leaves: simulations that are under way at the
    same time, and evaluated in one batch; one that comes to another's leaf is dropped.
    virtual_loss: what one that is under way takes off a value, in units of value, so that the
    others of its batch look elsewhere.
    """

    simulations: int = 10
    k: int = 10
    c_puct: float = 8.0
    prior_temperature: float = 1.0
    sample: bool = False
    visit_temperature: float = 1.0
    anneal: bool = True
    gamma: float = 1.0
    kl_coef: float = 0.0
    kl_term: KLTerm = "log-ratio"
    clamp_kl: bool = False
    end_value: Literal["judge", "published"] = "judge"
    look_past: bool = False
    keep_subtree: bool = False
    leaves: int = 1
    virtual_loss: float = 1.0

    def __post_init__(self) -> None:
        require_counts(simulations=self.simulations, k=self.k, leaves=self.leaves)
        for name in ("c_puct", "prior_temperature", "visit_temperature"):
            if not (given := getattr(self, name)) > 0:
                raise ValueError(f"{name}={given}: expected a number above 0")
        for name in ("kl_coef", "virtual_loss"):
            if not (given := getattr(self, name)) >= 0:
                raise ValueError(f"{name}={given}: expected a number of at least 0")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: expected a number above 0 and at most 1")
        for name, words in (("kl_term", ("log-ratio", "probability")),
                            ("end_value", ("judge", "published"))):  # fmt: skip
            if (given := getattr(self, name)) not in words:
                raise ValueError(f"{name}={given!r}: expected {words[0]!r} or {words[1]!r}")

    @classmethod
    def published(cls, simulations: int = 10, kl_coef: float = 0.0) -> MCTS:
        """What the paper's code does where that differs from the paper."""
        return cls(simulations, kl_coef=kl_coef, kl_term="probability", end_value="published",
                   look_past=True)  # fmt: skip


@dataclass(slots=True, eq=False)
class Edge:
    """A next token of a node. penalty: its KL term, weighted; pending: simulations under way."""

    token: int
    log_prob: float
    prior: float
    penalty: float
    ends: bool
    child: Node | None = None
    pending: int = 0

    @property
    def visits(self) -> int:
        """N(s,a): of this tree."""
        return 0 if self.child is None else self.child.visits


@dataclass(slots=True, eq=False)
class Node:
    """A prefix of the response.

    own: V of the prefix. ended: the response ends here, and no simulation goes on. visits, value:
    N(s) and V(s) of this tree; a node with 0 visits was evaluated for an earlier one. edges: its
    next tokens, the likeliest first; None: not asked for yet.
    """

    response: Tokens
    own: float
    ended: bool
    visits: int = 0
    value: float = 0.0
    edges: list[Edge] | None = None

    def enter(self) -> None:
        """Its first simulation in this tree."""
        self.visits, self.value = 1, self.own

    def forget(self) -> None:
        """Takes the node and what is below it out of the tree; evaluations stay."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            node.visits, node.value = 0, 0.0
            waiting += [edge.child for edge in node.edges or () if edge.child is not None]

    def learn(self, answer: NextTokens, settings: MCTS) -> None:
        """Makes the edges of what the policy says."""
        self.edges = [
            Edge(token, log_prob, math.exp(tempered), penalty, ends)
            for token, log_prob, tempered, penalty, ends in zip(
                answer.tokens, answer.log_probs, answer.tempered, penalties(answer, settings),
                answer.ends, strict=True,
            )
        ]  # fmt: skip

    def q(self, edge: Edge, settings: MCTS) -> float:
        """Q(s,a): γV(s') and the KL term; of a next token without visits, this node's own V."""
        if edge.child is None or edge.child.visits == 0:
            return self.own
        if settings.kl_coef == 0:
            return edge.child.value
        return settings.gamma * edge.child.value + edge.penalty

    def select(self, settings: MCTS) -> Edge:
        """The edge of the largest Q + c_puct·P·√N(s)/(1 + N(s,a)), of equals the likeliest.

        A simulation under way counts as a visit that came back with Q less the virtual loss.
        """
        assert self.edges
        explore = settings.c_puct * math.sqrt(self.visits + sum(e.pending for e in self.edges))

        def score(edge: Edge) -> float:
            visits = edge.visits + edge.pending
            lost = settings.virtual_loss * edge.pending / visits if edge.pending else 0.0
            return self.q(edge, settings) - lost + explore * edge.prior / (1 + visits)

        return max(self.edges, key=score)


@dataclass(slots=True, eq=False)
class Walk:
    """A simulation's way from the root to a leaf: nodes[i] and the edge taken there.

    waits: the node whose edges it must know to go on; None: it is at its leaf. met: another
    simulation under way came to the same leaf before it, so that it does not count.
    """

    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    waits: Node | None = None
    met: bool = False

    def go_on(self, node: Node, settings: MCTS) -> None:
        """From a node to a leaf, or to a node without edges."""
        while node.edges is not None:
            edge = node.select(settings)
            self.met = edge.pending > 0 and edge.visits == 0
            edge.pending += 1
            self.nodes.append(node)
            self.edges.append(edge)
            if edge.child is None or edge.child.visits == 0 or edge.child.ended:
                self.waits = None
                return
            node = edge.child
        self.waits = node

    def end(self) -> None:
        """It is no longer under way."""
        for edge in self.edges:
            edge.pending -= 1

    def back_up(self, settings: MCTS) -> None:
        """Counts the visit on the way, and makes V(s) the visit-weighted mean of its parts."""
        leaf = self.edges[-1].child
        assert leaf is not None
        if leaf.visits == 0:
            leaf.enter()
        else:
            # An end that is visited again says the same again.
            leaf.visits += 1
        for node in reversed(self.nodes):
            assert node.edges is not None
            node.visits += 1
            total = math.fsum(
                edge.visits * node.q(edge, settings) for edge in node.edges if edge.visits
            )
            node.value = (node.own + total) / node.visits


def penalties(answer: NextTokens, settings: MCTS) -> Sequence[float]:
    """−kl_coef times the KL term of each next token."""
    if settings.kl_coef == 0:
        return [0.0] * len(answer.tokens)
    assert answer.reference is not None
    assert answer.reference_tempered is not None
    if settings.kl_term == "log-ratio":
        terms = [own - other for own, other in zip(answer.log_probs, answer.reference, strict=True)]
    else:
        terms = [
            math.exp(own) - math.exp(other)
            for own, other in zip(answer.tempered, answer.reference_tempered, strict=True)
        ]
    if settings.clamp_kl:
        terms = [max(0.0, each) for each in terms]
    return [-settings.kl_coef * each for each in terms]
