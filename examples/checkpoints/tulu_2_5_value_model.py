"""The Tulu 2.5 value model, 70B, guides its 13B PPO policy in Hugging Face generate.

    guided-decode plan allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm \
        allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm-value

says: one 80 GB GPU, the critic in 4 bits beside the policy (61 GiB; extra `bitsandbytes`); with
three, in bf16 over two of them as a server (`guided-decode scorer --tp-plan auto`), whose address
then stands for the critic. $MODELS: a folder that has the two models, each under its own name.
"""

import os

import torch
from named import model
from transformers import AutoModelForCausalLM, AutoTokenizer

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.checkpoints.prompts import render, tokenise
from guided_decode.integrations.transformers import GuidedDecoding

POLICY = model("allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm")
CRITIC = model("allenai/tulu-v2.5-ppo-13b-uf-mean-70b-mix-rm-value")
# Two rows of 2,048 tokens with 16 candidates each.
CACHE = 2 * (2048 + 16)

gpu = torch.cuda.is_available()
device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
policy = AutoModelForCausalLM.from_pretrained(POLICY, dtype=dtype).to(device)
tokenizer = AutoTokenizer.from_pretrained(POLICY)
critic = load_scorer(
    CRITIC,
    policy_tokenizer=tokenizer,
    device=device,
    dtype=dtype,
    quantization="bnb-4bit" if gpu else None,
    cache_tokens=CACHE,
)

# The newline after <|assistant|> matters; the policy reads a BOS, and the critic drops it.
question = [{"role": "user", "content": "Why is the sky blue?"}]
prompt = tokenise(tokenizer, question, "tulu-2", add_generation_prompt=True)
print(repr(render(question, "tulu-2", add_generation_prompt=True)))

inputs = torch.tensor([prompt], device=device)
new = {"max_new_tokens": int(os.environ.get("TOKENS", "256")), "do_sample": False}
mask = torch.ones_like(inputs)
# Its values are rewards of the 70B reward model: beta is in logits a unit of these.
guided = GuidedDecoding(critic, GuidanceConfig(beta=1.0, top_k=16))
plain = policy.generate(inputs, attention_mask=mask, **new)
steered = policy.generate(inputs, attention_mask=mask, custom_generate=guided, **new)
for name, ids in (("plain", plain), ("guided", steered)):
    value = critic.score([ids[0].tolist()], torch.empty(1, 0, dtype=torch.int64)).baseline.item()
    print(f"{name}, V = {value:.3f}: {tokenizer.decode(ids[0, len(prompt) :])!r}")
