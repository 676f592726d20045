"""What stands for what a block needs and this machine may lack; all of it, in one place."""

import atexit
import contextlib
import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from guided_decode import tiny_tulu
from guided_decode.checkpoints.registry import find
from guided_decode.search import load_generator
from tests.models import scratch
from tests.search.recordings import Live
from tests.search.servers.completion_server import CompletionServer

# Checkpoints of the Hub, and the embedded models of the same architecture and kind.
CHECKPOINTS = {
    "allenai/tulu-v2.5-ppo-13b-uf-mean-13b-mix-rm": "tiny-tulu-ppo",
    "allenai/tulu-v2.5-ppo-13b-uf-mean-13b-mix-rm-value": "tiny-tulu-value",
}
# Words of a command line. The others in capitals are files, which no check opens.
WORDS = {"POLICY": "tiny-tulu-sft", "CRITIC": "tiny-tulu-value"}


def _quoted(text: object) -> str:
    return f'"{text}"'


# By what a Python block needs: its own text, and the text that is run.
PYTHON = {
    "network": {_quoted(hub): _quoted(find(own).location) for hub, own in CHECKPOINTS.items()},
    "gpu": {_quoted(f"cuda:{i}"): _quoted("cpu") for i in range(2)}
    | {'tp_plan="auto"': "tp_plan=None"},
    "names": {_quoted("DIR"): _quoted(tiny_tulu.trunk_head_path("ppo"))},
    "minutes": {"PPOConfig()": "PPOConfig(steps=1, rollouts_per_step=2, max_new_tokens=4)"},
}


def stand_in(code: str, needs: str) -> str:
    """The code with one need's stand-ins. Raises ValueError where it has no such need."""
    known = PYTHON.get(needs, {})
    if not any(text in code for text in known):
        raise ValueError(f"needs {needs}, but the block has none of {', '.join(known)}: drop it, "
                         "or say in stand_ins.PYTHON what stands for it")  # fmt: skip
    for text, other in known.items():
        code = code.replace(text, other)
    return code


def _policy() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_tulu.model_path("sft"))


def _value_model() -> Any:
    return AutoModelForTokenClassification.from_pretrained(tiny_tulu.model_path("value"))


def _reward(prompts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
    assert len(prompts) == len(responses)
    return torch.tensor([float(len(response)) for response in responses])


def _prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tulu.model_path("sft"))
    texts = [tiny_tulu.render(message) for message in tiny_tulu.training_prompts(2, seed=0)]
    return tokenizer(texts, add_special_tokens=False).input_ids


def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_tulu.model_path("sft"))


def _prompt_ids() -> torch.Tensor:
    return torch.tensor(_prompts()[:1])


def _adapter() -> str:
    """The folder of an adapter that makes a critic of a language model."""
    import peft

    folder = tempfile.mkdtemp(dir=scratch())
    base = AutoModelForTokenClassification.from_pretrained(
        tiny_tulu.model_path("sft"), num_labels=1
    )
    config = peft.LoraConfig(task_type="TOKEN_CLS", target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(base, config).save_pretrained(folder)
    return folder


def _servers() -> list[str]:
    """The address of a server that has the policy, as long as the tests run."""
    server = CompletionServer(Live(load_generator(tiny_tulu.model_path("sft"))), _tokenizer())
    running = contextlib.ExitStack()
    atexit.register(running.close)
    return [running.enter_context(server.running()).url]


# Names that are the reader's own, by what makes them.
GIVEN = {
    "policy": _policy,
    "reference": _policy,
    "value_model": _value_model,
    "reward": lambda: _reward,
    "prompts": _prompts,
    "prompt_ids": _prompt_ids,
    "tokenizer": _tokenizer,
    "adapter": _adapter,
    "servers": _servers,
}
