"""Model Runner V2 in a real engine on a machine without a GPU, through Triton's interpreter.

The interpreter runs a kernel's programs one after another and truncates bfloat16: what it proves
is logic, in float32 and eager, not races or low precision. It has to be chosen before Triton is
imported, and the engine has to be in this process: so such tests run in a pytest of their own.
"""

import os
import types

# Of the process in which the engines of these tests run on V2.
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

IS_CHOSEN = all(os.environ.get(name) == ENVIRONMENT[name] for name in list(ENVIRONMENT)[:3])


def let_vllm_find_triton() -> None:
    """Before vLLM is imported, which asks whether any Triton backend has an active driver."""
    import triton.backends

    driver = types.SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
