"""Contextual AI's KTO Mistral: prompted to the byte as it was trained, and as an implicit reward.

    guided-decode plan mistralai/Mistral-7B-Instruct-v0.2 ContextualAI/Contextual_KTO_Mistral_PairRM

says: one 80 GB GPU, all in bf16 (43 GiB; the policy, and the KTO model with its reference).
$MODELS: a folder that has the two models, each under its own name.
"""

import os

import torch
from named import model
from transformers import AutoModelForCausalLM, AutoTokenizer

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.checkpoints.prompts import render, tokenise
from guided_decode.integrations.transformers import GuidedDecoding
from guided_decode.search import Judged, ScorerJudge

KTO = model("ContextualAI/Contextual_KTO_Mistral_PairRM")
BASE = model("mistralai/Mistral-7B-Instruct-v0.2")
QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
ANSWERS = ("Air scatters blue light more than red light.", "It is the sea's reflection.")

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
new = {"max_new_tokens": int(os.environ.get("TOKENS", "256")), "do_sample": False}
tokenizer = AutoTokenizer.from_pretrained(KTO)

# As a policy: Tulu's turns, a BOS, no EOS after the prompt; [INST] of its base is not its format.
prompt = tokenise(tokenizer, QUESTION, "tulu-2", add_generation_prompt=True)
print(repr(render(QUESTION, "tulu-2", add_generation_prompt=True)))
kto = AutoModelForCausalLM.from_pretrained(KTO, dtype=dtype).to(device)
ids = torch.tensor([prompt], device=device)
answer = kto.generate(ids, attention_mask=torch.ones_like(ids), **new)
print(f"KTO policy: {tokenizer.decode(answer[0, len(prompt) :])!r}")

# As an implicit reward: log pi_KTO - log pi_base of each token, summed over a response and its EOS.
scorer = load_scorer(kto, kind="implicit", reference=BASE, policy_tokenizer=tokenizer, dtype=dtype)
texts = []
for text in ANSWERS:
    chat = [*QUESTION, {"role": "assistant", "content": text}]
    whole = tokenise(tokenizer, chat, "tulu-2", end="eos")
    texts.append(Judged(tuple(prompt), tuple(whole[len(prompt) :]), finished=True))
for text, reward in zip(ANSWERS, ScorerJudge(scorer).judge(texts), strict=True):
    print(f"reward {reward:+.3f}: {text!r}")

# The same reward guides its base, which is prompted by its own template.
base = AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype).to(device)
own = AutoTokenizer.from_pretrained(BASE)
chat = own.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
ids = torch.tensor([own.encode(chat, add_special_tokens=False)], device=device)
guided = GuidedDecoding(scorer, GuidanceConfig(beta=1.0, top_k=None))
answer = base.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=guided, **new)
print(f"{chat!r}")
print(f"guided base: {own.decode(answer[0, ids.shape[1] :])!r}")
