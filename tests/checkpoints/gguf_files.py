"""Writing GGUF files as llama.cpp's converter does, with the gguf package's own quantiser."""

from pathlib import Path

import numpy as np
import torch

_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path: Path, model, kind: str = "Q8_0", *, head=None, fields=None, extra=None,
               vocabulary=None, architecture="llama"):  # fmt: skip
    """A file of a Llama or Mistral, whose matrices are quantised by `kind`.

    head: (name, tensor, kind) of a tensor beside the trunk. fields: more metadata, of uint32 or
    text. extra: more tensors, float32. vocabulary: pieces of a SentencePiece tokenizer.

    Returns the weights that are left of the model's: those that llama.cpp would compute with, by
    transformers' names.
    """
    import gguf

    config, left = model.config, {}
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("test")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, value in (fields or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
    if vocabulary is not None:
        _add_vocabulary(writer, vocabulary)
    for name, weight in model.state_dict().items():
        own = name.removeprefix("model.")
        if own.startswith("score."):
            continue
        left[name] = _add(writer, _file_name(own), weight, kind, _heads(own, config))
    if head is not None:
        place, tensor, how = head
        _add(writer, place, tensor, how, None)
    for name, tensor in (extra or {}).items():
        _add(writer, name, tensor, "F32", None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return left


def _add_vocabulary(writer, pieces):
    import gguf

    special = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    types = [*special, *[gguf.TokenType.NORMAL] * (len(pieces) - 3)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([float(-i) for i in range(len(pieces))])
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _file_name(own: str) -> str:
    if own in _NAMES:
        return _NAMES[own]
    _, layer, part = own.split(".", 2)
    stem, _, kind = part.rpartition(".")
    return f"blk.{layer}.{_LAYER[stem]}.{kind}"


def _heads(own: str, config) -> int | None:
    """Of queries and keys, whose rows llama.cpp orders otherwise."""
    if own.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if own.endswith("k_proj.weight") else None


def _add(writer, name, weight, kind, heads):
    import gguf

    rows = weight.detach().float().numpy()
    if heads is not None:
        rows = _turn(rows, heads, 2, rows.shape[0] // heads // 2)
    how = gguf.GGMLQuantizationType[kind if rows.ndim > 1 else "F32"]
    packed = gguf.quants.quantize(rows, how)
    writer.add_tensor(name, packed, raw_dtype=how)
    back = gguf.quants.dequantize(packed, how).reshape(rows.shape)
    if heads is not None:
        back = _turn(back, heads, back.shape[0] // heads // 2, 2)
    return torch.from_numpy(np.array(back))


def _turn(rows, heads, *sizes):
    return rows.reshape(heads, *sizes, -1).swapaxes(1, 2).reshape(rows.shape)
