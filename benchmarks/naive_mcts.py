"""PPO-MCTS as its published code runs it: one node a forward, whose caches are copied together.

Our own version of what that code does with a batch of one. A token begins with a forward of its
whole prefix by both models. Every simulation then joins the keys and values of the nodes on its
way into a cache (one copy), forwards one token by policy and critic on it, stacks the cache that
comes back (a second), and keeps the new token's part. The published code pads each joined cache,
too, for the sake of its batches; that copy is left out.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.baselines import Models
from guided_decode.forward.cache_argument import cache_argument, returned_cache
from guided_decode.search import MCTS


@dataclass(eq=False)
class Node:
    """A node of the tree: its caches' parts by model, and a table of its k edges."""

    token: int
    parent: "Node | None"
    states: dict[str, Tensor]  # [layers, 2, heads, tokens, width]
    tokens: list[int]
    priors: list[float]
    value: float
    visits: int = 1
    q: list[float] = field(default_factory=list)
    edge_visits: list[int] = field(default_factory=list)
    children: "list[Node | None]" = field(default_factory=list)

    def __post_init__(self) -> None:
        k = len(self.tokens)
        self.q, self.edge_visits, self.children = [self.value] * k, [0] * k, [None] * k


class NaiveSearch:
    """Decodes tokens one after the other, each by a fresh tree."""

    def __init__(self, models: Models, prompt: list[int], settings: MCTS) -> None:
        self.models = models
        self.ids = list(prompt)
        self.settings = settings

    def step(self) -> dict[int, int]:
        """Decodes one token; returns how often each next token was taken."""
        root = self._node(None, torch.tensor([self.ids]))
        for _ in range(self.settings.simulations):
            self._simulate(root)
        pairs = zip(root.tokens, root.edge_visits, strict=True)
        visits = {token: count for token, count in pairs if count}
        self.ids.append(max(sorted(visits), key=lambda token: visits[token]))
        return visits

    def _simulate(self, root: Node) -> None:
        node, edge = root, self._select(root)
        while (child := node.children[edge]) is not None:
            node, edge = child, self._select(child)
        leaf = self._node(node, torch.tensor([[node.tokens[edge]]]))
        node.children[edge] = leaf
        self._back_up(leaf)

    def _select(self, node: Node) -> int:
        explore = self.settings.c_puct * math.sqrt(node.visits)
        scores = [
            q + explore * prior / (1 + visits)
            for q, prior, visits in zip(node.q, node.priors, node.edge_visits, strict=True)
        ]
        return scores.index(max(scores))

    def _back_up(self, leaf: Node) -> None:
        child = leaf
        while (parent := child.parent) is not None:
            edge = parent.tokens.index(child.token)
            before, parent.q[edge] = parent.q[edge], child.value
            parent.edge_visits[edge] += 1
            total = parent.value * parent.visits - before * (child.visits - 1)
            parent.value = (total + child.value * child.visits) / (parent.visits + 1)
            parent.visits += 1
            child = parent

    def _node(self, parent: Node | None, tokens: Tensor) -> Node:
        """Forwards tokens, [1, n], behind a node by both models."""
        models = self.models
        logits, of_policy = self._forward(models.policy, "policy", parent, tokens)
        hidden, of_critic = self._forward(models.critic, "critic", parent, tokens)
        priors, found = logits[0, -1].float().softmax(-1).topk(self.settings.k)
        return Node(
            int(tokens[0, -1]), parent, {"policy": of_policy, "critic": of_critic},
            found.tolist(), priors.tolist(), models.head(hidden[:, -1]).item(),
        )  # fmt: skip

    def _forward(
        self, model: Any, name: str, parent: Node | None, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The output, and the new tokens' part of the cache."""
        cached = {cache_argument(model): self._joined(model, name, parent)}
        if name == "policy":
            cached["logits_to_keep"] = 1
        output = model(tokens, use_cache=True, **cached)
        layers = [torch.stack([one.keys, one.values]) for one in returned_cache(output).layers]
        whole = torch.stack(layers)[:, :, 0]
        return output[0], whole[..., -tokens.shape[1] :, :].clone()

    @staticmethod
    def _joined(model: Any, name: str, parent: Node | None) -> DynamicCache:
        """The caches' parts on the way to a node, as one cache."""
        cache = DynamicCache(config=model.config)
        parts: list[Tensor] = []
        while parent is not None:
            parts.append(parent.states[name])
            parent = parent.parent
        if parts:
            joined = torch.cat(parts[::-1], dim=-2)
            for layer, (keys, values) in zip(cache.layers, joined, strict=True):
                layer.lazy_initialization(keys[None], values[None])
                layer.keys, layer.values = keys[None], values[None]
        return cache
