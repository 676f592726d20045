"""`load_scorer` of an address: what the server's scorer is held to, and what is refused."""

import copy
import re
import sys
from unittest import mock

import pytest
import torch
from transformers import AutoTokenizer

from guided_decode import load_scorer, tiny_tulu
from guided_decode.checkpoints.loading import UnknownPolicyWarning
from guided_decode.scoring.remote import RemoteScorer, ScorerServerError
from tests import models
from tests.serving.served import CLOSE, critic, every_kind, loaded, served

ASKED = ([[5, 6, 7]], torch.tensor([[3, 4]]))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_tulu.model_path("value"))


@pytest.fixture(scope="module")
def server(tokenizer):
    """The embedded value model, as `guided-decode scorer` serves it."""
    scorer = load_scorer("tiny-tulu-value", policy_tokenizer=tokenizer)
    with served(scorer, kind="ppo-critic", tokenizer=tokenizer) as server:
        yield server


@pytest.fixture(scope="module")
def plain():
    """A server that was told nothing of its scorer but itself."""
    with served(critic()) as server:
        yield server


def test_a_scorer_by_its_address(server, tokenizer):
    local = load_scorer("tiny-tulu-value", policy_tokenizer=tokenizer)
    for kind in ("auto", "remote", "ppo-critic"):
        scorer = load_scorer(server.address, kind, policy_tokenizer=tokenizer)
        assert isinstance(scorer, RemoteScorer)
        torch.testing.assert_close(scorer.score(*ASKED).values, local.score(*ASKED).values, **CLOSE)
    described = (
        f"RemoteScorer({server.address!r}, 'tiny-tulu-value', ppo-critic, terminal='baseline')"
    )
    assert repr(scorer) == described


def test_without_the_policys_tokenizer_it_says_so(server):
    with pytest.warns(
        UnknownPolicyWarning, match=f"{server.address} was loaded without policy_tok"
    ):
        load_scorer(server.address)


def test_what_its_server_has_may_be_asked_for(server):
    loaded(server, kind="ppo-critic", bos="drop", terminal="baseline", transform="identity",
           dtype="float32")  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"kind": "reward-model"}, "kind='reward-model' was given, but the scorer at {at} has "
                                   "'ppo-critic': start its server with kind='reward-model', or"),
        ({"terminal": "critic"}, "terminal='critic' was given, but the scorer at {at} has 'basel"),
        ({"bos": "keep"}, "bos='keep' was given, but the scorer at {at} has 'drop'"),
        ({"transform": "softmax:1"}, "transform='softmax:1' was given, but the scorer at {at} has"),
        ({"transform": "cube"}, "transform 'cube': expected one of identity"),
        ({"dtype": "bf16"}, "dtype='bfloat16' was given, but the scorer at {at} has 'float32'"),
        ({"device": "cpu"}, "device= came with {at}, whose server loaded its scorer itself: give "
                            "it to guided-decode scorer, and drop it here"),
        ({"device": "cpu", "cache_tokens": 5}, "device=, cache_tokens= came with {at}, whose"),
        ({"reward": "x", "reference": "y"}, "reward=, reference= came with {at}"),
        ({"max_forward_tokens": 5}, "max_forward_tokens= came with"),
        ({"head": "x"}, "head= came with"),
        ({"revision": "main"}, "revision= came with"),
        ({"rope_theta": 1e4}, "rope_theta= came with"),
        ({"allow_pickle": True}, "allow_pickle= came with"),
        ({"trust_remote_code": True}, "trust_remote_code= came with"),
        ({"quantization": "int8", "gguf_file": "x.gguf", "device_map": "auto"},
         "quantization=, gguf_file=, device_map= came with {at}, whose server loaded its scorer "
         "itself: give them to guided-decode scorer, and drop them here"),
        ({"tp_plan": "auto"}, "tp_plan= came with"),
        ({"timeout": 0}, "timeout=0: expected seconds above 0"),
    ],
)  # fmt: skip
def test_what_its_server_has_not_is_refused(server, asked, reason):
    before = server.sessions.clients
    with pytest.raises(ValueError, match=re.escape(reason.format(at=server.address))):
        loaded(server, **asked)
    assert server.sessions.clients == before


def test_what_a_server_does_not_know_is_not_taken_for_granted(plain):
    with pytest.raises(ValueError, match="the scorer at .* does not say which it has"):
        loaded(plain, kind="verl-critic")


