"""What a request may ask for: refused by the front end with a reason, clamped by the worker."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from guided_decode import GuidanceConfig
from guided_decode.integrations.vllm.request import Pruning, admit, check_request
from guided_decode.integrations.vllm.server_config import (
    CONFIG_VARIABLE,
    config_of,
    front_end_config,
    parse_config,
)

GROUP = {
    "guide_group": "a-group-name",
    "guide_group_size": 8,
    "guide_keep": 2,
    "guide_every": 16,
}
LIMITS = {"scorer": "critic", "beta": 2.0, "top_k": 8, "max_top_k": 32, "max_beta": 5.0,
          "max_group_size": 8}  # fmt: skip


@dataclass
class Params:
    extra_args: dict[str, Any] | None = None
    stop_token_ids: list[int] | None = field(default_factory=lambda: [77])
    ignore_eos: bool = False
    min_tokens: int = 0
    structured_outputs: Any = None
    eos_token_id: int | None = 2


def config(**own):
    return parse_config(LIMITS | own, "the test")


def granted(extra, server=None, **own):
    return admit(Params(extra, **own), server or config(), [2, 3], groups=True)


def test_requests_that_ask_for_nothing_get_nothing():
    for extra in (None, {}, {"guide": 0}, {"other_plugin": "x"}, {"guided_json": "{}"}):
        check_request(Params(extra), config())
        assert granted(extra) == (None, [])


@pytest.mark.parametrize("extra", [{"guide": 1}, {"guide": True}, {"guide_beta": 2.0}])
def test_asking(extra):
    check_request(Params(extra), config())
    request, clamps = granted(extra)
    assert request.config == GuidanceConfig(beta=2.0, top_k=8)
    assert request.terminals == (2, 77)
    assert request.pruning is None
    assert clamps == []


def test_a_server_that_guides_everybody_lets_a_request_decline():
    server = config(guide_by_default=True)
    assert granted(None, server).request.is_guided
    assert granted({"guide": 0}, server).request is None


def test_abstention_by_itself_guides_nothing():
    extra = {"guide_abstain": -0.5, "guide_abstain_after": 8}
    check_request(Params(extra), config())
    request, clamps = granted(extra)
    assert (request.is_guided, request.end_token, clamps) == (False, 77, [])
    assert [n for n in range(12) if request.abstains_at(n)] == [8, 9, 10, 11]
    assert request.config.ends(-0.6, 8)
    assert not request.config.ends(-0.5, 8)
    guided = granted(extra | {"guide": 1}).request
    assert guided.config == GuidanceConfig(2.0, 8, abstain=-0.5, abstain_after=8)
    assert guided.end_token == 77


def test_who_abstains_says_which_token_ends_it():
    extra = {"guide_abstain": -0.5}
    for stops, reason in ((None, "guide_abstain came with stop_token_ids=[]: expected the one id"),
                          ([5, 77], "guide_abstain came with stop_token_ids=[5, 77]")):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(reason)):
            check_request(Params(extra, stop_token_ids=stops), None)
        request, clamps = granted(extra, stop_token_ids=stops)
        assert request is None
        assert reason in clamps[0]
    assert granted(extra | {"guide_prune_token": 5}, stop_token_ids=[5, 77]).request.end_token == 5
    # vLLM has added the policy's other ends by then.
    assert granted(extra, stop_token_ids=[3, 77]).request.end_token == 77
    with pytest.raises(ValueError, match="guide_abstain was given together with min_tokens"):
        check_request(Params(extra, min_tokens=3), None)


def test_a_servers_own_abstention_is_for_guided_requests_that_can_be_ended():
    server = config(abstain=-0.5, abstain_after=4)
    request, clamps = granted({"guide": 1}, server)
    assert (request.config.abstain, request.config.abstain_after) == (-0.5, 4)
    assert (request.end_token, clamps) == (77, [])
    for own in ({"stop_token_ids": None}, {"min_tokens": 2}):
        request, clamps = granted({"guide": 1}, server, **own)
        assert (request.config.abstain, request.end_token, clamps) == (None, None, [])
    assert granted({"guide_abstain": -2.0}, server).request.config.abstain == -2.0
    assert granted({}, server).request is None


def test_a_servers_own_abstention_takes_no_end_of_the_policy_for_a_named_token():
    server = config(abstain=-0.5)
    # What vLLM has added by itself, or what the client stops at as the policy does.
    for stops in ([3], [2], [2, 3]):
        request, clamps = granted({"guide": 1}, server, stop_token_ids=stops)
        assert (request.config.abstain, request.end_token, clamps) == (None, None, [])
    assert granted({"guide": 1}, server, stop_token_ids=[77, 2, 3]).request.end_token == 77
    assert granted({"guide_abstain": -1.0}, server, stop_token_ids=[3]).request.end_token == 3


def test_an_end_that_leaves_no_stop_reason_is_not_granted():
    reason = "token 2 to end a response that abstains, the policy's own EOS, which leaves no"
    for own, stops in (({}, [2]), ({"guide_prune_token": 2}, [2, 77])):
        request, clamps = granted({"guide_abstain": -0.5} | own, stop_token_ids=stops)
        assert request is None
        assert reason in clamps[0]
    request, clamps = granted({"guide_abstain": -0.5}, stop_token_ids=[2], ignore_eos=True)
    assert (request.end_token, clamps) == (2, [])
    clamps = granted(GROUP | {"guide_prune_token": 2}, stop_token_ids=[2, 77]).clamps
    assert "token 2 to end a pruned sibling, the policy's own EOS" in clamps[0]


def test_a_scorer_without_values_of_prefixes_ends_nobody():
    extra = {"guide": 1, "guide_abstain": 0, "guide_value_gate": 1.0}
    request, clamps = admit(Params(extra), config(), [2, 3], groups=False, values=False)
    assert request.config == GuidanceConfig(beta=2.0, top_k=8)
    assert request.end_token is None
    assert clamps == ["guide_abstain, guide_value_gate came, but this scorer has no value of a "
                      "prefix"]  # fmt: skip
    with pytest.raises(ValueError, match="guide_abstain was given, but the server's scorer is an"):
        check_request(Params(extra), config(kind="implicit"))


def test_each_value_gate_asks_for_guidance():
    request, _ = granted({"guide_value_gate": -0.25, "guide_value_gate_fall": 0.5})
    assert request.config == GuidanceConfig(2.0, 8, value_gate=-0.25, value_gate_fall=0.5)


def test_each_setting_arrives():
    extra = {"guide_beta": -1, "guide_top_k": 4, "guide_top_p": 0.5, "guide_rule": "prune",
             "guide_margin": 0.25, "guide_tail": "keep", "guide_gate": 0.9}  # fmt: skip
    check_request(Params(extra), config())
    expected = GuidanceConfig(-1, 4, 0.5, "prune", 0.25, "keep", "prefix", 0.9)
    assert granted(extra).request.config == expected


def test_reweight_on_a_server_that_prunes_drops_its_margin():
    server = config(rule="prune", margin=0.5)
    assert granted({"guide_rule": "reweight"}, server).request.config.margin is None
    assert granted({"guide_beta": 1}, server).request.config.margin == 0.5
    assert granted({"guide_margin": 0.1}, server).request.config.margin == 0.1


def test_eos_is_an_ordinary_token_under_ignore_eos():
    assert granted({"guide": 1}, ignore_eos=True).request.terminals == (77,)
    assert granted({"guide": 1}, stop_token_ids=None).request.terminals == (2,)


BAD = [
    ({"guide": 2}, "guide=2"),
    ({"guide": "yes"}, "guide='yes'"),
    ({"guide_beta": "2"}, "guide_beta='2': input should be a valid number"),
    ({"guide_beta": float("nan")}, "guide_beta=nan: input should be a finite number"),
    ({"guide_beta": [1.0]}, "guide_beta"),
    ({"guide_top_k": 0}, "guide_top_k=0: input should be greater than or equal to 1"),
    ({"guide_top_k": 2.5}, "guide_top_k=2.5"),
    ({"guide_top_p": 0.0}, "guide_top_p=0.0: input should be greater than 0"),
    ({"guide_top_p": 1.5}, "guide_top_p=1.5"),
    ({"guide_rule": "best"}, "guide_rule='best': input should be 'reweight' or 'prune'"),
    ({"guide_margin": -1}, "guide_margin=-1"),
    ({"guide_tail": "cut"}, "guide_tail='cut'"),
    ({"guide_gate": 0}, "guide_gate=0"),
    ({"guide_temperature": 1}, "unknown key 'guide_temperature'; known are guide, guide_beta"),
    ({"guide_scorer": "/etc/passwd"}, "unknown key 'guide_scorer'"),
    ({"guide": 0, "guide_beta": 1.0}, "guide=0 was given together with guide_beta"),
    ({"guide_rule": "reweight", "guide_margin": 1.0}, "guide_margin=1 was given with guide_rule"),
    ({"guide_keep": 2}, "guide_keep came without guide_group"),
    (GROUP | {"guide_group": "short"}, "guide_group='short'"),
    (GROUP | {"guide_keep": 8}, "guide_keep=8 with guide_group_size=8 prunes nobody"),
    (GROUP | {"guide_every": 0}, "guide_every=0"),
    ({"guide_group": "a-group-name"}, "without guide_group_size, guide_keep, guide_every"),
    (GROUP | {"guide_prune_token": 5}, "guide_prune_token=5 is not among stop_token_ids=[77]"),
    ({"guide_value_gate": "low"}, "guide_value_gate='low': input should be a valid number"),
    ({"guide_value_gate_fall": -1}, "guide_value_gate_fall=-1: input should be greater than or"),
    ({"guide_abstain": float("inf")}, "guide_abstain=inf: input should be a finite number"),
    ({"guide_abstain": 0, "guide_abstain_after": 0}, "guide_abstain_after=0"),
    ({"guide_abstain_after": 5}, "guide_abstain_after came without guide_abstain: pass both"),
    ({"guide_prune_token": 77}, "guide_prune_token came without guide_group or guide_abstain"),
    ({"guide_abstain": 0, "guide_prune_token": 5}, "a response that abstains would go on; list it"),
]
# What only a front end that knows the server's configuration can refuse.
BAD_HERE = [
    ({"guide_top_k": 33}, "guide_top_k=33 is above the server's limit 32"),
    ({"guide_beta": -6.0}, "guide_beta=-6 is above the server's limit 5"),
    ({"guide_margin": 1.0}, "with the server's defaults this request has margin=1.0"),
    ({"guide_rule": "prune"}, 'rule="prune" was given without a margin'),
    (GROUP | {"guide_group_size": 9}, "guide_group_size=9 is above the server's limit 8"),
]


@pytest.mark.parametrize(("extra", "reason"), BAD)
@pytest.mark.parametrize("told", [True, False], ids=["limits", "no limits"])
def test_the_front_end_refuses(extra, reason, told):
    with pytest.raises(ValueError, match=re.escape(reason)):
        check_request(Params(extra), config() if told else None)


@pytest.mark.parametrize(("extra", "reason"), BAD_HERE)
def test_a_front_end_that_knows_the_limits_refuses(extra, reason):
    check_request(Params(extra), None)
    with pytest.raises(ValueError, match=re.escape(reason)):
        check_request(Params(extra), config())


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"min_tokens": 4}, "guide_group was given together with min_tokens"),
        ({"structured_outputs": object()}, "together with structured_outputs"),
        ({"stop_token_ids": []}, "expected the one id that ends a pruned sibling"),
        ({"stop_token_ids": [7, 8]}, "or guide_prune_token to say which"),
    ],
)
def test_groups_refuse(own, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        check_request(Params(GROUP, **own), None)
    request, clamps = granted({"guide": 1} | GROUP, **own)
    assert request.is_guided
    assert request.pruning is None
    assert reason in clamps[0]


def test_groups_are_refused_where_there_are_none():
    for server in (config(max_group_size=0), config(kind="implicit")):
        with pytest.raises(ValueError, match="guide_group"):
            check_request(Params(GROUP), server)
    request, clamps = admit(Params({"guide": 1} | GROUP), config(), [], groups=False)
    assert request.pruning is None
    assert len(clamps) == 1


@pytest.mark.parametrize(("extra", "_"), BAD + BAD_HERE)
def test_the_worker_never_raises(extra, _):
    request, clamps = granted(extra)
    assert clamps
    if request is not None:
        assert request.config.top_k <= 32
        assert abs(request.config.beta) <= 5.0


def test_the_worker_clamps_to_the_limits():
    request, clamps = granted({"guide_top_k": 1000, "guide_beta": -100.0})
    assert (request.config.top_k, request.config.beta) == (32, -5.0)
    assert len(clamps) == 2


def test_a_group_alone_changes_no_logits():
    request = granted(GROUP).request
    assert not request.is_guided
    assert request.pruning == Pruning("a-group-name", 8, 2, 16, 77)
    assert granted(GROUP | {"guide": 1}).request.is_guided


def test_the_token_that_ends_a_sibling_is_the_clients_own():
    # vLLM adds the generation config's end tokens to the client's list.
    assert granted(GROUP, stop_token_ids=[2, 77, 3]).request.pruning.token == 77
    chosen = GROUP | {"guide_prune_token": 78}
    assert granted(chosen, stop_token_ids=[77, 78]).request.pruning.token == 78


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("critic", "holds 'critic': expected an object such as"),
        ({}, "scorer is missing"),
        ({"scorer": 3}, "scorer=3: input should be a valid string"),
        ({"scorer": "x", "betta": 1.0}, "unknown key 'betta'; known are scorer, kind"),
        ({"scorer": "x", "tp_plan": "auto"}, "tp_plan='auto': vLLM's workers are no shards"),
        ({"scorer": "x", "beta": "1"}, "beta='1': input should be a valid number"),
        ({"scorer": "x", "top_k": 65}, "top_k=65 is above max_top_k=64"),
        ({"scorer": "x", "beta": 3, "max_beta": 2}, "beta=3 is above max_beta=2"),
        ({"scorer": "x", "rule": "prune"}, 'rule="prune" was given without a margin'),
        ({"scorer": "x", "kl_coef": 0.1}, "kl_coef was given without a reference model"),
        ({"scorer": "x", "terminal": "reward"}, "without a reward model"),
        ({"scorer": "x", "dtype": "int8"}, "dtype='int8': input should be 'float32', 'bfloat16'"),
        ({"scorer": "x", "on_error": "ignore"}, "on_error='ignore'"),
    ],
)
def test_the_configuration_refuses(given, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        parse_config(given, "additional_config")
    assert str(caught.value).startswith("additional_config")
    assert "\n" not in str(caught.value)


def test_the_configuration_of_the_engine(monkeypatch):
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="additional_config has no 'guided_decode'"):
        config_of({})
    assert config_of({"guided_decode": LIMITS}) == config()
    monkeypatch.setenv(CONFIG_VARIABLE, json.dumps(LIMITS))
    assert front_end_config() == config_of({"guided_decode": LIMITS})
    with pytest.raises(ValueError, match="differ: requests would be checked against other limits"):
        config_of({"guided_decode": LIMITS | {"max_beta": 6.0}})
    monkeypatch.setenv(CONFIG_VARIABLE, "{scorer")
    with pytest.raises(ValueError, match="GUIDED_DECODE_CONFIG holds no JSON"):
        front_end_config()


def test_stop_tokens_of_guided_requests_are_bounded():
    many = list(range(1000))
    with pytest.raises(ValueError, match="1000 stop_token_ids came with a guided request"):
        check_request(Params({"guide": 1}, stop_token_ids=many), None)
    check_request(Params(None, stop_token_ids=many), config())
    request, clamps = granted({"guide": 1}, stop_token_ids=many)
    assert len(request.terminals) == 128
    assert request.terminals[0] == 2
    assert clamps == ["1000 stop tokens became 128"]


@pytest.mark.parametrize("ends", [[2], [2, 3, 4]])
def test_as_many_stop_tokens_as_documented_are_kept_beside_what_always_ends(ends):
    own = list(range(10, 138))
    check_request(Params({"guide": 1}, stop_token_ids=own), config())
    # vLLM adds the generation config's end tokens once the front end has seen the request.
    params = Params({"guide": 1}, stop_token_ids=[*own, *ends])
    request, clamps = admit(params, config(), ends, groups=True)
    assert set(request.terminals) == {*own, *ends}
    assert clamps == []


MANY = {f"guide_{'x' * 300}{i}": 1.0 for i in range(20_000)}


@pytest.mark.parametrize(
    ("extra", "start"),
    [
        (MANY, "unknown key 'guide_xxx"),
        ({"guide_rule": "z" * 10**6}, "guide_rule='zzz"),
        ({"guide_beta": [1.5] * 10**5}, "guide_beta=[1.5, 1.5, 1.5"),
        ({"guide_top_k": 10**4000}, "top_k=an integer of 13288 bits"),
        (GROUP | {"guide_group_size": 10**4000}, "guide_group_size=1000"),
        (GROUP | {"guide_group": "z" * 10**6}, "guide_group='zzz"),
        (GROUP | {"guide_prune_token": 10**4000}, "guide_prune_token=1000"),
    ],
)
def test_a_refusal_repeats_only_the_first_of_what_came(extra, start):
    with pytest.raises(ValueError, match=re.escape(start)) as caught:
        check_request(Params(extra), config())
    assert len(str(caught.value)) < 700
    assert len("".join(granted(extra)[1])) < 700


def test_of_many_unknown_keys_the_first_three_are_named():
    with pytest.raises(ValueError, match="unknown key 'guide_a', 'guide_b', 'guide_c' and 2 more;"):
        check_request(Params({f"guide_{letter}": 1 for letter in "abcde"}), None)


SHOWN = {"guide_values": 1, "guide_values_id": "0123456789abcdef"}


def test_values_are_kept_for_who_asks_guided_or_not():
    for own in ({}, {"guide": 0}, {"guide": 1}):
        check_request(Params(SHOWN | own), config())
        request, clamps = granted(SHOWN | own)
        assert request.values_id == SHOWN["guide_values_id"]
        assert request.is_guided == bool(own.get("guide"))
        assert clamps == []
    check_request(Params({"guide_values": 0}), config())
    assert granted({"guide_values": 0}) == (None, [])


def test_values_that_nobody_could_fetch_are_refused_and_not_kept():
    with pytest.raises(ValueError, match=r"guide_values=1 came, but nothing here puts values into"):
        check_request(Params({"guide_values": 1}), None)
    for own in ({"guide_values_id": "0123456789abcdef"}, SHOWN | {"guide_values": 0}):
        with pytest.raises(ValueError, match="guide_values_id came without guide_values=1"):
            check_request(Params(own), config())
    with pytest.raises(ValueError, match="guide_values_id='short': string should have at least 16"):
        check_request(Params(SHOWN | {"guide_values_id": "short"}), config())
    request, clamps = admit(Params(SHOWN), config(), (), groups=True, shows=False)
    assert request is None
    assert clamps == ["guide_values came, but nobody can fetch values from this engine's workers"]


def test_an_implicit_reward_has_no_values_to_show():
    with pytest.raises(ValueError, match="guide_values was given, but the server's scorer is an"):
        check_request(Params(SHOWN), config(kind="implicit"))
    request, clamps = admit(Params(SHOWN | {"guide": 1}), config(), (), groups=True, values=False)
    assert request.values_id is None
    assert clamps == ["guide_values came, but this scorer has no value of a prefix"]
