"""What a scorer is, and what it answers."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from guided_decode.prefix import PrefixHandle
from guided_decode.stats import ScorerStats

Prefix = Sequence[int] | PrefixHandle | Tensor
TerminalRule = Literal["baseline", "reward", "critic", "included"]


class Scores(NamedTuple):
    """The answer of `Scorer.score`; unpacks as (values, baseline).

    values: float32 [rows, k], Q of each candidate: V(prefix + candidate); NaN where padded.
    baseline: float32 [rows], V(prefix).
    """

    values: Tensor
    baseline: Tensor


@runtime_checkable
class LogProbs(Protocol):
    """A causal LM that is read for log-probabilities: the reference of a KL term."""

    def log_probs(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Tensor:
        """log pi_ref(candidate | prefix), float32 [rows, k]; NaN where padded."""
        ...

    def refusal(self, prefix: Prefix, candidates: int) -> str | None:
        """Why a row with this many candidates cannot be scored, or None: `ValueError`'s text."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores candidates. The answer depends on the arguments alone.

    terminal: how a candidate that would end the request gets its Q: "baseline", A = 0 (critics that
        were never trained at EOS); "critic", V(s·EOS); "reward", a reward model's score of the
        finished response; "included", as any other candidate (implicit reward).
    scores_vocabulary: one forward gives every candidate, so top_k=None is allowed.
    """

    stats: ScorerStats

    @property
    def vocab_size(self) -> int: ...
    @property
    def terminal(self) -> TerminalRule: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def reward(self) -> "Scorer | None": ...
    @property
    def reference(self) -> LogProbs | None: ...
    @property
    def scores_vocabulary(self) -> bool: ...

    def score(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Scores:
        """Values of candidates, int64 [rows, k] padded with -1, after unpadded prefixes."""
        ...

    def refusal(self, prefix: Prefix, candidates: int) -> str | None:
        """Why a row with this many candidates cannot be scored, or None: `ValueError`'s text."""
        ...
