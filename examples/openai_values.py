"""What the critic thought of each token, through the official OpenAI client.

On the server of `guided-decode serve`. The client keeps fields that it does not know.
"""

import os

from openai import OpenAI

server = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
client = OpenAI(base_url=server, api_key="none")
request = {
    "model": "tiny-tulu",
    "messages": [{"role": "user", "content": "What is 4785 + 5426?"}],
    "temperature": 0,
    "max_tokens": 100,
    "extra_body": {"vllm_xargs": {"guide": 1, "guide_values": 1}},
}


def number(value: float | None) -> str:
    return "      -" if value is None else f"{value:+7.3f}"


print("text                value  advantage of its last token")
for chunk in client.chat.completions.create(**request, stream=True):
    for choice in chunk.choices:
        shown = choice.model_extra.get("guided_decode")
        if shown is not None and shown["prefix_values"]:
            value, advantage = shown["prefix_values"][0], shown["advantages"][-1]
            text = repr(choice.delta.content or "")
            print(f"{text:18} {number(value)}    {number(advantage)}")

(choice,) = client.chat.completions.create(**request).choices
shown = choice.model_extra["guided_decode"]
values = [value for value in shown["prefix_values"] if value is not None]
print(f"\n{choice.message.content}")
print(f"{len(shown['prefix_values'])} tokens: V from {values[0]:.3f} to {values[-1]:.3f}")
