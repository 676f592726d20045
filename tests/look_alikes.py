"""Small random checkpoints that are like known ones in all but size.

One factory: the same class, config fields, special tokens, chat template and quirks, under a
folder with the checkpoint's own name, so that the real loading code finds its record. Weights vary
by name.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from tests.models import scratch, tiny

TULU_2_TEMPLATE = (
    "{% for message in messages %}\n{% if message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] }}\n{% elif message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
TULU_3_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
    "{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
    "{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}"
    "{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nPlease reason step by step, and put your final answer within "
    "\\\\boxed{}.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_3_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def _llama_2(template: str = TULU_2_TEMPLATE) -> PreTrainedTokenizerFast:
    """Llama 2's and Mistral's: SentencePiece, a BOS that is put first, no padding token."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{i:02X}>": 3 + i for i in range(256)}
    merges = [("▁", "к"), ("▁к", "и"), ("▁", "+"), ("▁", "-")]
    pieces = ["▁", *map(chr, range(33, 127)), "к", "и", *("".join(pair) for pair in merges)]
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(pieces)}
    own = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    own.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    own.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(own, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _byte_level(
    special: tuple[str, ...], template: str | None, *, bos_first: bool = False, **named: str
) -> PreTrainedTokenizerFast:
    """Llama 3's and Qwen's: bytes, with the newline after a full stop merged as theirs do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(".", "Ċ"), ("Ċ", "Ċ")]
    pieces = [*alphabet, *("".join(pair) for pair in merges)]
    own = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if bos_first:
        bos = named["bos_token"]
        own.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, own.token_to_id(bos))]
        )
    return _wrapped(own, template, **named)


def _wrapped(own: Tokenizer, template: str | None, **named: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=own, **named)
    wrapped.chat_template = template
    return wrapped


_LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
            "<|eot_id|>")  # fmt: skip
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|quad_end|>")
_BASES = {
    "llama-2": _llama_2,
    "mistral": functools.partial(_llama_2, MISTRAL_TEMPLATE),
    "tulu-llama-3": lambda: _byte_level(
        _LLAMA_3, TULU_2_TEMPLATE, bos_first=True,
        bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>",
    ),
    "tulu-3": lambda: _byte_level(
        (*_LLAMA_3, "<pad>"), TULU_3_TEMPLATE,
        bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", pad_token="<pad>",
    ),
    "llama-3": lambda: _byte_level(
        _LLAMA_3, LLAMA_3_TEMPLATE, bos_first=True,
        bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
    ),
    "qwen-base": lambda: _byte_level(_QWEN, CHATML_TEMPLATE, eos_token="<|endoftext|>"),
    "qwen": lambda: _byte_level(_QWEN, CHATML_TEMPLATE, eos_token="<|im_end|>"),
    "qwen-prm": lambda: _byte_level(
        (*_QWEN[:3], "<extra_0>"), CHATML_TEMPLATE, eos_token="<|im_end|>"
    ),
    "skywork-prm": lambda: _byte_level(
        _QWEN, CHATML_TEMPLATE, bos_token="<|endoftext|>", eos_token="<|im_end|>"
    ),
    "qwen-3": lambda: _byte_level(
        (*_QWEN[:3], "<think>", "</think>"), QWEN_3_TEMPLATE, eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    ),
    "deepseek-r1": lambda: _byte_level(
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
         "<think>", "</think>"), None,
        bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>",
    ),
}  # fmt: skip


@functools.cache
def tokenizer_like(base: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the family's build."""
    return _BASES[base]()


@dataclass(frozen=True)
class _Like:
    """architecture and head as `tests.models.tiny` takes them; finish: what is rewritten after."""

    arch: str
    head: str
    tokenizer: str
    config: dict[str, Any] = field(default_factory=dict)
    finish: Callable[[Path], None] | None = None


def _rewritten(
    folder: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    *,
    pickled: bool = False,
    **config: Any,
) -> None:
    """Other weights and config fields in a saved checkpoint."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    weights = {name: value.contiguous() for name, value in weights.items()}
    if pickled:
        path.unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, path, metadata={"format": "pt"})
    own = folder / "config.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | config, indent=2))


def _noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def _without_bias(folder: Path) -> None:
    """EasyLM's converter writes no score.bias, and no padding token."""
    _rewritten(folder, lambda weights: weights.pop("score.bias"), pad_token_id=None)


def _no_lm_head(weights: dict[str, torch.Tensor]) -> int:
    weights.pop("lm_head.weight", None)
    return weights["model.norm.weight"].shape[0]


def _open_reasoner_zero_critic(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["value_head.weight"] = _noise(1, _no_lm_head(weights), seed=11)

    _rewritten(folder, change, architectures=["CriticModel"])


def _qwen_prm(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        hidden = _no_lm_head(weights)
        weights["score.0.weight"] = _noise(hidden, hidden, seed=12)
        weights["score.0.bias"] = _noise(hidden, seed=13)
        weights["score.2.weight"] = _noise(2, hidden, seed=14)
        weights["score.2.bias"] = _noise(2, seed=15)

    _rewritten(
        folder, change, architectures=["Qwen2ForProcessRewardModel"], num_labels=2,
        auto_map={"AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig",
                  "AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"},
    )  # fmt: skip


def _skywork_prm(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        hidden = weights["model.norm.weight"].shape[0]
        weights["v_head.summary.weight"] = _noise(1, hidden, seed=16)
        weights["v_head.summary.bias"] = torch.tensor([0.25])

    _rewritten(folder, change, pickled=True, architectures=["Qwen2ForPrmModel"])


def _value_guided_search(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        hidden = _no_lm_head(weights)
        weights["score.0.weight"] = _noise(hidden, hidden, seed=17)
        weights["score.2.weight"] = _noise(3, hidden, seed=18)

    labels = {"id2label": {str(i): f"LABEL_{i}" for i in range(3)}}
    _rewritten(folder, change, architectures=["Qwen2ForClassifier"], **labels)


def _tulu_policy(*names: str) -> dict[str, _Like]:
    return {name: _Like("llama", "lm", "llama-2") for name in names}


_CRITIC = _Like("llama", "token", "llama-2", finish=_without_bias)
_ORZ_CRITIC = _Like("qwen2", "lm", "qwen-base", finish=_open_reasoner_zero_critic)
_ORZ_POLICY = _Like("qwen2", "lm", "qwen-base")
_QWEN_PRM = _Like("qwen2", "lm", "qwen-prm", finish=_qwen_prm)
_SKYWORK_PRM = _Like("qwen2", "lm", "skywork-prm", finish=_skywork_prm)
_LLAMA_RM, _QWEN_RM = _Like("llama", "sequence", "llama-3"), _Like("qwen3", "sequence", "qwen-3")

LIKES: dict[str, _Like] = {
    **{f"tulu-v2.5-ppo-13b-uf-mean-{rm}-rm-value": _CRITIC
       for rm in ("70b-mix", "70b-uf", "13b-mix", "13b-uf")},
    "tulu-v2.5-7b-uf-mean-7b-uf-rm-value": _CRITIC,
    **_tulu_policy("tulu-2-dpo-70b", "tulu-2-dpo-13b",
                   "tulu-2-dpo-7b", "tulu-2-70b", "tulu-2-13b", "tulu-2-7b"),
    # vLLM's attention on a CPU has no kernel for the 12 of the others.
    "tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm": _Like("llama", "lm", "llama-2", {"head_dim": 32}),
    "llama-3.1-tulu-2-70b-uf-mean-rm": _Like("llama", "sequence", "tulu-llama-3"),
    "llama-3.1-tulu-2-8b-uf-mean-rm": _Like("llama", "sequence", "tulu-llama-3"),
    "llama-3.1-tulu-2-70b": _Like("llama", "lm", "tulu-llama-3"),
    "llama-3.1-tulu-2-8b": _Like("llama", "lm", "tulu-llama-3"),
    "Llama-3.1-Tulu-3-8B-RM": _Like("llama", "sequence", "tulu-3"),
    "Llama-3.1-Tulu-3-8B": _Like("llama", "lm", "tulu-3"),
    "Contextual_KTO_Mistral_PairRM": _Like("mistral", "lm", "mistral"),
    "Mistral-7B-Instruct-v0.2": _Like("mistral", "lm", "mistral"),
    **{f"Open-Reasoner-Zero-Critic-{size}": _ORZ_CRITIC for size in ("0.5B", "1.5B", "7B", "32B")},
    **{f"Open-Reasoner-Zero-{size}": _ORZ_POLICY for size in ("0.5B", "1.5B", "7B", "32B")},
    "DeepSeek-VM-1.5B": _Like("qwen2", "lm", "deepseek-r1", finish=_value_guided_search),
    "DeepSeek-R1-Distill-Qwen-1.5B": _Like("qwen2", "lm", "deepseek-r1"),
    **dict.fromkeys(("Qwen2.5-Math-PRM-7B", "Qwen2.5-Math-PRM-72B", "Qwen2.5-Math-7B-PRM800K"),
                    _QWEN_PRM),
    **{f"Skywork-o1-Open-PRM-Qwen-2.5-{size}": _SKYWORK_PRM for size in ("1.5B", "7B")},
    "math-shepherd-mistral-7b-prm": _Like("mistral", "lm", "llama-2"),
    "Qwen2.5-Math-7B-Instruct": _Like("qwen2", "lm", "qwen"),
    **{f"Skywork-Reward-V2-Llama-{size}": _LLAMA_RM
       for size in ("3.1-8B", "3.1-8B-40M", "3.2-3B", "3.2-1B")},
    **{f"Skywork-Reward-V2-Qwen3-{size}": _QWEN_RM for size in ("8B", "4B", "1.7B", "0.6B")},
    "Skywork-Reward-Llama-3.1-8B-v0.2": _LLAMA_RM,
    "RM-Mistral-7B": _Like("mistral", "sequence", "mistral"),
}  # fmt: skip


@functools.cache
def look_alike(name: str) -> str:
    """The folder of a checkpoint that is like the one of that name, with or without its owner."""
    bare = name.rpartition("/")[2]
    like = LIKES[bare]
    folder = look_alikes() / bare
    tokenizer = tokenizer_like(like.tokenizer)
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos")}
    seed = zlib.crc32(bare.encode()) % 1000
    model = tiny(
        like.arch, like.head, seed, vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id, max_position_embeddings=2048, **ids,
        **like.config,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if like.finish is not None:
        like.finish(folder)
    return str(folder)


@functools.cache
def look_alikes() -> Path:
    """The folder that has them all, each under its name without the owner."""
    folder = scratch() / "look-alikes"
    folder.mkdir()
    return folder
