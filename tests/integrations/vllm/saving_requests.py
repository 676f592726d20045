"""Requests that abstain, and whose value gates open in some steps; what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from guided_decode import GuidanceConfig
from tests import models, oracle
from tests.integrations.vllm import mixed_requests, vllm_parts
from tests.integrations.vllm.mixed_requests import ASKED, CONFIGS, PROMPTS

NEW = 20
# The shortest, of which brute force is soon done.
CHOSEN = sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))[:12]
UNGUIDED = GuidanceConfig(beta=0.0, tail="keep")


@dataclass(frozen=True)
class Saving:
    """What each request asks for, and by brute force its tokens, without the one that ends it."""

    prompts: list[list[int]]
    asked: list[GuidanceConfig]
    expected: list[tuple[list[int], list[float]]]
    stop: int

    @property
    def ends(self) -> list[int]:
        return [models.EOS, self.stop]

    def abstains(self, i: int) -> bool:
        """Whether a request is ended by its value."""
        tokens = self.expected[i][0]
        return len(tokens) < NEW and tokens[-1] not in self.ends


def made(critic: torch.nn.Module) -> Saving:
    """Bounds that end some of the requests and open some of the gates of this critic.

    critic: of class and head as `oracle.Values` reads them.
    """
    brute = oracle.Oracle(oracle.Values(critic))
    lm = oracle.LogProbs(vllm_parts.policy())
    along = []
    for i in CHOSEN:
        config = ASKED[i] or UNGUIDED
        tokens, _ = brute.greedy(lm, PROMPTS[i], config, mixed_requests.ends(i), NEW)
        along += [brute.values([[*PROMPTS[i], *tokens[:t]]])[0] for t in range(1, len(tokens))]
    along.sort()
    low, gate = along[len(along) // 8] - 1e-3, along[len(along) // 2] - 1e-3
    base = CONFIGS[0]
    configs = [
        base.changed(abstain=low),
        UNGUIDED.changed(abstain=low, abstain_after=6),
        base.changed(value_gate=gate, value_gate_fall=0.4),
        base.changed(value_gate_fall=0.6, tail="keep", gate=0.4, abstain=low, abstain_after=3),
    ]
    prompts = [PROMPTS[i] for i in CHOSEN]
    asked = [configs[n % 4] for n in range(len(prompts))]
    # A token that nobody writes.
    for stop in range(models.VOCAB - 1, models.EOS, -1):
        expected = [
            brute.greedy(lm, prompt, config, [models.EOS, stop], NEW)
            for prompt, config in zip(prompts, asked, strict=True)
        ]
        if not any(stop in tokens for tokens, _ in expected):
            return Saving(prompts, asked, expected, stop)
    raise AssertionError("every token is written by some request")


def assert_engine(llm, saving: Saving) -> None:
    """The engine's answers are brute force's, and say which requests their value ended."""
    keys = [vllm_parts.asked(config) for config in saving.asked]
    for own, config in zip(keys, saving.asked, strict=True):
        if not config.needs_scores:
            # By itself abstention guides nothing.
            own.clear()
            own |= {"guide_abstain": config.abstain, "guide_abstain_after": config.abstain_after}
    sampling = [vllm_parts.params(NEW, own, stop_token_ids=[saving.stop]) for own in keys]
    before = vllm_parts.worker_report(llm)
    requests = [{"prompt_token_ids": prompt} for prompt in saving.prompts]
    outputs = [each.outputs[0] for each in llm.generate(requests, sampling, use_tqdm=False)]
    after = vllm_parts.worker_report(llm)
    ended = [output.stop_reason == saving.stop for output in outputs]
    tokens = []
    for output, was_ended in zip(outputs, ended, strict=True):
        tokens.append(list(output.token_ids))
        if was_ended:
            assert output.finish_reason == "stop"
            assert tokens[-1].pop() == saving.stop
    oracle.assert_greedy_equal(tokens, saving.expected)
    assert ended == [saving.abstains(i) for i in range(len(ended))]
    assert 2 <= sum(ended) < sum(config.abstain is not None for config in saving.asked)
    counted = {name: after[name] - before[name] for name in after}
    assert counted["abstained_rows"] == sum(ended)
    assert counted["passthroughs"] == counted["clamps"] == 0
    assert counted["rows_gated"] > 0
