"""smol: PPO with LoRA adapters on SmolLM2-135M-Instruct, for both tasks of `guided_decode.smol`.

One frozen trunk carries policy, reference and value model; each learns, if it does, by adapters in
its last layers. The PPO is that of `recipes.ppo`.
"""
