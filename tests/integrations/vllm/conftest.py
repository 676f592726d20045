"""The runner of these tests' engines: vLLM's own choice, or V2 where its process was started."""

import pytest

from tests.integrations.vllm import v2_on_cpu

if v2_on_cpu.IS_CHOSEN:
    v2_on_cpu.let_vllm_find_triton()


@pytest.fixture(scope="session")
def brute_force():
    from tests.integrations.vllm import mixed_requests

    return mixed_requests.brute_force_answers()


@pytest.fixture(scope="session")
def plain_tokens():
    from tests.integrations.vllm import mixed_requests

    return mixed_requests.plain_answers()


@pytest.fixture(scope="session")
def trunk_brute_force():
    from tests.integrations.vllm import mixed_requests, trunk_heads

    return mixed_requests.brute_force_answers(trunk_heads.PolicyWithHead())
