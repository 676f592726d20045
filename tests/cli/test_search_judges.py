"""`guided-decode search` with the scorer on pooling servers, and with another tokenizer."""

import pytest
from transformers import AutoModelForTokenClassification
from typer.testing import CliRunner

from guided_decode import load_scorer, tiny_tulu
from guided_decode.cli.app import app
from guided_decode.search import METHODS, ScorerJudge, TextJudge, load_generator, run
from guided_decode.search.seeds import derive
from tests import models
from tests.cli.search_runs import (
    PROMPTS,
    SMALL,
    agree,
    options,
    read,
    refused,
    search,
    write_prompts,
)
from tests.search.other_tokenizers import byte_fallback
from tests.search.pooling_server import PoolingServer
from tests.search.scripted_server import Reply, scripted

LENGTH = ("--max-new-tokens", 40)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "in.jsonl")


@pytest.fixture(scope="module")
def critic():
    path = tiny_tulu.model_path("value")
    stock = AutoModelForTokenClassification.from_pretrained(path).eval()
    return PoolingServer(stock, root=str(path))


@pytest.fixture(scope="module")
def served(critic):
    """Two servers of the critic, as --scorer takes them, and its policy."""
    with scripted(critic, critic) as servers:
        urls = ",".join(server.url for server in servers)
        yield ("--policy", "tiny-tulu-sft", "--scorer", urls, "--kind", "ppo-critic")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A reward model with another tokenizer than tiny-tulu's."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = byte_fallback()
    models.tiny("llama", "sequence", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def ways(name):
    return ("--method", name, *options(SMALL[name]), *LENGTH)


@pytest.mark.parametrize("name", ["best-of-n", "vgs", "ppo-mcts"])
def test_pooling_servers_write_what_the_scorer_here_writes(name, prompts, served):
    found = search(*ways(name), *served, prompts)
    expected = search(*ways(name), prompts)
    for one, other in zip(found, expected, strict=True):
        assert one.pop("run") != other.pop("run")
        assert agree(one, other)


def test_a_run_goes_on_with_other_servers(prompts, served, critic, tmp_path):
    out = tmp_path / "out.jsonl"

    third = load_generator("tiny-tulu-sft").encode(tiny_tulu.render(PROMPTS[2]))

    def fails_later(path, body, number):
        if body is not None and body["input"][: len(third)] == third:
            return Reply({"error": "x"}, status=501)
        return critic(path, body, number)

    how = (*ways("best-of-n"), "--batch", 1, "--output", out, prompts)
    with scripted(fails_later) as (server,):
        message = refused(*how, *served[:3], server.url, *served[4:])
    assert f"{server.url}/pooling answered 501 (x): expected 200" in message
    done = read(out)
    assert [line["id"] for line in done] == [0, 1]
    search(*how, *served)
    lines = read(out)
    assert lines[: len(done)] == done
    expected = search(*ways("best-of-n"), prompts)
    assert all(
        agree({**one, "run": ""}, {**other, "run": ""})
        for one, other in zip(lines, expected, strict=True)
    )


@pytest.mark.parametrize("raw", [False, True])
def test_a_scorer_with_another_tokenizer_reads_text(raw, prompts, foreign):
    how = ("--scorer", foreign, "--policy", "tiny-tulu-sft", "--judge-through-text",
           "--judge-format", "tulu-2", *(["--raw"] if raw else []))  # fmt: skip
    lines = search(*ways("best-of-n"), *how, prompts)
    policy, tokenizer = load_generator("tiny-tulu-sft"), byte_fallback()
    judge = TextJudge(
        ScorerJudge(load_scorer(foreign)), tokenizer, policy_tokenizer=policy._text(),
        prompt_format="tulu-2", terminals=policy.eos_token_ids,
    )  # fmt: skip
    for i, line in enumerate(lines):
        ids = policy.encode(PROMPTS[i] if raw else tiny_tulu.render(PROMPTS[i]))
        judge.tell(ids, PROMPTS[i] if raw else [{"role": "user", "content": PROMPTS[i]}])
        begun = METHODS["best-of-n"].begin(ids, seed=derive(0, i), max_tokens=40,
                                           **SMALL["best-of-n"])  # fmt: skip
        found = run(begun, policy, judge)
        assert line["chosen"] == found.chosen
        scores = [each.score for each in found.candidates]
        assert [each["score"] for each in line["candidates"]] == pytest.approx(scores, abs=2e-4)


def test_the_servers_scorer_may_have_another_tokenizer(prompts, foreign):
    model = models.tiny("llama", "sequence", vocab_size=len(byte_fallback()))
    text = ("--policy", "tiny-tulu-sft", "--judge-through-text")
    with scripted(PoolingServer(model, "classify", root=foreign)) as (server,):
        one = search(*ways("smc"), "--scorer", server.url, *text, prompts)
        other = search(*ways("smc"), "--scorer", foreign, *text, prompts)
        assert "different tokenizers" in refused(*ways("smc"), *text[:2], "--scorer", server.url,
                                                 prompts)  # fmt: skip
    assert all(agree({**a, "run": ""}, {**b, "run": ""}) for a, b in zip(one, other, strict=True))


def test_what_would_read_it_is_named(prompts, foreign):
    message = refused(*ways("smc"), "--policy", "tiny-tulu-sft", "--scorer", foreign, prompts)
    assert "policy and critic have different tokenizers" in message
    assert "; or pass --judge-through-text, with which the scorer reads responses as te" in message


@pytest.mark.parametrize("name", ["value-beam", "ppo-mcts", "ppo-mcts-published"])
def test_methods_of_single_tokens_refuse_text(name, prompts, foreign):
    message = refused(*ways(name), "--policy", "tiny-tulu-sft", "--scorer", foreign,
                      "--judge-through-text", prompts)  # fmt: skip
    assert f"--judge-through-text came with --method {name}: this method values single" in message


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (["--scorer-served-name", "x"], "--scorer-served-name came with --scorer tiny-tulu-value, "
         "which is no pooling server: expected http://HOST:PORT"),
        (["--scorer-checkpoint", "tiny-tulu-value"], "--scorer-checkpoint tiny-tulu-value says how "
         "a scorer on pooling servers is read, or whose tokenizer reads text: drop it"),
        (["--scorer", "http://127.0.0.1:1", "--policy", "tiny-tulu-sft", "--key-file", "k"],
         "--key-file is of a scorer server (tcp://HOST:PORT): pooling servers take an API key"),
        (["--judge-format", "tulu-2"], "--judge-format is the scorer's chat format through text"),
        (["--scorer", "http://127.0.0.1:1", "--policy", "tiny-tulu-sft", "--cache-tokens", 9],
         "--cache-tokens came with http://127.0.0.1:1, whose servers have loaded the scorer"),
        (["--scorer", "http://127.0.0.1:1", "--policy", "tiny-tulu-sft", "--scorer-device", "cpu"],
         "--scorer-device cpu came with http://127.0.0.1:1, whose server has placed its scorer"),
        (["--scorer", "http://127.0.0.1:1", "--policy", "tiny-tulu-sft", "--scorer-api-key-env",
          "NO_SUCH"], "NO_SUCH is not set: expected the server's API key in it"),
        (["--scorer", "http://me@127.0.0.1:1", "--policy", "tiny-tulu-sft"],
         "a URL of 127.0.0.1 has a name or password in it"),
        (["--timeout", 3], "--timeout 3.0 came with --scorer tiny-tulu-value, and is for a scorer "
         "on a server (tcp://HOST:PORT): drop it"),
        (["--key-file", "k"], "--key-file k came with --scorer tiny-tulu-value, and is for a"),
        (["--reference", "tiny-tulu-sft", "--scorer", "tiny-tulu-value"], "--reference "
         "tiny-tulu-sft is of a KL term (--kl-coef), or of an implicit reward, which the scorer"),
        (["--reference", "tiny-tulu-sft", "--scorer", "http://127.0.0.1:1", "--policy",
          "tiny-tulu-sft"], "--reference tiny-tulu-sft is of a KL term (--kl-coef), or of an"),
        (["--scorer", "http://127.0.0.1:1"], "is paired with no policy in the registry: pass --po"),
    ],
)  # fmt: skip
def test_options_that_say_nothing_are_refused(how, message, prompts):
    assert message in refused("--method", "best-of-n", *how, prompts)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (["--scorer-device", "cpu"], "--scorer-device cpu came with --method vote, which asks no"),
        (["--timeout", 3], "--timeout 3.0 came with a method that asks no scorer"),
        (["--endpoint", "http://127.0.0.1:1", "--policy", "tiny-tulu-sft", "--dtype", "float16"],
         "--dtype float16 came with --endpoint, whose server has placed the policy, and no scorer"),
        (["--endpoint", "http://127.0.0.1:1", "--policy", "tiny-tulu-sft", "--device", "cpu"],
         "--device cpu came with --endpoint, whose server has placed the policy, and no scorer"),
        (["--engine", "vllm", "--device", "cpu"], "--device cpu came with --engine vllm, which"),
    ],
)  # fmt: skip
def test_options_of_what_is_not_loaded_are_refused(how, message, prompts):
    assert message in refused("--method", "vote", *how, prompts)


