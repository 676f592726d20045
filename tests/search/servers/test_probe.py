"""What servers are asked before a search relies on them, and what is refused there."""

import math

import pytest

from guided_decode.search import EndpointError, Retry, Sampling
from guided_decode.search.servers import connect_generator
from guided_decode.search.servers.probe import follows_temperature
from tests import PATIENCE
from tests.search.servers.completion_server import Bad, CompletionServer
from tests.search.servers.test_generator import extend, of_logprobs, setting, without

HASTY = {"timeout": float(PATIENCE), "retry": Retry(attempts=2, first=0.01)}


def connect(server, tokenizer, **options):
    return connect_generator(server.url, tokenizer=tokenizer, **HASTY, **options)


def test_a_server_says_what_it_serves(live, tokenizer):
    with CompletionServer(live, tokenizer, max_model_len=77).running() as server:
        with connect(server, tokenizer) as remote:
            served = remote.served
            assert (served.model, served.dialect, served.max_model_len) == ("policy", "vllm", 77)
            assert remote.eos_token_ids == {tokenizer.eos_token_id}
        server.names = ["base", "policy"]
        with pytest.raises(ValueError, match=r"serves base, policy: pass model=, one of them"):
            connect(server, tokenizer)
        with connect(server, tokenizer, model="policy") as remote:
            assert remote.served.model == "policy"
        with pytest.raises(ValueError, match=r"serves base, policy, and not other"):
            connect(server, tokenizer, model="other")


def test_a_server_need_not_list_its_models(live, tokenizer):
    with CompletionServer(live, tokenizer, lists=False).running() as server:
        with connect(server, tokenizer, model="policy") as remote:
            assert (remote.served.model, remote.served.max_model_len) == ("policy", None)
        with pytest.raises(EndpointError, match=r"/v1/models answered 404 \(Not Found\)"):
            connect(server, tokenizer)


def test_a_server_without_a_tokenizer_reads_no_text(live, tokenizer):
    def behave(number, body):
        return Bad(status=400, text="no text") if isinstance(body["prompt"], str) else None

    with (
        CompletionServer(live, tokenizer, behave=behave).running() as server,
        connect(server, tokenizer) as remote,
    ):
        assert remote.served.dialect == "vllm"


def test_a_server_of_openais_own_fields_is_read_by_its_text(live, tokenizer, prompts):
    with (
        CompletionServer(live, tokenizer, plain=True).running() as server,
        connect(server, tokenizer) as remote,
    ):
        assert remote.served.dialect == "ids"
        ((own,),) = extend(remote, prompts[:1], most=80)
        assert own == live.draw(prompts[0], 80, Sampling(temperature=0.0), 0)
        assert own.reason == "eos"
        assert "token_ids" not in str(server.asked()[-1])
        with pytest.raises(ValueError, match="a stop string does not say at which token it ended"):
            extend(remote, prompts[:1], how=Sampling(stop=("x",)))
        with pytest.raises(ValueError, match="names tokens by their text"):
            remote.next_tokens(prompts[:1], [5], temperatures=[1.0], references=[False])

        # A text that is read as other tokens than were drawn: "1", "2" where the text says "12".
        server.change = of_logprobs("tokens", ["?"] * len(own.tokens))
        with pytest.raises(ValueError, match=r"does not say which \d+ tokens were drawn"):
            extend(remote, prompts[:1], most=80)
        server.change = of_logprobs("token_logprobs", [-1.0] * (len(own.tokens) - 1))
        with pytest.raises(ValueError, match=r"does not say which \d+ tokens were drawn"):
            extend(remote, prompts[:1], most=80)


def test_a_server_that_takes_text_alone_is_sent_what_reads_as_the_tokens(live, tokenizer, prompts):
    def behave(number, body):
        refused = not isinstance(body["prompt"], str)
        return Bad(status=400, text="prompt: expected a string") if refused else None

    with (
        CompletionServer(live, tokenizer, plain=True, behave=behave).running() as server,
        connect(server, tokenizer) as remote,
    ):
        assert remote.served.dialect == "text"
        ((own,),) = extend(remote, prompts[:1], most=80)
        assert own == live.draw(prompts[0], 80, Sampling(temperature=0.0), 0)
        letters = [tokenizer.convert_tokens_to_ids(one) for one in "Answer"]
        with pytest.raises(ValueError, match="are not what their text is read as"):
            extend(remote, [letters])


