"""What a server does once before it takes requests, so that none waits for it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from guided_decode.guidance.config import GuidanceConfig
from guided_decode.guidance.step import guide_rows
from guided_decode.integrations.vllm.server_config import ServerConfig
from guided_decode.scorer import LogProbs, Prefix, Scorer, Scores, TerminalRule
from guided_decode.scoring.critic import CriticScorer
from guided_decode.scoring.implicit import ImplicitScorer, LanguageModel
from guided_decode.stats import ScorerStats

# Graphs are captured ahead for prefixes up to so many tokens; for longer ones as they come.
_USUAL_PREFIX = 2048
# Kernels are compiled for candidates by powers of two, from the first of these to the last.
_LEAST_WIDTH, _MOST_WIDTH = 16, 1024


def forward(scorer: Scorer, tokens: int, most: int) -> None:
    """The largest forward of a step, so that the device's libraries have their workspaces.

    Args:
        scorer: the server's.
        tokens: of the largest forward.
        most: of the longest prefix.
    """
    length = max(1, min(tokens, most) - 1)
    while length > 1 and scorer.refusal([0] * length, 1) is not None:
        length //= 2
    rows = [[i % scorer.vocab_size, *[0] * (length - 1)] for i in range(max(1, tokens // length))]
    scorer.score(rows, torch.zeros(len(rows), 1, dtype=torch.int64))
    scorer.stats.reset()


def graphs(scorer: Scorer, config: ServerConfig, rows: int, most: int) -> None:
    """Captures the CUDA graphs of steps by the server's defaults.

    Args:
        scorer: the server's; one without graphs is left as it is.
        config: the server's.
        rows: the most requests at once.
        most: of the longest prefix.
    """
    prefix = min(most, _USUAL_PREFIX)
    if isinstance(scorer, ImplicitScorer):
        scorer.prepare(rows, prefix)
    elif isinstance(scorer, CriticScorer) and config.top_k is not None:
        scorer.prepare(rows, config.top_k, prefix)
        if config.kl_coef and isinstance(scorer.reference, LanguageModel):
            scorer.reference.prepare(rows, prefix)


def steps(scorer: Scorer, config: ServerConfig, vocab: int, device: torch.device) -> None:
    """A step of each width that requests may ask for, so that its kernels are compiled.

    Args:
        scorer: the server's.
        config: the server's.
        vocab: of the policy's logits.
        device: where they are.
    """
    logits = torch.zeros(2, vocab, device=device)
    for guidance in _every_width(scorer, config):
        guide_rows(
            scorer, logits, [[0], [0, 0]], guidance, terminals=[(0,), (0,)], on_error="passthrough"
        )
    scorer.stats.reset()


@dataclass(slots=True)
class Nought:
    """Scores of zero, as of any scorer: for steps of one that scores live requests only."""

    vocab_size: int
    terminal: TerminalRule
    stats: ScorerStats = field(default_factory=ScorerStats)
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    reward: Scorer | None = None
    reference: LogProbs | None = None
    scores_vocabulary: bool = False

    def score(self, prefixes: Sequence[Prefix], candidates: Tensor) -> Scores:
        """As of `Scorer`."""
        values = torch.zeros(candidates.shape).masked_fill(candidates < 0, torch.nan)
        return Scores(values, torch.zeros(len(prefixes)))

    def refusal(self, prefix: Prefix, candidates: int) -> str | None:
        """As of `Scorer`."""
        return None


def _every_width(scorer: Scorer, config: ServerConfig) -> Iterator[GuidanceConfig]:
    """The server's own guidance, and what its requests may make of it that is compiled anew."""
    own = config.guidance.changed(value_gate=None, value_gate_fall=None)
    own = own.changed(beta=1.0) if config.beta == 0 else own
    yield own
    # A KL term is one more argument of the kernel.
    kl_coefs = {own.kl_coef, 1.0 if scorer.reference is not None else 0.0, 0.0}
    most, width = min(config.max_top_k, _MOST_WIDTH), _LEAST_WIDTH
    while True:
        for kl_coef in sorted(kl_coefs):
            yield replace(own, top_k=min(width, most), kl_coef=kl_coef)
        if width >= most:
            return
        width *= 2