def test_another_tokenizer_is_refused(server, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<|another|>"])
    reason = (
        rf"policy and scorer at {server.address} have different tokenizers: 1 of the policy's "
        rf"\d+ tokens differ, first '<\|another\|>' is \d+ in the policy and missing in the scorer"
    )
    with pytest.raises(ValueError, match=reason):
        load_scorer(server.address, policy_tokenizer=other)
    ended = copy.deepcopy(tokenizer)
    ended.eos_token_id = tokenizer.eos_token_id + 1
    with pytest.raises(ValueError, match="have different special tokens: eos_token_id is"):
        load_scorer(server.address, policy_tokenizer=ended)


def test_without_a_tokenizer_of_the_server_its_rows_are_counted(plain, tokenizer):
    few = len(tokenizer) <= models.VOCAB
    if few:
        load_scorer(plain.address, policy_tokenizer=tokenizer)
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"<|{n}|>" for n in range(models.VOCAB)])
    with pytest.raises(ValueError, match=(
        rf"tokenizer, but the scorer at {plain.address} has a vocabulary of {models.VOCAB} tokens"
    )):  # fmt: skip
        load_scorer(plain.address, policy_tokenizer=larger)


def test_kind_remote_and_its_options_want_an_address():
    folder = models.saved("llama", "token")
    reason = (
        r'kind="remote" was given with .*: expected where a scorer server listens, '
        r"tcp://HOST:PORT or ipc://PATH"
    )
    with pytest.raises(ValueError, match=reason):
        load_scorer(folder, kind="remote")
    for name, value in (("key_file", "x"), ("timeout", 3.0)):
        with pytest.raises(ValueError, match=f"{name}= was given with .* is no scorer server's"):
            load_scorer(folder, kind="verl-critic", **{name: value})


def test_an_address_that_is_none_or_where_nobody_is():
    with pytest.raises(ValueError, match="'tcp://nowhere' is no address of a scorer server"):
        load_scorer("tcp://nowhere")
    from guided_decode.scoring.remote import scorer

    with (
        mock.patch.object(scorer.RemoteScorer.__init__, "__kwdefaults__",
                          {**scorer.RemoteScorer.__init__.__kwdefaults__, "connect_seconds": 0.2}),
        pytest.raises(ScorerServerError, match="no scorer server answers at tcp://127.0.0.1:1"),
    ):  # fmt: skip
        load_scorer("tcp://127.0.0.1:1")


@pytest.mark.parametrize("gone", [{"zmq": "pyzmq"}, {"zmq": "pyzmq", "msgspec": "msgspec"}])
def test_a_missing_library_is_refused_with_what_brings_it(gone):
    from guided_decode.scoring.remote import libraries

    real = libraries.find_spec
    names, verb = " and ".join(gone.values()), "is" if len(gone) == 1 else "are"

    def found(name):
        return None if name in gone else real(name)

    with (
        mock.patch.object(libraries, "find_spec", found),
        pytest.raises(ImportError, match=rf"a scorer server needs {names}, which {verb} not "
                      r"installed: pip install 'guided-decode\[remote\]'"),
    ):  # fmt: skip
        load_scorer("tcp://127.0.0.1:1")


def test_the_package_does_without_them():
    """What is not served needs none of the extra's libraries."""
    import subprocess

    code = (
        "import sys; sys.modules.update(zmq=None, msgspec=None, prometheus_client=None); "
        "import guided_decode.scoring, guided_decode.checkpoints.loading, guided_decode.cli.app; "
        "from guided_decode import load_scorer; "
        "print(load_scorer('tiny-tulu-value').vocab_size > 0)"
    )
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True,
                           text=True, timeout=120)  # fmt: skip
    assert ended.stdout.strip() == "True", ended.stderr


@pytest.mark.parametrize("kind", every_kind())
def test_what_is_served_is_told_as_it_is(kind):
    scorer = every_kind()[kind]()
    with served(scorer) as server:
        model = loaded(server).described.scorer
        wanted = "implicit" if kind == "implicit" else None
        assert (model.kind, model.terminal, model.dtype) == (wanted, scorer.terminal, "float32")
        assert model.transform == (None if kind == "implicit" else "identity")
        bos = {"implicit": None, "ppo-critic": "drop"}.get(kind, "keep")
        assert model.bos == bos
        # A reward model reads one token behind any prefix.
        assert model.room == models.POSITIONS - (kind == "companions")
