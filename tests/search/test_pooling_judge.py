"""A judge on pooling servers: its values are the local judge's; what it cannot prove it refuses."""

import itertools
from functools import partial

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForSequenceClassification

from guided_decode import load_scorer, tiny_tulu
from guided_decode.search import Judged, ScorerJudge
from guided_decode.search.http_failures import EndpointError, Retry
from guided_decode.search.pooling_connection import connect_judge
from tests import PATIENCE, models
from tests.checkpoints.tokenizer_files import swapped, word_tokenizer
from tests.look_alikes import look_alike
from tests.search.pooling_server import PoolingServer
from tests.search.scripted_server import DROPPED, Reply, scripted

BOS, EOS = models.BOS, models.EOS
QUICK = Retry(attempts=3, first=0.01, most=0.02)
TASKS = ("token_classify", "classify")
PROMPTS = [tuple(ids) for ids in models.prompts([7, 12, 1], seed=3)]
RESPONSES = [(), (5, 9, 11), (5, 9, EOS), (5,), (EOS,), (8, 8, 8, 8, EOS)]


def texts():
    prompts = [*PROMPTS, (BOS, *PROMPTS[0])]
    return [
        Judged(prompt, each, each[-1:] == (EOS,))
        for prompt, each in itertools.product(prompts, RESPONSES)
    ]


def connected(*servers, checkpoint=None, kind="auto", **how):
    return connect_judge(
        [server.url for server in servers], checkpoint, kind, **{"retry": QUICK, **how}
    )


CRITIC = models.saved("llama", "token")
KINDS = [
    ("token", "ppo-critic", 1, {}),
    ("token", "verl-critic", 1, {}),
    ("token", "verl-critic", 1, {"terminal": "critic", "transform": "sigmoid"}),
    ("token", "classifier", 3, {}),
    ("sequence", "reward-model", 1, {}),
    ("sequence", "auto", 1, {"bos": "drop"}),
]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("head", "kind", "labels", "how"), KINDS)
def test_its_values_are_the_local_judges(head, kind, labels, how, task):
    path = models.saved("llama", head, 0, labels)
    model = models.tiny("llama", head, 0, labels)
    local = ScorerJudge(load_scorer(path, kind, **how), terminals=[EOS, 3])
    ends = [Judged(PROMPTS[0], (9, 3), True), Judged(PROMPTS[0], (9, 8), True)]
    with (
        scripted(PoolingServer(model, task, root=path)) as (server,),
        connected(server, kind=kind, terminals=[EOS, 3], **how) as judge,
    ):
        assert judge.judge([]) == []
        found = judge.judge([*texts(), *ends])
    assert found == pytest.approx(local.judge([*texts(), *ends]), abs=1e-4)
    assert judge.task == task


def test_it_reads_where_the_local_judge_reads_behind_eos():
    path = look_alike("Skywork-Reward-V2-Qwen3-0.6B")
    model = Qwen3ForSequenceClassification.from_pretrained(path)
    eos = model.config.eos_token_id
    ended = [Judged((5, 6, 7), (9, 11, eos), True), Judged((5, 6, 7), (9, 11), False)]
    local = ScorerJudge(load_scorer(path)).judge(ended)
    with (
        scripted(PoolingServer(model, "classify", root=path)) as (server,),
        connected(server) as judge,
    ):
        found = judge.judge(ended)
    assert found == pytest.approx(local, abs=1e-4)
    newline = AutoTokenizer.from_pretrained(path).encode("\n")
    ids = torch.tensor([[5, 6, 7, 9, 11, eos, *newline]])
    hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
    assert found[0] == pytest.approx(model.score(hidden).item(), abs=1e-4)


