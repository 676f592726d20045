"""What no guided decoding can be made of is refused when it is made, in words."""

import copy

import pytest

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.integrations.transformers import (
    GuidedDecoding,
    TrunkLookahead,
    ValueGuidedLogitsProcessor,
)
from tests import models, trunk_heads

MADE = [GuidedDecoding, ValueGuidedLogitsProcessor, TrunkLookahead]
CONFIG = GuidanceConfig(top_k=4)


def scorer_of(made):
    if made is TrunkLookahead:
        return trunk_heads.scorer()
    return load_scorer(models.tiny("llama", "token"), kind="verl-critic")


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta": 2.0}, r"config is a dict: expected GuidanceConfig\(\*\*\{'beta': 2.0\}\)"),
        (None, "config is None: expected a GuidanceConfig"),
        (1.5, "config is 1.5, a float: expected a GuidanceConfig, or a list of one a prompt"),
        ([], "config is an empty list: expected a GuidanceConfig, or one a prompt"),
        ([CONFIG, {"beta": 2.0}], r"config\[1\] is a dict: expected GuidanceConfig"),
        ("beta=2", "config is 'beta=2', a str: expected a GuidanceConfig"),
    ],
)
def test_a_config_of_another_type(made, config, message):
    with pytest.raises(ValueError, match=message):
        made(scorer_of(made), config)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("tiny-tulu-value", r"is a name or a path: .*load_scorer\('tiny-tulu-value'\)"),
        (models.scratch(), r"is a name or a path: .*load_scorer\('/"),
        (models.tiny("llama", "token"), r"a LlamaForTokenClassification: .*load_scorer\(model"),
        ([1, 2], "scorer is a list of 2: expected one scorer"),
        (None, r"scorer is None, a NoneType: expected a scorer; load it: load_scorer"),
    ],
    ids=["name", "path", "model", "list", "none"],
)
def test_what_is_no_scorer(made, scorer, message):
    with pytest.raises(ValueError, match=message):
        made(scorer, CONFIG)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("on_error", ["ignore", None, True])
def test_an_unknown_on_error(made, on_error):
    with pytest.raises(ValueError, match=f"on_error={on_error!r}: expected 'raise' or 'pass"):
        made(scorer_of(made), CONFIG, on_error=on_error)


@pytest.mark.parametrize("made", [GuidedDecoding, TrunkLookahead])
def test_what_is_no_streamer(made):
    with pytest.raises(ValueError, match=r"streamer is True, a bool: expected .* put.*end"):
        made(scorer_of(made), CONFIG, streamer=True)


@pytest.mark.parametrize("beams", [0, -1, 2.0, True, None])
def test_what_is_no_number_of_beams(beams):
    with pytest.raises(ValueError, match=f"num_beams={beams!r}: expected an integer of at least 1"):
        ValueGuidedLogitsProcessor(scorer_of(ValueGuidedLogitsProcessor), CONFIG, num_beams=beams)


def test_a_mask_that_is_no_tensor():
    processor = ValueGuidedLogitsProcessor(
        scorer_of(ValueGuidedLogitsProcessor), CONFIG, attention_mask=[[1, 1]]
    )
    policy = copy.deepcopy(models.tiny("llama", "lm", seed=1))
    with pytest.raises(ValueError, match="attention_mask is a list: expected a tensor"):
        policy.generate(
            models.torch.tensor([[5, 6]]), logits_processor=[processor], max_new_tokens=1
        )


def test_a_list_of_configs_that_changes_later_changes_nothing():
    configs = [CONFIG, CONFIG]
    guided = GuidedDecoding(scorer_of(GuidedDecoding), configs)
    configs.append("no config")
    assert guided.config == (CONFIG, CONFIG)
