"""Guided decoding through the official OpenAI client, on the server of `guided-decode serve`."""

import os
import uuid

from openai import OpenAI

server = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
client = OpenAI(base_url=server, api_key="none")
question = [{"role": "user", "content": "What is 4785 + 5426?"}]
request = {"model": "tiny-tulu", "messages": question, "max_tokens": 100}
guide = {"guide": 1, "guide_beta": 10.0, "guide_top_k": 4}

plain = client.chat.completions.create(**request, temperature=0)
print(f"plain\n{plain.choices[0].message.content}\n")

guided = client.chat.completions.create(**request, temperature=0, extra_body={"vllm_xargs": guide})
print(f"guided\n{guided.choices[0].message.content}\n")

print("guided, streamed")
stream = client.chat.completions.create(
    **request, temperature=0, stream=True, extra_body={"vllm_xargs": guide}
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)

# Eight samples that the critic compares after every 24 tokens; it ends six of them. A pruned
# sample stops at a token of our choice, one that this policy never writes: '#'.
PRUNED = 5
group = {"guide_group": uuid.uuid4().hex, "guide_group_size": 8, "guide_keep": 2, "guide_every": 24}
samples = client.chat.completions.create(
    **request, n=8, temperature=1, extra_body={"vllm_xargs": group, "stop_token_ids": [PRUNED]}
)
print("\n\neight samples, two survive")
for choice in samples.choices:
    fate = "pruned " if choice.stop_reason == PRUNED else "finished"
    print(f"{fate:8}  {choice.message.content!r}")