def test_a_reward_model_beside_it_judges_what_is_finished():
    critic, reward = models.saved("llama", "token"), models.saved("llama", "sequence", 1)
    scorer = load_scorer(critic, "ppo-critic", reward=reward)
    with (
        scripted(
            PoolingServer(models.tiny("llama", "token"), root=critic),
            PoolingServer(models.tiny("llama", "sequence", 1), "classify", root=reward),
        ) as (one, other),
        connected(other) as of_ends,
        connected(one, kind="ppo-critic", reward=of_ends) as judge,
    ):
        found = judge.judge(texts())
    assert found == pytest.approx(ScorerJudge(scorer).judge(texts()), abs=1e-4)


def test_a_text_is_asked_once_and_counted():
    with (
        scripted(server := PoolingServer(models.tiny("llama", "token"), root=CRITIC)) as servers,
        connected(*servers, kind="verl-critic") as judge,
    ):
        server.texts.clear()
        same = Judged(PROMPTS[0], (5, 9, 11), False)
        # A critic is read before the end.
        ended = Judged(PROMPTS[0], (5, 9, 11, EOS), True)
        one, two, three = judge.judge([same, same, ended])
        assert one == two == three
        assert server.texts == [PROMPTS[0] + (5, 9, 11)]
        assert (judge.stats.rows_scored, judge.stats.forwards) == (3, 1)
        assert judge.stats.tokens == len(PROMPTS[0]) + 3


def answers(server, *replies):
    """Instead of some of the server's answers, after the probe's: these, again and again."""
    state = {"on": False}
    script = itertools.cycle(replies)

    def answer(path, body, number):
        found = server(path, body, number)
        reply = next(script) if state["on"] else None
        return found if reply is None else reply(found) if callable(reply) else reply

    return answer, state


def cut(answer):
    return {**answer, "data": [{**answer["data"][0], "data": answer["data"][0]["data"][1:]}]}


def unread(answer):
    return {**answer, "usage": {"prompt_tokens": 1}}


def holed(answer):
    values = [[None]] * len(answer["data"][0]["data"])
    return {**answer, "data": [{"data": values}]}


def widened(answer):
    values = [[*each, 0.0] for each in answer["data"][0]["data"]]
    return {**answer, "data": [{"data": values}]}


