#!/bin/sh
# Tulu 2 DPO 70B as the policy, with a judge of whole responses; and the 7B DPO model against its
# SFT model as an implicit reward that guides the 70B.
#
# guided-decode plan allenai/tulu-2-dpo-70b allenai/tulu-2-dpo-7b says: three 80 GB GPUs, the policy
# in bf16 over two of them and the pair on the third, as the vLLM server of the command that it
# prints. All on one device, as below without ENDPOINT, takes 155 GiB: one GPU of 180 GB or more.
#
# MODELS: a folder that has the models, each under its own name. TOKENS: of a response.
set -e
model() { if [ -n "$MODELS" ]; then echo "$MODELS/${1##*/}"; else echo "$1"; fi; }
precision=${PRECISION-"--dtype bfloat16"}
tokens=${TOKENS:-256}
question="Why is the sky blue?"

# Eight responses, and of these the one that the critic of another policy of the family likes best.
# Tulu 2 and 2.5 have one tokenizer and one format. With ENDPOINT the policy is on vLLM's server,
# and JUDGE may be the address of a pooling server or of guided-decode scorer:
#   vllm serve allenai/tulu-2-dpo-70b --tensor-parallel-size 2            ENDPOINT=http://HOST:8000
#   guided-decode scorer allenai/tulu-v2.5-ppo-13b-uf-mean-13b-mix-rm-value --dtype bfloat16
#                                                                         JUDGE=tcp://HOST:7070
critic=allenai/tulu-v2.5-ppo-13b-uf-mean-13b-mix-rm-value
guided-decode search --method best-of-n --n "${N:-8}" --max-new-tokens "$tokens" --prompt "$question" \
    --policy "$(model allenai/tulu-2-dpo-70b)" ${ENDPOINT:+--endpoint "$ENDPOINT"} \
    --scorer "${JUDGE:-$(model "$critic")}" $([ -n "$ENDPOINT$JUDGE" ] || echo "$precision")

# log pi_7B-DPO - log pi_7B-SFT is what DPO learnt to prefer: at each token it is added to the 70B's
# logits. One forward of each 7B gives it for all tokens, so that no top-k has to be taken.
guided-decode generate --max-new-tokens "$tokens" --prompt "$question" --beta 1 \
    --policy "$(model allenai/tulu-2-dpo-70b)" \
    --scorer "$(model allenai/tulu-2-dpo-7b)" --reference "$(model allenai/tulu-2-7b)" $precision