def test_a_run_is_another_one_with_another_judge_of_ends(prompts, served, tmp_path):
    """Or with another reference, format, or reward model that is served."""
    out, ends = tmp_path / "out.jsonl", models.saved("llama", "sequence", 1)
    other = models.saved("llama", "sequence", 2)
    how = (*ways("best-of-n"), *served[:4], "--judge-through-text", "--judge-format", "tulu-3",
           "--kind", "ppo-critic", "--output", out, prompts)  # fmt: skip
    search(*how, "--reward", ends)
    assert "made from another input or with other settings" in refused(*how, "--reward", other)
    done = out.read_bytes()
    search(*how, "--reward", ends)
    assert out.read_bytes() == done


def test_a_run_is_another_one_with_another_reference_of_a_kl_term(prompts, served, tmp_path):
    out = tmp_path / "out.jsonl"
    how = ("--method", "ppo-mcts", "--simulations", 2, "--k", 2, "--max-new-tokens", 2,
           "--kl-coef", 0.1, *served, "--output", out, prompts)  # fmt: skip
    search(*how, "--reference", "tiny-tulu-sft")
    assert "with other settings" in refused(*how, "--reference", "tiny-tulu-ppo")


def test_a_scorer_without_a_template_wants_a_format(prompts, tmp_path):
    tokenizer = byte_fallback(strips=False)
    models.tiny("llama", "sequence", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    message = refused(*ways("smc"), "--policy", "tiny-tulu-sft", "--scorer", tmp_path,
                      "--judge-through-text", prompts)  # fmt: skip
    assert "its tokenizer has no chat template: pass --judge-format" in message


def test_other_commands_say_who_asks_pooling_servers(prompts):
    result = CliRunner().invoke(
        app,
        [
            "generate",
            "--policy",
            "tiny-tulu-sft",
            "--scorer",
            "http://127.0.0.1:1",
            "--prompt",
            "Why?",
        ],
    )
    assert result.exit_code == 2
    assert "only guided-decode search asks it" in result.stderr
