"""Blockwise search: beams grow by blocks of tokens, and the judge says which go on."""

from __future__ import annotations

from collections.abc import Generator as Coroutine
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from guided_decode.search.budget import BudgetSpent
from guided_decode.search.methods.pieces import longer, require_counts
from guided_decode.search.methods.vote import Answer, elect
from guided_decode.search.requests import Extend, Judge, Request, Sampling, Tokens
from guided_decode.search.result import Candidate, Search, SearchResult, highest
from guided_decode.search.seeds import derive


@dataclass(frozen=True, slots=True)
class Blocks:
    """The shape of a blockwise search.

    width: beams that are kept. branches: continuations that are drawn of each. block: the most
    tokens of one. margin: beams whose value is more than this below the best one's go as well; None
    keeps the width. trees: independent searches of this shape, whose responses meet at the end.
    leave: a finished response leaves its tree, which goes on with one beam less; else it stays in
    the competition, and the tree ends when the best beam is finished. patient: when all that it
    keeps are, for those that stay. spread: all beams begin at the prompt, so that the first round
    draws width · branches continuations of it, as later ones do; else one beam does.
    """

    width: int = 4
    branches: int = 4
    block: int = 32
    margin: float | None = None
    trees: int = 1
    leave: bool = False
    patient: bool = False
    spread: bool = False

    def __post_init__(self) -> None:
        require_counts(width=self.width, branches=self.branches, block=self.block, trees=self.trees)
        if self.margin is not None and not self.margin >= 0:
            raise ValueError(f"margin={self.margin}: expected a number of at least 0, or None")
        if self.leave and self.patient:
            raise ValueError("leave and patient: a response that leaves is not waited for; "
                             "expected one of them at most")  # fmt: skip

    @classmethod
    def cd(cls, branches: int = 6, block: int = 32) -> Blocks:
        """Blockwise controlled decoding: the best of K blocks by V.

        Mudgal et al., arXiv 2310.17022; K = 6 is the paper's: best-of-50 on its length task.
        """
        return cls(width=1, branches=branches, block=block)

    @classmethod
    def vgs(cls, blocks: int = 8, width: int = 2, block: int = 4096, trees: int = 1) -> Blocks:
        """Value-guided search: `blocks` blocks a round, `width` of each beam.

        Wang et al., arXiv 2505.17373; as in its code, the first round's blocks are all drawn after
        the prompt. With several trees, DVTS. Its published form ends with a weighted vote: pass
        `answer`.
        """
        if blocks % width:
            raise ValueError(f"blocks={blocks} is no multiple of width={width}")
        return cls(
            width=blocks // width, branches=width, block=block, trees=trees, leave=True, spread=True
        )

    @classmethod
    def dvts(cls, trees: int = 4, branches: int = 4, block: int = 2048) -> Blocks:
        """Diverse verifier tree search: of each tree's `branches` steps the best one goes on.

        Of Hugging Face's search-and-learn, whose n is trees · branches; there a step ends at
        "\\n\\n" (pass it as a stop string) or at 2,048 tokens, drawn at temperature 0.8.
        """
        return cls(width=1, branches=branches, block=block, trees=trees)

    @classmethod
    def chunk_beam(cls, width: int = 4, branches: int = 4, chunk: int = 30) -> Blocks:
        """Chunk-level beam search on an implicit reward (Zhou et al., arXiv 2405.19262).

        As in its code: width · branches chunks after the prompt at first, and on until all beams
        that are kept are finished.
        """
        return cls(width=width, branches=branches, block=chunk, patient=True, spread=True)

    @classmethod
    def value_beam(cls, width: int = 4, branches: int = 4, margin: float | None = None) -> Blocks:
        """Beam search by value, one token a round; `margin` prunes."""
        return cls(width=width, branches=branches, block=1, margin=margin)


