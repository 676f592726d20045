"""The generator of servers: the policy's own tokens, whatever the wire does to them."""

import pytest

from guided_decode.search import EndpointError, RequestRefused, Retry, Sampling
from guided_decode.search.seeds import derive
from guided_decode.search.servers import Inexact, connect_generator
from tests import PATIENCE
from tests.search.servers.completion_server import Bad, CompletionServer

HASTY = {"timeout": float(PATIENCE), "retry": Retry(attempts=3, first=0.01)}
GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def server(live, tokenizer):
    with CompletionServer(live, tokenizer, max_logprobs=-1).running() as server:
        yield server


@pytest.fixture
def remote(server, tokenizer):
    with connect_generator(server.url, tokenizer=tokenizer, **HASTY) as remote:
        server.asked()
        yield remote


def extend(generator, prefixes, n=1, most=24, how=GREEDY, seeds=None):
    count = len(prefixes)
    return generator.extend(
        prefixes, [n] * count, max_tokens=[most] * count, sampling=[how] * count,
        seeds=seeds or list(range(count)),
    )  # fmt: skip


@pytest.mark.parametrize(
    "how", [GREEDY, Sampling(), Sampling(0.7, 0.9), Sampling(0.0, stop=("c1\n", "c0\n"))], ids=str
)
def test_continuations_are_the_models(remote, live, prompts, how):
    found = extend(remote, prompts[:2], n=3, how=how)
    for i, own in enumerate(found):
        for number, each in enumerate(own):
            seed = 0 if how.temperature == 0 else derive(i, number)
            assert each == live.draw(prompts[i], 24, how, seed)
    reasons = {each.reason for own in found for each in own}
    assert reasons & ({"stop"} if how.stop else {"eos", "length"})


def test_each_continuation_is_a_request_with_a_seed_of_its_own(remote, server, prompts):
    extend(remote, prompts[:2], n=3, how=Sampling(0.8, 0.95), seeds=[5, 6])
    bodies = sorted(server.asked(), key=lambda body: body["seed"])
    assert [body["seed"] for body in bodies] == sorted(
        derive(s, i) for s in (5, 6) for i in range(3)
    )
    for body in bodies:
        assert body["prompt"] in [list(prompt) for prompt in prompts[:2]]
        assert (body["temperature"], body["top_p"], body["n"]) == (0.8, 0.95, 1)
        # What a server's own generation config would else decide.
        assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)
        assert body["stop_token_ids"] == sorted(remote.eos_token_ids)
    extend(remote, prompts[:1], n=5)
    assert len(server.asked()) == 1, "greedy continuations of a prefix are one"


def test_no_token_is_a_continuation_of_none(remote, server, prompts):
    (own,) = extend(remote, prompts[:1], n=2, most=0)
    assert [(each.tokens, each.reason) for each in own] == [((), "length")] * 2
    assert server.asked() == []


def test_requests_tokens_and_retries_are_counted(remote, server, prompts):
    before = remote.stats.requests
    server.behave = lambda number, body: Bad(status=500) if number == 1 else None
    found = extend(remote, prompts, most=7)
    assert remote.stats.requests - before == len(prompts) + 1
    assert remote.stats.retries == 1
    assert remote.stats.prompt_tokens == sum(map(len, prompts))
    assert remote.stats.generated_tokens == sum(len(own[0].tokens) for own in found)


def first_choice(change):
    def changed(body, answer):
        change(answer["choices"][0], answer)
        return answer

    return changed


def without(name):
    return first_choice(lambda choice, answer: choice.pop(name))


def setting(name, value):
    return first_choice(lambda choice, answer: choice.update({name: value}))


def of_logprobs(name, value):
    return first_choice(lambda choice, answer: choice["logprobs"].update({name: value}))