BAD = {
    "fails": (Reply({"error": "x"}, status=500), r"answered 500 \(x\)"),
    "drops": (DROPPED, "broke off"),
    "garbage": (Reply(b"<html>"), "answered what was not asked for"),
    "empty": (Reply({"data": []}), r"no outputs in \"\{'data': \[\]\}\""),
    "cut": (cut, r"\d+ outputs for \d+ of \d+ tokens"),
    "unread": (unread, "it read 1 tokens of a text of"),
    "holed": (holed, "are no numbers, 1 a token"),
    "widened": (widened, "2 outputs a token: expected 1"),
    "hangs": (Reply({}, wait=30), "gave no answer within 1.5 s"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_fails_is_tried_again_and_then_an_error(what):
    reply, message = BAD[what]
    patience = 1.5 if what == "hangs" else float(PATIENCE)
    model = models.tiny("llama", "token")
    local = ScorerJudge(load_scorer(CRITIC, "ppo-critic"))
    some = texts()[:3]
    flaky, when = answers(PoolingServer(model, root=CRITIC), reply, None)
    with (
        scripted(flaky) as servers,
        connected(*servers, kind="ppo-critic", timeout=patience, concurrency=1) as judge,
    ):
        when["on"] = True
        assert judge.judge(some) == pytest.approx(local.judge(some), abs=1e-4)
    broken, when = answers(PoolingServer(model, root=CRITIC), reply)
    with (
        scripted(broken) as servers,
        connected(*servers, kind="ppo-critic", timeout=patience) as judge,
    ):
        when["on"] = True
        with pytest.raises(EndpointError, match=message):
            judge.judge(some)
    # Another server's answers are as good.
    broken, when = answers(PoolingServer(model, root=CRITIC), reply)
    with (
        scripted(broken, PoolingServer(model, root=CRITIC)) as servers,
        connected(*servers, kind="ppo-critic", timeout=patience) as judge,
    ):
        when["on"] = True
        assert judge.judge(some) == pytest.approx(local.judge(some), abs=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_activation_that_is_not_off_is_found(task):
    always = PoolingServer(models.tiny("llama", "token"), task, root=CRITIC, activation=True)
    message = "with use_activation false and .* with true: nothing shows that the first are"
    with scripted(always) as servers, pytest.raises(EndpointError, match=message):
        connected(*servers, kind="ppo-critic")
    classes = models.saved("llama", "token", 0, 3)
    always = PoolingServer(models.tiny("llama", "token", 0, 3), task, root=classes, activation=True)
    with (
        scripted(always) as servers,
        pytest.raises(EndpointError, match="nothing shows that the first are the head's own"),
    ):
        connected(*servers, kind="classifier")


class Between(PoolingServer):
    """Values in (0, 1), as a critic of probabilities has them."""

    def outputs(self, ids, activation):
        values = torch.tensor(super().outputs(ids, False)).sigmoid()
        return (values.sigmoid() if activation else values).tolist()


def test_values_that_might_be_probabilities_are_told_by_what_activation_makes_of_them():
    with (
        scripted(Between(models.tiny("llama", "token"), root=CRITIC)) as servers,
        connected(*servers, kind="ppo-critic") as judge,
    ):
        (value,) = judge.judge(texts()[:1])
        assert 0 < value < 1


def test_a_server_that_keeps_its_raw_outputs_always_is_read():
    never = PoolingServer(models.tiny("llama", "token"), root=CRITIC, activation=False)
    with scripted(never) as servers:
        connected(*servers, kind="ppo-critic").close()


class Ahead(PoolingServer):
    """Values that depend on what follows, as an encoder's."""

    def outputs(self, ids, activation):
        ahead = super().outputs(ids[::-1], activation)
        return ahead if len(ids) > 20 else ahead[::-1]


def test_what_is_not_the_last_tokens_is_found():
    model = models.tiny("llama", "token")
    with (
        scripted(PoolingServer(model, "classify", root=CRITIC, pool="first")) as servers,
        pytest.raises(EndpointError, match='for half of it: .*"pooling_type": "LAST"'),
    ):
        connected(*servers, kind="ppo-critic")
    with (
        scripted(Ahead(model, root=CRITIC)) as servers,
        pytest.raises(EndpointError, match="expected a decoder, whose values do not look ahe"),
    ):
        connected(*servers, kind="ppo-critic")


def test_a_server_of_another_task_is_told_how_to_start():
    message = r"token_classify: .*; classify: .*vllm serve MODEL --runner pooling"
    with (
        scripted(PoolingServer(models.tiny("llama", "token"), "embed", root=CRITIC)) as servers,
        pytest.raises(EndpointError, match=message),
    ):
        connected(*servers, kind="ppo-critic")

    def generates(path, body, number):
        found = {"data": [{"id": "m", "root": CRITIC}]}
        return found if path == "/v1/models" else Reply({"detail": "Not Found"}, status=404)

    with (
        scripted(generates) as servers,
        pytest.raises(EndpointError, match="answered 404 .*--runner pooling"),
    ):
        connected(*servers, kind="ppo-critic")


def test_servers_of_different_models_are_found():
    one = PoolingServer(models.tiny("llama", "token"), root=CRITIC)
    other = PoolingServer(models.tiny("llama", "token", 1), root=CRITIC)
    with (
        scripted(one, other) as servers,
        pytest.raises(EndpointError, match="expected the same model on all servers"),
    ):
        connected(*servers, kind="ppo-critic")
    renamed = PoolingServer(models.tiny("llama", "token"), root=CRITIC, name="other")
    with scripted(one, renamed) as servers:
        message = rf"{servers[1].url} serves other, and not critic: expected the same model"
        with pytest.raises(EndpointError, match=message):
            connected(*servers, kind="ppo-critic")
    with (
        scripted(one) as servers,
        pytest.raises(EndpointError, match="serves critic, and not mine"),
    ):
        connected(*servers, kind="ppo-critic", model="mine")


def test_several_servers_share_the_work_and_the_shortest_limit_holds():
    slow = [PoolingServer(models.tiny("llama", "token"), root=CRITIC, most=m) for m in (64, 32)]
    with scripted(*slow) as servers, connected(*servers, kind="verl-critic") as judge:
        for server in slow:
            server.texts.clear()
        judge.judge([Judged(PROMPTS[0], (5, i), False) for i in range(3, 43)])
        assert len(slow[0].texts) + len(slow[1].texts) == 40
        assert min(len(server.texts) for server in slow) > 5
        with pytest.raises(ValueError, match="a text has 33 tokens, and the servers of critic tak"):
            judge.judge([Judged((5,) * 30, (6, 7, 8), False)])
        with pytest.raises(ValueError, match="token 101 is outside the vocabulary of .* has 101"):
            judge.judge([Judged((5,), (101,), False)])


@pytest.mark.parametrize(
    ("checkpoint", "kind", "how", "message"),
    [
        (None, "auto", {}, 'kind="auto" has no evidence of what trained it; pass kind='),
        ("/nowhere", "auto", {}, "/nowhere: expected a folder .*; it has to be the checkpoint"),
        (partial(models.saved, "llama", "lm"), "auto", {},
         "LlamaForCausalLM: a pooling server reads class"),
        (None, "implicit", {}, "given as implicit, which no pooling server serves"),
        (None, "reward-model", {}, "reward-model expects a class that ends in ForSequenceClassif"),
        (partial(models.saved, "llama", "token", 0, 3), "classifier", {},
         "gives 1 outputs a token at .*, and .* has 3 labels: expected the checkpoint that is "
         "served; pass checkpoint="),
        (None, "verl-critic", {"terminal": "reward"}, "was given without a reward model"),
        (partial(models.saved, "llama", "token", rope_theta=100_000.0), "ppo-critic", {},
         "has rope_theta 100000: one converter for ppo-critic wrote that where 10000 is right"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_what_is_served_is_refused(checkpoint, kind, how, message):
    where = checkpoint() if callable(checkpoint) else checkpoint
    with (
        scripted(PoolingServer(models.tiny("llama", "token"), root=CRITIC)) as servers,
        pytest.raises(ValueError, match=message),
    ):
        connected(*servers, checkpoint=where, kind=kind, **how)


def test_another_tokenizer_is_refused(tmp_path):
    models.tiny("llama", "token").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with scripted(PoolingServer(models.tiny("llama", "token"), root=str(tmp_path))) as servers:
        connected(*servers, kind="ppo-critic", policy_tokenizer=word_tokenizer()).close()
        with pytest.raises(ValueError, match="policy and critic have different tokenizers"):
            connected(*servers, kind="ppo-critic", policy_tokenizer=swapped())
    with scripted(PoolingServer(models.tiny("llama", "token"), root=CRITIC)) as servers:
        longer = word_tokenizer([*word_tokenizer().get_vocab(), "more"])
        with pytest.raises(ValueError, match="'more' is 101 in the policy's tokenizer, but .* 101"):
            connected(*servers, kind="ppo-critic", policy_tokenizer=longer)


def test_a_registered_name_is_read_as_the_registry_says():
    critic = load_scorer("tiny-tulu-value")
    from transformers import AutoModelForTokenClassification

    stock = AutoModelForTokenClassification.from_pretrained(tiny_tulu.model_path("value")).eval()
    some = [Judged((10, 11, 12), (13, 14), False), Judged((1, 10, 11), (13, 2), True)]
    with (
        scripted(PoolingServer(stock, root="/elsewhere")) as servers,
        connected(*servers, checkpoint="tiny-tulu-value",
                  policy_tokenizer=tiny_tulu.model_path("sft")) as judge,
    ):  # fmt: skip
        assert judge.described.prompt_format == "tulu-3"
        assert judge.judge(some) == pytest.approx(ScorerJudge(critic).judge(some), abs=1e-4)
