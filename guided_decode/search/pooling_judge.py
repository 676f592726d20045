"""A judge on vLLM pooling servers: a critic or reward model that they serve as it is."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import torch

from guided_decode.cache.closable import Closable
from guided_decode.checkpoints.described import Described
from guided_decode.search.http import Endpoints
from guided_decode.search.judges import is_ended
from guided_decode.search.pooling_probe import Probed
from guided_decode.search.pooling_wire import PATH, Served, body_of, read_outputs
from guided_decode.search.requests import Judged, JudgeOfTexts, Tokens
from guided_decode.stats import ScorerStats


class PoolingJudge(Closable):
    """What a critic or reward model on pooling servers says of a response so far.

    The values are those of `ScorerJudge` with the same checkpoint: V at the last token of an
    unfinished response, and of a finished one what its end is worth by the family's terminal rule.
    A server recomputes a text at each call of token_classify, so this is for pieces of responses,
    not for single tokens; with classify it reads what its prefix cache has. See
    `pooling_connection.connect_judge`.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        described: Described,
        served: Served,
        probed: Probed,
        *,
        terminals: Collection[int] = (),
        reward: JudgeOfTexts | None = None,
    ) -> None:
        """
        Args:
            endpoints: the servers. described: how their model is read. served: its name there.
            probed: what they were found to do.
            terminals: token ids that end a response, beside the model's own EOS.
            reward: what judges finished responses under the "reward" terminal rule.

        Raises ValueError: the rule is "reward" and there is no such judge.
        """
        if described.family.terminal == "reward" and reward is None:
            raise ValueError(
                'terminal="reward" was given without a reward model: pass reward=, a judge of '
                "finished responses"
            )
        self.endpoints = endpoints
        self.described = described
        self.served = served
        self.task = probed.task
        self.reward = reward
        self.stats = ScorerStats()
        own = () if described.eos_token_id is None else (described.eos_token_id,)
        self._terminals = frozenset({*terminals, *own})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.served.name!r} at {', '.join(self.endpoints.urls)})"

    @property
    def read_as(self) -> dict[str, str]:
        """From what its values follow, beside the weights that the servers have."""
        known = self.described
        return {
            "model": self.served.name,
            "checkpoint": known.name,
            "kind": known.family.kind,
            "bos": known.family.bos,
            "terminal": known.family.terminal,
            "transform": str(known.transform),
        }

    def add_terminals(self, terminals: Collection[int]) -> None:
        """More token ids that end a response: those of a policy that was not known yet."""
        self._terminals |= frozenset(terminals)

    def judge(self, texts: Sequence[Judged]) -> list[float]:
        """As `requests.JudgeOfTexts.judge`.

        Raises:
            ValueError: a text that is longer than the servers take, or a token that the model does
                not have. EndpointError: no server answers as it should.
        """
        begun = time.perf_counter()
        asked = [self._asked(text) for text in texts]
        distinct = list(dict.fromkeys(ids for ids in asked if ids is not None))
        known = dict(zip(distinct, self._values(distinct), strict=True))
        finals = iter(self._finals([t for t, ids in zip(texts, asked, strict=True) if ids is None]))
        values = [next(finals) if ids is None else known[ids] for ids in asked]
        self.stats.add(
            rows_scored=len(texts),
            forwards=len(distinct),
            prefix_tokens=sum(map(len, distinct)),
            seconds=time.perf_counter() - begun,
        )
        return values

    def close(self) -> None:
        """Ends its connections."""
        self.endpoints.close()

    def _asked(self, text: Judged) -> Tokens | None:
        """The token ids whose last one is read; None: the reward model judges it."""
        ids, rule = text.prompt + text.response, self.described.family.terminal
        if is_ended(text, self._terminals):
            if rule == "reward":
                return None
            # As `score_candidates`: before the end, or at the model's own and what it puts behind.
            own = self.described.eos_token_id
            last = () if rule == "baseline" else ids[-1:] if own is None else (own,)
            ids = ids[:-1] + last + self.described.turn_end
        if len(ids) > 1 and ids[0] == self.described.skip_token:
            ids = ids[1:]
        return ids

    def _values(self, texts: Sequence[Tokens]) -> list[float]:
        for ids in texts:
            self._check(ids)
        bodies = [body_of(self.served.name, ids, self.task) for ids in texts]
        outputs = self.endpoints.post_all(PATH, bodies, self._read)
        if not outputs:
            return []
        values: list[float] = self.described.transform(torch.tensor(outputs)).tolist()
        return values

    def _read(self, answer: object, body: object) -> list[float]:
        last = read_outputs(answer, body)[-1]  # type: ignore[arg-type]
        if len(last) != self.described.labels:
            raise ValueError(f"{len(last)} outputs a token: expected {self.described.labels}")
        return last

    def _finals(self, texts: Sequence[Judged]) -> list[float]:
        if not texts:
            return []
        assert self.reward is not None
        return self.reward.judge(texts)

    def _check(self, ids: Tokens) -> None:
        if not ids:
            raise ValueError("a text is empty: expected at least one token id")
        odd = next((each for each in ids if not 0 <= each < self.described.vocab_size), None)
        if odd is not None:
            raise ValueError(
                f"token {odd} is outside the vocabulary of {self.described.name}, which has "
                f"{self.described.vocab_size}: expected ids of its tokenizer"
            )
        most = self.served.max_tokens
        if most is not None and len(ids) > most:
            raise ValueError(
                f"a text has {len(ids)} tokens, and the servers of {self.served.name} take {most}: "
                "shorten it, or start them with a longer --max-model-len"
            )
