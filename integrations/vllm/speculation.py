"""Speculative decoding: where guidance goes with it.

Model Runner V2 has a row of logits for each drafted token, and verifies the drafts by what
guidance made of them (`slot_rows`). vLLM's V1 runner refuses any custom processor beside it.
"""

from typing import Any

# Methods beside which the policy's own trunk looks ahead; others have a model that reads its
# hidden states, or that shares its KV cache.
BESIDE_TRUNK = ("ngram", "ngram_gpu")
# Methods that vLLM 0.32 has on its V1 runner only.
ONLY_ON_V1 = ("suffix", "medusa", "mlp_speculator", "custom_class")


def most_drafts(vllm_config: Any) -> int:
    """The most drafted tokens of a request and step; 0 without speculative decoding."""
    speculative = vllm_config.speculative_config
    return 0 if speculative is None else int(speculative.num_speculative_tokens)


def refuse_speculation(vllm_config: Any, *, is_v1: bool, by_trunk: bool) -> None:
    """Raises ValueError: what this engine drafts by, why guidance cannot serve it, what to do.

    by_trunk: the scorer is a head on the policy's own trunk.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    if is_v1:
        raise ValueError(
            "speculative decoding is on, and this engine runs on vLLM's V1 runner, which refuses "
            "custom logits processors beside it: start the server without --speculative-config, "
            "or on Model Runner V2 (vLLM 0.32 or newer, a method other than "
            f"{', '.join(ONLY_ON_V1)}, no VLLM_USE_V2_MODEL_RUNNER=0)"
        )
    if speculative.rejection_sample_method == "synthetic":
        raise ValueError(
            "rejection_sample_method=synthetic accepts drafts whatever their logits are, so that "
            "no token would be guided: start the server with the standard or the block method"
        )
    if by_trunk and speculative.method not in BESIDE_TRUNK:
        raise ValueError(
            f"kind=trunk-head came with drafts by {speculative.method}, whose model shares the "
            "policy's hidden states or its KV cache: draft by ngram, start the server without "
            "--speculative-config, or with a critic of its own"
        )
    if by_trunk:
        _refuse_parts(vllm_config)


def _refuse_parts(vllm_config: Any) -> None:
    """Raises ValueError: a step may have more logits than vLLM verifies at once.

    In the parts of such a step nothing says which of the policy's hidden states are whose.
    """
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

    scheduler, drafts = vllm_config.scheduler_config, most_drafts(vllm_config)
    vocab = vllm_config.model_config.get_vocab_size()
    requests, most = scheduler.max_num_seqs, get_max_chunk_logits(vocab)
    # Each row is that of a token that was scheduled.
    rows = min(requests * (1 + drafts), scheduler.max_num_batched_tokens)
    if rows > most:
        raise ValueError(
            f"kind=trunk-head came with max_num_seqs={requests} and {drafts} drafts each: a step "
            f"has up to {rows} rows, and with a vocabulary of {vocab} tokens vLLM verifies more "
            f"than {most} in parts, in which the policy's hidden states are not known for theirs: "
            f"start the server with --max-num-seqs {max(1, most // (1 + drafts))}, or with fewer "
            "drafts (num_speculative_tokens), or with a critic of its own"
        )
