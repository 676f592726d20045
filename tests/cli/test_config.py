"""`--config FILE`: settings of `generate`, `serve` and `search` by section; what is typed wins."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from guided_decode import tiny_tulu
from guided_decode.cli.app import app
from guided_decode.cli.config_file import is_config, read_config
from guided_decode.cli.errors import Refusal

PROMPT = "What is 4785 + 5426?"
CALIBRATED = """\
models:
  policy: tiny-tulu-sft
  scorer: tiny-tulu-value
  kind: ppo-critic
guidance:
  beta: 1e-3
  top_k: 4
"""


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture
def config(tmp_path):
    def write(text, name="guidance.yaml"):
        file = tmp_path / name
        file.write_text(text)
        return file

    return write


def generate(*words):
    result = run("generate", "--prompt", PROMPT, "--max-new-tokens", 60, *words)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_generate_takes_what_is_typed_in_the_place_of_what_the_file_says(config):
    # So small a beta leaves the policy its errors; 10 is what was chosen for this critic.
    file = config(CALIBRATED)
    plain = generate("--config", file)
    assert plain == generate("--beta", "1e-3", "--top-k", 4)
    assert not tiny_tulu.is_correct(PROMPT, plain)
    assert tiny_tulu.is_correct(PROMPT, generate("--config", file, "--beta", 10))


def test_json_is_read_too_with_a_section_of_the_command(config):
    settings = {"guidance": {"beta": 10}, "generate": {"max_new_tokens": 3, "as_json": True}}
    file = config(json.dumps(settings, indent="\t"), "guidance.json")
    result = run("generate", "--prompt", PROMPT, "--config", file)
    assert json.loads(result.stdout)["tokens"] == 3


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("guidance:\n  beta: 1\n  betta: 2\n",
         ["guidance.yaml, line 3: betta: no such setting of generate in guidance (did you mean "
          "beta?)"]),
        ("guidance:\n  top-k: 4\n", ["line 2: top-k: no such setting", "did you mean top_k?"]),
        ("guidence:\n  beta: 1\nmodels:\n  polcy: x\n",
         ["line 1: guidence: no such section (did you mean guidance?)", "line 4: polcy: no such"]),
        ("guidance:\n  beta: high\n  top_k: 2.5\n  gate: true\nmodels:\n  scorer: [a, b]\n",
         ["line 2: beta: 'high': ", "line 3: top_k: 2.5: ", "line 4: gate: True: expected a float",
          "line 6: scorer: ['a', 'b']: expected one value"]),
        ("guidance:\n  beta: 1\n  beta: 2\n", ["line 3: beta stands in line 2 already"]),
        ("guidance: 3\n", ["line 1: guidance: expected settings below it"]),
        ("- 3\n", ["expected sections of settings, of models, guidance, generate, search, serve"]),
        ("guidance:\n  beta: [1\n", ["line 3: not YAML"]),
        ("generate:\n  config: other.yaml\n", ["line 2: config: no such setting of generate"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_line_and_all_of_it_at_once(config, text, problems):
    result = run("generate", "--prompt", PROMPT, "--config", config(text))
    assert result.exit_code == 2
    for problem in problems:
        assert problem in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1


def test_a_setting_without_meaning_is_refused_as_if_it_were_typed(config):
    result = run("generate", "--prompt", PROMPT, "--config", config("guidance:\n  top_p: 2\n"))
    assert result.exit_code == 2
    assert "--top-p 2.0: expected a finite number" in result.stderr


def test_a_file_that_is_not_there_is_refused(tmp_path):
    result = run("generate", "--prompt", PROMPT, "--config", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "none.yaml" in result.stderr


def test_serve_reads_ours_and_hands_on_vllms(config):
    pytest.importorskip("vllm")
    ours, theirs = config(CALIBRATED), config("max-model-len: 128\n", "vllm.yaml")
    result = run("serve", "--config", ours, "--config", theirs, "--top-k", 2, "--dry-run")
    assert result.exit_code == 0, result.output
    words = shlex.split(result.stdout)
    given = json.loads(words[words.index("--additional-config") + 1])["guided_decode"]
    assert (given["scorer"], given["kind"]) == ("tiny-tulu-value", "ppo-critic")
    assert (float(given["beta"]), given["top_k"]) == (1e-3, 2)
    assert words.count("--config") == 1
    assert words[words.index("--config") + 1] == str(theirs)


def test_smc_weighs_its_particles_by_the_calibrated_beta(config):
    file = config(CALIBRATED.replace("1e-3", "7.5") + "search:\n  particles: 2\n  seed: 3\n")
    words = ("search", "--prompt", PROMPT, "--max-new-tokens", 24, "--method")
    found = json.loads(run(*words, "smc", "--config", file).stdout)
    typed = json.loads(run(*words, "smc", "--beta", 7.5, "--particles", 2, "--seed", 3,
                           "--kind", "ppo-critic").stdout)  # fmt: skip
    assert found["run"] == typed["run"]
    assert found["response"] == typed["response"]
    other = json.loads(run(*words, "smc", "--config", file, "--beta", 1).stdout)
    assert other["run"] != found["run"]


def test_a_method_without_a_beta_reads_the_models_alone(config):
    file = config(CALIBRATED)
    result = run("search", "--prompt", PROMPT, "--method", "best-of-n", "--n", 2,
                 "--max-new-tokens", 8, "--config", file)  # fmt: skip
    assert result.exit_code == 0, result.output
    broken = config("guidance:\n  betta: 1\n", "broken.yaml")
    result = run("search", "--prompt", PROMPT, "--method", "best-of-n", "--config", broken)
    assert "line 2: betta: no such setting of search in guidance" in result.stderr


def test_other_peoples_files_are_known(config):
    assert is_config(config(CALIBRATED))
    assert not is_config(config("model: x\nport: 8000\n", "vllm.yaml"))
    _, problems = read_config(config("model: x\nguidance: {}\n"))
    assert [(line, said[:23]) for line, said in problems] == [(1, "model: no such section ")]
    with pytest.raises(Refusal, match="expected sections of settings"):
        read_config(config("beta"))
