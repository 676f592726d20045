"""The Tulu 2.5 value model, 70B, guides its 13B PPO policy in vLLM.

    guided-decode plan allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm \
        allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm-value

says: one 80 GB GPU, the critic in 4 bits beside the policy (61 GiB for one row of 2,048 tokens; of
the card vLLM itself may use what the critic leaves). It also prints the `guided-decode serve` with
which the same is an OpenAI server. $MODELS: a folder that has the two models under their names.
"""

import os

import torch
from named import model
from vllm import LLM, SamplingParams

from guided_decode.checkpoints.prompts import render, tokenise

POLICY = model("allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm")
CRITIC = model("allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm-value")
PROCESSOR = "guided_decode.integrations.vllm:ValueGuidedLogitsProcessor"


def main() -> None:
    gpu = torch.cuda.is_available()
    scorer = {"scorer": CRITIC, "beta": 1.0, "top_k": 16, "max_top_k": 16, "cache_tokens": 2064}
    scorer |= {"dtype": "bfloat16", "quantization": "bnb-4bit"} if gpu else {"dtype": "float32"}
    llm = LLM(
        POLICY,
        dtype="bfloat16" if gpu else "float32",
        max_model_len=2048,
        max_num_seqs=1,
        logits_processors=[PROCESSOR],
        additional_config={"guided_decode": scorer},
        **({"gpu_memory_utilization": 0.92} if gpu else {"enforce_eager": True}),
    )
    tokenizer = llm.get_tokenizer()
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    prompt = tokenise(tokenizer, question, "tulu-2", add_generation_prompt=True)
    print(repr(render(question, "tulu-2", add_generation_prompt=True)))
    tokens = int(os.environ.get("TOKENS", "256"))
    for name, extra in (("plain", {}), ("guided", {"guide": 1})):
        params = SamplingParams(temperature=0, max_tokens=tokens, extra_args=extra)
        (answer,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        print(f"{name}: {answer.outputs[0].token_ids}: {answer.outputs[0].text!r}")


# vLLM starts processes that import this file.
if __name__ == "__main__":
    main()
