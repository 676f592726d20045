"""Policies with PEFT adapters: `generate` of a PeftModel, guided, and the trunk's own loop."""

import pytest
import torch

from guided_decode import Adapted, GuidanceConfig, load_scorer
from guided_decode.integrations.transformers import (
    GuidedDecoding,
    TrunkLookahead,
    ValueGuidedLogitsProcessor,
)
from tests import adapters, models, oracle
from tests.adapters import adapted, lora

CONFIG = GuidanceConfig(beta=2.0, top_k=4)
HEAD = {"head.weight": torch.randn(1, 48, generator=torch.Generator().manual_seed(9))}
PROMPT = models.prompts([6])[0]
TOKENS = 8


def policy():
    """A PeftModel with the adapters `default`, which is active, and `critic`."""
    model = adapted("CAUSAL_LM")
    model.add_adapter("critic", lora(r=2))
    adapters.randomise(model, 7, of="critic")
    return model.eval()


def decoded(model, **how):
    ids = torch.tensor([PROMPT])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": TOKENS}
    output = model.generate(input_ids=ids, do_sample=False, eos_token_id=None, **options, **how)
    return output[0, len(PROMPT) :].tolist()


class OfAdapter:
    """A model as it is with one of its adapters, for brute force."""

    def __init__(self, model, adapter):
        self.model, self.adapter = model, adapter

    def __call__(self, ids):
        self.model.set_adapter(self.adapter)
        return self.model(input_ids=ids)


def values(model, adapter, head=HEAD):
    def value(sequences):
        model.set_adapter(adapter)
        return [
            float(head["head.weight"][0] @ model.get_base_model().model(
                torch.tensor([list(ids)])).last_hidden_state[0, -1])
            for ids in sequences
        ]  # fmt: skip

    return value


class Values:
    def __init__(self, value):
        self.value = value

    def __call__(self, sequences):
        return self.value(sequences)

    def after(self, prefix, tokens):
        return self.value([[*prefix, token] for token in tokens])


@torch.no_grad()
def expected(model, critic):
    brute = oracle.Oracle(values=Values(values(model, critic)))
    decode = oracle.LogProbs(OfAdapter(model, "default"))
    tokens, _ = brute.greedy(decode, PROMPT, CONFIG, (), TOKENS)
    model.set_adapter("default")
    return tokens


def test_one_adapter_guides_another_of_the_same_base():
    model = policy()
    scorer = load_scorer(model, head=HEAD, adapter="critic")
    wanted = expected(model, "critic")
    assert decoded(model, custom_generate=GuidedDecoding(scorer, CONFIG)) == wanted
    processor = ValueGuidedLogitsProcessor(scorer, CONFIG, eos_token_id=[])
    assert decoded(model, logits_processor=[processor]) == wanted
    assert wanted != decoded(model)


def test_the_adapted_policys_own_trunk_decodes():
    model = policy()
    for given in (model, Adapted(model, "default")):
        scorer = load_scorer(given, head=HEAD)
        wanted = expected(model, "default")
        for make in (GuidedDecoding, TrunkLookahead):
            assert decoded(model, custom_generate=make(scorer, CONFIG)) == wanted


def test_the_trunks_own_loop_follows_what_is_active_or_refuses_another():
    model = policy()
    plain = GuidanceConfig(beta=0.0)
    following = TrunkLookahead(load_scorer(model, head=HEAD), plain)
    fixed = TrunkLookahead(load_scorer(model, head=HEAD, adapter="default"), plain)
    seen = []
    for adapter in ("default", "critic", "default"):
        model.set_adapter(adapter)
        seen.append(decoded(model))
        assert decoded(model, custom_generate=following) == seen[-1]
        if adapter == "default":
            assert decoded(model, custom_generate=fixed) == seen[-1]
        else:
            with pytest.raises(ValueError, match="not the policy's own: .*with the adapter that is "
                               "active in it"):  # fmt: skip
                decoded(model, custom_generate=fixed)
    with model.disable_adapter():
        seen.append(decoded(model))
        assert decoded(model, custom_generate=following) == seen[-1]
    assert len({tuple(tokens) for tokens in seen}) == 3
    model.merge_adapter()
    assert decoded(model, custom_generate=following) == decoded(model) == seen[0]


def test_an_adapted_language_model_head():
    config = lora(modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = adapted("CAUSAL_LM", config=config)
    lookahead = TrunkLookahead(load_scorer(model, head=HEAD), GuidanceConfig(beta=0.0))
    assert decoded(model, custom_generate=lookahead) == decoded(model)
    adapted_head = adapted("CAUSAL_LM", config=lora(target_modules=["lm_head", "v_proj"]))
    lookahead = TrunkLookahead(load_scorer(adapted_head, head=HEAD), GuidanceConfig(beta=0.0))
    assert decoded(adapted_head, custom_generate=lookahead) == decoded(adapted_head)


def test_kl_against_the_base_of_the_policy_itself():
    model = policy()
    config = GuidanceConfig(beta=2.0, top_k=4, kl_coef=0.3)
    scorer = load_scorer(model, head=HEAD, adapter="critic", reference=Adapted(model))
    base = adapters.base_of("CAUSAL_LM", models.saved("llama", "lm"))
    brute = oracle.Oracle(values=Values(values(model, "critic")), reference=oracle.LogProbs(base))
    with torch.no_grad():
        wanted, _ = brute.greedy(
            oracle.LogProbs(OfAdapter(model, "default")), PROMPT, config, (), TOKENS
        )
    model.set_adapter("default")
    assert decoded(model, custom_generate=GuidedDecoding(scorer, config)) == wanted