def test_ids_that_are_log_probabilities_names_alone_do(live, tokenizer, prompts):
    # vLLM before return_token_ids.
    def old(body, answer):
        for name in ("token_ids", "prompt_token_ids"):
            answer["choices"][0].pop(name, None)
        return answer

    with (
        CompletionServer(live, tokenizer, change=old).running() as server,
        connect(server, tokenizer) as remote,
    ):
        assert remote.served.dialect == "vllm"
        ((own,),) = extend(remote, prompts[:1])
        assert own == live.draw(prompts[0], 24, Sampling(temperature=0.0), 0)


class Sharpened:
    """A server that gives log-probabilities after temperature."""

    def __init__(self, live):
        self.live, self.draw = live, live.draw
        self.heat = 1.0

    def log_probs(self, prefix):
        plain = [each / self.heat for each in self.live.log_probs(prefix)]
        total = math.log(math.fsum(map(math.exp, plain)))
        return [each - total for each in plain]


def test_log_probabilities_after_temperature_are_refused(live, tokenizer):
    model = Sharpened(live)

    def behave(number, body):
        model.heat = body["temperature"] or 1.0

    for plain in (False, True):
        with (
            CompletionServer(model, tokenizer, behave=behave, plain=plain).running() as server,
            pytest.raises(ValueError, match=r"after temperature.*--logprobs-mode raw_logprobs"),
        ):
            connect(server, tokenizer)


def test_what_is_sharpened_is_told_from_what_is_rounded():
    plain = {1: -0.5, 2: -1.5, 3: -2.5}
    assert not follows_temperature(plain, {1: -0.52, 2: -1.47, 4: -2.6})
    assert follows_temperature(plain, {1: -0.1, 2: -2.1, 3: -4.1})
    # Top-p has left one.
    assert follows_temperature(plain, {1: 0.0})


def test_servers_of_different_models_are_refused(live, tokenizer):
    other = Sharpened(live)
    other.heat = 3.0
    with (
        CompletionServer(live, tokenizer).running() as one,
        CompletionServer(other, tokenizer).running() as two,
    ):
        with pytest.raises(ValueError, match=r"serve different models as policy"):
            connect_generator([one.url, two.url], tokenizer=tokenizer, **HASTY)
        two.model, two.max_model_len = live, 60
        with connect_generator([one.url, two.url], tokenizer=tokenizer) as remote:
            assert remote.served.max_model_len == 60


def test_another_tokenizer_is_refused(live, tokenizer):
    class Other:
        def encode(self, text, **how):
            return tokenizer.encode(text, **how)[1:]

        def decode(self, *what, **how):
            return tokenizer.decode(*what, **how)

    with (
        CompletionServer(live, Other()).running() as server,
        pytest.raises(ValueError, match=r"serves policy with another tokenizer than the policy's"),
    ):
        connect(server, tokenizer)


@pytest.mark.parametrize("change", [setting("logprobs", None), without("logprobs")])
def test_a_server_without_log_probabilities_is_refused(live, tokenizer, change):
    with (
        CompletionServer(live, tokenizer, change=change).running() as server,
        pytest.raises(ValueError, match=r"needs the log-probabilities of what was drawn"),
    ):
        connect(server, tokenizer)


def test_a_server_that_is_not_there_is_an_endpoint_error(live, tokenizer):
    with CompletionServer(live, tokenizer).running() as server:
        server.behave = lambda number, body: Bad(status=503, text="loading")
        with pytest.raises(
            EndpointError, match=r"answered 503 \(loading\), the last of 2 attempts"
        ):
            connect(server, tokenizer)
        url = server.url
    with pytest.raises(EndpointError, match=f"{url}/v1/models.*ConnectError"):
        connect_generator(url, tokenizer=tokenizer, **HASTY)


def test_an_end_is_needed(live, tokenizer):
    class Endless:
        eos_token_id = None

    with pytest.raises(ValueError, match="names no end-of-sequence token: pass eos_token_ids="):
        connect_generator("http://127.0.0.1:1", tokenizer=Endless())
