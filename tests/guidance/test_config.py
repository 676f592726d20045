"""GuidanceConfig takes numbers of any library, and refuses what is none."""

import dataclasses
import json

import numpy as np
import pytest

from guided_decode import GuidanceConfig


def test_numpys_numbers_are_numbers_and_are_kept_as_pythons():
    config = GuidanceConfig(
        beta=np.float32(1.5), top_k=np.int64(4), top_p=np.float16(0.5), gate=np.float64(0.25),
        kl_coef=np.int32(1), margin=np.float32(0.5), rule="prune",
    )  # fmt: skip
    assert config == GuidanceConfig(1.5, 4, 0.5, "prune", 0.5, gate=0.25, kl_coef=1)
    kinds = {type(getattr(config, name)) for name in ("beta", "top_k", "top_p", "gate", "margin")}
    assert kinds == {int, float}
    json.dumps(dataclasses.asdict(config))


@pytest.mark.parametrize("name", ["beta", "top_p", "gate", "kl_coef", "top_k"])
@pytest.mark.parametrize(
    "given", [10**400, pytest.param(-(10**5000), id="long"), np.bool_(True), True, "1", [1], np.nan]
)
def test_what_is_no_number_of_float32_is_refused_in_words(name, given):
    with pytest.raises(ValueError, match=f"{name}=.*: expected a") as refused:
        GuidanceConfig(**{name: given})
    assert len(str(refused.value)) < 200