GARBLED = {
    "no choices": (lambda body, answer: {"error": "?"}, "an answer without choices"),
    "more choices": (lambda body, answer: {"choices": answer["choices"] * 2}, "2 choices where 1"),
    "no list": (lambda body, answer: [1], "an answer without choices"),
    "no log-probabilities": (setting("logprobs", None), "an answer without log-probabilities"),
    "too few of them": (of_logprobs("token_logprobs", [-1.0]), "token ids and 1 log-prob"),
    "none of one": (of_logprobs("token_logprobs", [None] * 9), "None where a log-probability"),
    "not a number": (of_logprobs("token_logprobs", [float("nan")] * 9), "nan where a log-prob"),
    "ids of no kind": (setting("token_ids", ["a"] * 9), "expected integers of at least 0"),
    "no tokens": (
        first_choice(lambda choice, answer: choice.update(
            token_ids=[], logprobs={"token_logprobs": [], "tokens": []})),
        "0 tokens where 1 to 9 were asked for"),
    "a number for a list": (setting("prompt_token_ids", 7), "answered what was not asked for"),
    "a list for an object": (setting("logprobs", [[]]), "answered what was not asked for"),
    "taken back": (setting("finish_reason", "abort"), "ended by 'abort'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), GARBLED.values(), ids=GARBLED)
def test_garbage_is_asked_for_again(remote, server, prompts, change, said):
    changes = [change, lambda body, answer: answer]
    server.change = lambda body, answer: changes.pop(0)(body, answer)
    ((own,),) = extend(remote, prompts[:1], most=9)
    assert len(own.tokens) == 9
    server.change = change
    with pytest.raises(EndpointError, match=f"{said}.*the last of 3 attempts"):
        extend(remote, prompts[:1], most=9)


INEXACT = {
    "another prompt": (setting("prompt_token_ids", [1, 2]), "read 2 others: it cuts prompts"),
    "a cut prompt": (
        first_choice(lambda choice, answer: (choice.pop("prompt_token_ids"),
                                             answer.update(usage={"prompt_tokens": 3}))),
        "was sent .* prompt tokens and read 3"),
    "logits": (of_logprobs("token_logprobs", [4.5] * 9), "--logprobs-mode raw_logprobs"),
    "an end of its own": (setting("finish_reason", "stop"), "which ends none here .*eos_token_ids"),
    "a limit of its own": (
        first_choice(lambda choice, answer: choice.update(
            token_ids=choice["token_ids"][:4], logprobs={
                name: value[:4] for name, value in choice["logprobs"].items()})),
        "wrote 4 of 9 tokens .*it has no room for more"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), INEXACT.values(), ids=INEXACT)
def test_what_is_not_exact_is_refused(remote, server, prompts, change, said):
    server.change = change
    with pytest.raises(Inexact, match=said):
        extend(remote, prompts[:1], most=9)
    assert len(server.asked()) == 1, "another answer would be no better"


def test_what_comes_after_an_end_is_dropped(remote, server, prompts, live):
    whole = live.draw(prompts[0], 80, GREEDY, 0)
    assert whole.reason == "eos"

    def goes_on(choice, answer):
        choice["token_ids"] = [*whole.tokens, 7]
        choice["logprobs"]["token_logprobs"] = [*whole.log_probs, -1.0]

    server.change = first_choice(goes_on)
    assert extend(remote, prompts[:1], most=80) == [[whole]]


def test_a_prefix_without_room_is_refused_and_one_with_little_is_answered(live, tokenizer, prompts):
    room = 20
    with (
        CompletionServer(live, tokenizer, max_model_len=len(prompts[0]) + room).running() as server,
        connect_generator(server.url, tokenizer=tokenizer) as remote,
    ):
        ((own,),) = extend(remote, [prompts[0]], most=room)
        assert len(own.tokens) == room
        with pytest.raises(ValueError, match=f"wrote {room} of 90 tokens"):
            extend(remote, [prompts[0]], most=90)
        with pytest.raises(ValueError, match="leaves no room for another: policy is served"):
            extend(remote, [prompts[0] + own.tokens])


@pytest.mark.parametrize(
    ("prefix", "how", "said"),
    [
        ((), GREEDY, "row 0 has an empty prefix"),
        ((-1,), GREEDY, "row 0 has token id -1"),
        ((5,), Sampling(0.001), "temperature=0.001: engines have 0.01 to 2.0"),
        ((5,), Sampling(3.0), "temperature=3.0: engines have"),
    ],
)
def test_what_cannot_be_asked_is_refused(remote, server, prefix, how, said):
    with pytest.raises(ValueError, match=said):
        extend(remote, [prefix], how=how)
    assert server.asked() == []


def ask(generator, prefixes, k=5, temperature=1.0, entropy=False):
    count = len(prefixes)
    return generator.next_tokens(
        prefixes, [k] * count, temperatures=[temperature] * count, references=[False] * count,
        entropies=[entropy] * count,
    )  # fmt: skip


@pytest.mark.parametrize(("temperature", "entropy"), [(1.0, False), (1.0, True), (0.6, False)])
def test_next_tokens_are_the_models(remote, server, policy, prompts, temperature, entropy):
    expected = ask(policy, prompts, 7, temperature, entropy)
    whole = entropy or temperature != 1.0
    for own, exact in zip(ask(remote, prompts, 7, temperature, entropy), expected, strict=True):
        assert (own.tokens, own.ends) == (exact.tokens, exact.ends)
        assert own.log_probs == pytest.approx(exact.log_probs, abs=1e-5)
        assert own.tempered == pytest.approx(exact.tempered, abs=1e-5)
        assert own.entropy == (pytest.approx(exact.entropy, abs=1e-5) if whole else None)
    assert {body["logprobs"] for body in server.asked()} == {-1 if whole else 7}


def test_fewer_than_are_needed_are_refused_and_never_made_up(live, tokenizer, prompts):
    with (
        CompletionServer(live, tokenizer).running() as server,
        connect_generator(server.url, tokenizer=tokenizer) as remote,
    ):
        assert len(ask(remote, prompts[:1], 20)[0].tokens) == 20
        with pytest.raises(RequestRefused, match=r"max allowed: 20.*--max-logprobs 21"):
            ask(remote, prompts[:1], 21)
        with pytest.raises(ValueError, match=r"--max-logprobs -1: this method needs whole"):
            ask(remote, prompts[:1], 5, 0.7)
        with pytest.raises(ValueError, match=r"KL term.*servers do not have.*load_generator"):
            remote.next_tokens(prompts[:1], [5], temperatures=[1.0], references=[True])

        def some(body, answer):
            top = answer["choices"][0]["logprobs"]["top_logprobs"]
            top[0] = dict(list(top[0].items())[:2])
            return answer

        server.change = some
        with pytest.raises(ValueError, match=r"2 next tokens sum to 0\.\d+: expected 1"):
            ask(remote, [(30, 40, 50)], 5)