@dataclass(slots=True)
class _Tree:
    number: int
    room: int
    beams: list[Candidate]
    done: list[Candidate] = field(default_factory=list)

    @property
    def open(self) -> list[Candidate]:
        return [beam for beam in self.beams if not beam.finished]


def block_search(
    prompt: Sequence[int],
    blocks: Blocks,
    *,
    max_tokens: int = 512,
    sampling: Sampling = Sampling(),  # noqa: B008
    seed: int = 0,
    answer: Answer | None = None,
    stop_ends: bool = False,
) -> Search:
    """Draws blocks after each beam, values what they make, and keeps the best.

    A response ends at an end-of-sequence token or at max_tokens. Of all trees' responses the one
    with the highest value is chosen; with `answer`, one whose answer has the largest sum of values.

    Args:
        prompt: token ids.
        blocks: the shape of the search.
        max_tokens: of one response.
        sampling: how blocks are drawn; a stop string ends a block.
        seed: of all draws.
        answer: the answer in a response, for a vote at the end.
        stop_ends: a stop string ends the response, and not the block alone.
    """
    require_counts(max_tokens=max_tokens)
    prompt = tuple(prompt)
    roots = [Candidate()] * (blocks.width if blocks.spread else 1)
    trees = [_Tree(i, blocks.width, list(roots)) for i in range(blocks.trees)]
    rounds, stopped = 0, None
    try:
        while going := [tree for tree in trees if tree.open]:
            yield from _round(prompt, going, blocks, max_tokens, sampling, seed, rounds, stop_ends)
            rounds += 1
    except BudgetSpent as limit:
        stopped = str(limit)
    candidates = [each for tree in trees for each in (*tree.done, *tree.beams) if each.tokens]
    if answer is None:
        chosen, details = highest(candidates), {}
    else:
        chosen, votes = elect(candidates, answer, weighted=True)
        details = {"votes": votes}
    return SearchResult(tuple(candidates), chosen, stopped, {"rounds": rounds, **details})


def _round(
    prompt: Tokens,
    trees: Sequence[_Tree],
    blocks: Blocks,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    number: int,
    stop_ends: bool,
) -> Coroutine[Request, Any, None]:
    """One block more for all trees that go on, in one request of each kind."""
    parents = [(tree, i, beam) for tree in trees for i, beam in enumerate(tree.open)]
    answers = yield Extend(
        [prompt + beam.tokens for _, _, beam in parents],
        blocks.branches,
        [min(blocks.block, max_tokens - len(beam.tokens)) for _, _, beam in parents],
        sampling,
        [derive(seed, tree.number, number, i) for tree, i, _ in parents],
    )
    grown: list[tuple[_Tree, Candidate]] = []
    for (tree, _, beam), own in zip(parents, answers, strict=True):
        for continuation in own:
            grown.append((tree, longer(beam, continuation, max_tokens, stop_ends)))
    scores = yield Judge([child.judged(prompt) for _, child in grown], per_token=blocks.block == 1)
    for tree in trees:
        held = [beam for beam in tree.beams if beam.finished]
        new = [child.scored(v) for (of, child), v in zip(grown, scores, strict=True) if of is tree]
        _keep(tree, held + new, blocks)


def _keep(tree: _Tree, beams: list[Candidate], blocks: Blocks) -> None:
    """The beams that go on. Equal values: the one that came first."""
    ranked = sorted(beams, key=lambda beam: -_value(beam))
    kept = ranked[: tree.room]
    if blocks.margin is not None:
        kept = [beam for beam in kept if _value(beam) >= _value(kept[0]) - blocks.margin]
    if blocks.leave:
        left = [beam for beam in kept if beam.finished]
        tree.done += left
        tree.room -= len(left)
        kept = [beam for beam in kept if not beam.finished]
    elif kept[0].finished and not blocks.patient:
        tree.done, kept = tree.done + [beam for beam in kept if beam.finished], []
    tree.beams = kept


def _value(beam: Candidate) -> float:
    assert beam.score is not None
    return beam.score
