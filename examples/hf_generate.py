"""Guided decoding with Hugging Face generate, on the models of this repository."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from guided_decode import GuidanceConfig, load_scorer
from guided_decode.integrations.transformers import GuidedDecoding
from guided_decode.tiny_tulu import model_path

policy = AutoModelForCausalLM.from_pretrained(model_path("sft"))
tokenizer = AutoTokenizer.from_pretrained(model_path("sft"), padding_side="left")
critic = load_scorer("tiny-tulu-value", policy_tokenizer=tokenizer)

questions = ["What is 4785 + 5426?", "Add 9072 and 3949."]
prompts = tokenizer.apply_chat_template(
    [[{"role": "user", "content": question}] for question in questions],
    add_generation_prompt=True,
    padding=True,
    return_tensors="pt",
    return_dict=True,
)
width = prompts["input_ids"].shape[1]

plain = policy.generate(**prompts, do_sample=False, max_new_tokens=80)
guided = policy.generate(
    **prompts,
    custom_generate=GuidedDecoding(critic, GuidanceConfig(beta=10.0, top_k=4)),
    do_sample=False,
    max_new_tokens=80,
)

for question, before, after in zip(questions, plain, guided, strict=True):
    print(f"{question}\n\nplain")
    print(tokenizer.decode(before[width:], skip_special_tokens=True))
    print("\nguided")
    print(tokenizer.decode(after[width:], skip_special_tokens=True), end="\n\n")
print(f"The critic forwarded {critic.stats.tokens} tokens in {critic.stats.seconds:.2f} s.")
