#!/bin/sh
# The reward models Llama 3.1 Tulu 2 70B and Llama 3.1 Tulu 3 8B: reranking, blockwise guidance,
# scoring, RewardBench.
#
# guided-decode plan allenai/llama-3.1-tulu-2-8b allenai/llama-3.1-tulu-2-70b-uf-mean-rm says: one
# 80 GB GPU, the reward model in 4 bits beside the policy (52 GiB; extra `bitsandbytes`).
# guided-decode plan allenai/Llama-3.1-Tulu-3-8B allenai/Llama-3.1-Tulu-3-8B-RM says: the same GPU,
# both in bf16 (30 GiB).
#
# MODELS: a folder that has the models, each under its own name. TOKENS: of a response. DATA: where
# the data lies; PAIRS: RewardBench's own file, or one that lacks subsets.
set -e
model() { if [ -n "$MODELS" ]; then echo "$MODELS/${1##*/}"; else echo "$1"; fi; }
precision=${PRECISION-"--dtype bfloat16"}
quantization=${QUANTIZATION-"--quantization bnb-4bit"}
tokens=${TOKENS:-256}
data=${DATA:-$(dirname "$0")}
pairs=${PAIRS:-$data/pairs.jsonl}
tulu_2_rm=$(model allenai/llama-3.1-tulu-2-70b-uf-mean-rm)
tulu_3_rm=$(model allenai/Llama-3.1-Tulu-3-8B-RM)

# Reranking: the best of n whole responses, each read at its EOS.
guided-decode search "$data/prompts.jsonl" --method best-of-n --n "${N:-8}" --max-new-tokens "$tokens" \
    --policy "$(model allenai/llama-3.1-tulu-2-8b)" --prompt-format tulu-2 \
    --scorer "$tulu_2_rm" $quantization $precision

# Blockwise guidance: of six blocks the best goes on. A block that is no whole response is read at
# its last token, where the model was never trained: measure it (rewardbench prints how early in a
# response it sees the better one).
guided-decode search "$data/prompts.jsonl" --method cd --block "${BLOCK:-32}" --max-new-tokens "$tokens" \
    --policy "$(model allenai/Llama-3.1-Tulu-3-8B)" --prompt-format tulu-3 \
    --scorer "$tulu_3_rm" $precision

# Scoring of responses that are there.
guided-decode score "$data/chats.jsonl" - --scorer "$tulu_3_rm" $precision

# RewardBench, read at the token at which the published numbers were.
guided-decode rewardbench --data "$pairs" --partial --model "$tulu_2_rm" $quantization $precision
guided-decode rewardbench --data "$pairs" --partial --model "$tulu_3_rm" $precision
