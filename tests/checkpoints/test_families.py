"""Families are data: each kind's conventions, and the transforms of their heads."""

import dataclasses

import pytest
import torch

from guided_decode.checkpoints.families import FAMILIES, Rope, find_family
from guided_decode.scoring.transforms import Clip, LogSigmoid, SoftmaxClass, parse_transform

OUTPUT = torch.tensor([[-2.0], [0.5], [3.0]])


@pytest.mark.parametrize(
    ("kind", "bos", "terminal", "labels", "read", "bias_must_be_zero"),
    [
        ("ppo-critic", "drop", "baseline", (1,), "token", True),
        ("verl-critic", "keep", "baseline", (1,), "token", False),
        ("value-head", "keep", "baseline", (1,), "token", False),
        ("classifier", "keep", "critic", (3, 1), "token", False),
        ("reward-model", "keep", "critic", (1,), "eos", True),
        ("implicit", "policy", "included", (1,), "token", False),
    ],
)
def test_conventions_of_each_kind(kind, bos, terminal, labels, read, bias_must_be_zero):
    family = find_family(kind)
    assert (family.bos, family.terminal, family.labels) == (bos, terminal, labels)
    assert (family.read, family.bias_must_be_zero) == (read, bias_must_be_zero)


def test_families_are_frozen_and_keyed_by_their_kind():
    assert all(kind == family.kind for kind, family in FAMILIES.items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        FAMILIES["implicit"].bos = "drop"


def test_the_ppo_critics_converter_defect_is_known():
    assert find_family("ppo-critic").rope_defect == Rope(wrong=100_000.0, right=10_000.0)


def test_a_classifiers_transform_follows_its_labels():
    family = find_family("classifier")
    assert [str(family.transform_of(n)) for n in (3, 1)] == ["softmax:1", "sigmoid"]
    with pytest.raises(ValueError, match="a head with 2 labels: classifier expects 3 or 1; pass"):
        family.transform_of(2)


def test_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="kind 'ppo': expected one of ppo-critic, verl-critic"):
        find_family("ppo")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("identity", OUTPUT[:, 0]),
        ("sigmoid", torch.sigmoid(OUTPUT[:, 0])),
        ("log-sigmoid", torch.log(torch.sigmoid(OUTPUT[:, 0]))),
        ("clip:0,1", torch.tensor([0.0, 0.5, 1.0])),
        ("normalise:0.5,2", torch.tensor([-1.25, 0.0, 1.25])),
    ],
)
def test_transforms_of_one_label(text, expected):
    transform = parse_transform(text)
    value = transform(OUTPUT.bfloat16())
    assert value.dtype == torch.float32
    assert value.shape == (3,)
    torch.testing.assert_close(value, expected)
    assert transform.fits(1)
    assert not transform.fits(3)


def test_softmax_reads_one_class_of_several():
    output = torch.tensor([[0.0, 1.0, -1.0], [2.0, 2.0, 2.0]])
    transform = parse_transform("softmax:1")
    torch.testing.assert_close(transform(output), output.softmax(-1)[:, 1])
    assert [transform.fits(n) for n in (1, 2, 3)] == [False, True, True]


@pytest.mark.parametrize(
    "transform",
    [SoftmaxClass(2), Clip(-0.1, 1 / 3), LogSigmoid(), parse_transform("normalise:1,3")],
)
def test_text_of_a_transform_parses_back_to_it(transform):
    assert parse_transform(str(transform)) == transform
    assert parse_transform(transform) is transform


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tanh", "transform 'tanh': expected one of identity, sigmoid"),
        ("clip:0", "transform 'clip:0': clip takes 2 numbers, got 1"),
        ("clip:1,0", "clip:1,0: expected low below high"),
        ("clip:nan,1", "expected low below high"),
        ("softmax:x", "'x' is not numbers"),
        ("softmax:-1", "expected a class index of at least 0"),
        ("softmax:0.5", "expected a class index of at least 0"),
        ("softmax:nan", "expected a class index of at least 0"),
        ("sigmoid:1", "sigmoid takes 0 numbers, got 1"),
        ("normalise:0,0", "expected a std above 0"),
    ],
)
def test_malformed_transforms_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_transform(text)
