"""A search's policy may be a PEFT adapter, from a folder or in memory."""

import torch

from guided_decode import Adapted
from guided_decode.search import Sampling, load_generator
from tests import models
from tests.adapters import adapted, lora, randomise, saved


@torch.no_grad()
def test_greedy_continuations_are_the_adapted_models():
    model = adapted("CAUSAL_LM")
    model.add_adapter("other", lora())
    randomise(model, 7, of="other")
    path, prompt = saved(model), models.prompts([6])[0]
    ids = torch.tensor([prompt])
    wanted = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    for given in (path, model, Adapted(model, "default")):
        policy = load_generator(given, eos_token_ids=[models.VOCAB + 1])
        if isinstance(given, Adapted):
            model.set_adapter("other")
        ((own,),) = policy.extend(
            [prompt], [1], max_tokens=[8], sampling=[Sampling(temperature=0.0)], seeds=[0]
        )
        assert list(own.tokens) == wanted
