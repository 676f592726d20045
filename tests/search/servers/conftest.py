"""tiny-tulu as the model of a server in this process."""

import pytest

from guided_decode import tiny_tulu
from guided_decode.search import load_generator
from tests.search.recordings import Live


@pytest.fixture(scope="session")
def policy():
    return load_generator(tiny_tulu.model_path("sft"))


@pytest.fixture(scope="session")
def live(policy):
    return Live(policy)


@pytest.fixture(scope="session")
def tokenizer(policy):
    return policy._tokenizer


@pytest.fixture(scope="session")
def prompts(policy):
    texts = tiny_tulu.held_out_prompts(4)
    return [tuple(policy.encode(tiny_tulu.render(text))) for text in texts]
