"""Small tokenizers of the kinds that policies and judges have, whose tokens may cut characters."""

import functools

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SAMPLE = "Die Größe ist 5 €, sagte sie 😀😃😄. 日本語のテキスト café naïve, the answer is 12. " * 4
_NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] | trim }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{{ '\n' }}{% endfor %}"
    "{{ '[assistant] ' if add_generation_prompt else '' }}"
)


def _wrapped(core, **more):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{**_NAMES, **more})
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


@functools.cache
def byte_level(size=420):
    """As Llama 3's or Qwen's: merges go over the bytes of characters."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>"]
    )
    core.train_from_iterator([SAMPLE], trainer)
    return _wrapped(core)


@functools.cache
def byte_fallback(strips=True):
    """As Llama 2's, or without its first space as Gemma's: what has no token is in bytes."""
    letters = sorted({each for each in SAMPLE if each.isascii() and each != " "} | set("▁é"))
    vocabulary = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *letters,
        "▁a",
        "an",
    ]
    core = Tokenizer(
        models.BPE(
            {each: i for i, each in enumerate(vocabulary)}, [("▁", "a"), ("a", "n")],
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    lead = [normalizers.Prepend("▁")] if strips else []
    core.normalizer = normalizers.Sequence([*lead, normalizers.Replace(" ", "▁")])
    ends = [decoders.Strip(content=" ", left=1, right=0)] if strips else []
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    core.add_special_tokens([AddedToken(each, special=True) for each in vocabulary[:3]])
    return _wrapped(core)
