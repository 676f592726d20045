"""Cards by name and by size."""

import pytest

from guided_decode.checkpoints.plan.cards import CARDS, GIB, find_card


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("H100", "H100 SXM"),
        ("h100-pcie", "H100 PCIe"),
        ("NVL H100", None),
        ("A100", "A100 SXM 80GB"),
        ("a100 40gb", "A100 40GB"),
        ("A6000", "RTX A6000"),
        ("mi300x", "MI300X"),
    ],
)
def test_a_card_goes_by_its_name(given, name):
    if name is None:
        with pytest.raises(ValueError, match=r"gpu='NVL H100': expected a size, 80GB, or one of H"):
            find_card(given)
    else:
        assert find_card(given).name == name


def test_every_card_is_found_by_its_own_name_and_has_less_than_its_gigabytes():
    for card in CARDS:
        assert find_card(card.name) is card
        assert 0.9 * card.nominal < card.gib < card.nominal


@pytest.mark.parametrize("given", ["80GB", "80 gb", "80.0GB"])
def test_a_size_means_the_slowest_card_of_it(given):
    card = find_card(given)
    alike = [one for one in CARDS if one.nominal == 80]
    assert card.bandwidth == min(one.bandwidth for one in alike) == 1.935e12
    assert card.gib == min(one.gib for one in alike)
    assert card.assumed == "the 1.94 TB/s of A100 PCIe 80GB, the slowest of its size"


def test_a_size_that_no_card_has_is_taken_at_its_word():
    assert find_card("100GB").bytes == pytest.approx(100e9, abs=1)
    assert find_card("100GB").bandwidth is None
    assert find_card("100GiB").bytes == 100 * GIB
    assert find_card("100GB", 2e12).bandwidth == 2e12


def test_a_bandwidth_that_is_given_is_no_assumption():
    card = find_card("80GB", 3e12)
    assert (card.bandwidth, card.assumed) == (3e12, None)


@pytest.mark.parametrize("given", ["", "GPU", "0GB", "-80GB", "80", "80TB"])
def test_what_is_no_card_is_refused(given):
    with pytest.raises(ValueError, match="expected a size, 80GB, or one of H100 SXM, H100 PCIe"):
        find_card(given)


@pytest.mark.parametrize("given", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bandwidth_that_is_none_is_refused(given):
    with pytest.raises(ValueError, match="expected bytes a second, a number above 0"):
        find_card("H100", given)
