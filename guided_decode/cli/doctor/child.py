"""`python -m guided_decode.cli.doctor.child CHECK FILE`: one check; the file gets its finding."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from guided_decode.cli.doctor import libraries, runs
from guided_decode.cli.doctor.finding import Finding, Status

CHECKS = {
    **{each.__name__: each for each in (libraries.torch, libraries.transformers,
                                        libraries.triton, libraries.gpu, libraries.vllm)},
    **{name: getattr(libraries, name) for name in libraries.COMPANIONS},
    "kernels": runs.kernels,
    "generation": runs.generation,
    "engine": runs.engine,
}  # fmt: skip


def main() -> None:
    """Runs a check; what it raises is its finding."""
    name, file = sys.argv[1:]
    try:
        finding = CHECKS[name]()
    except Exception as error:
        finding = Finding(name, Status.FAILURE, libraries.root_of(error))
    # Whole or not at all: the parent may end this process any moment.
    part = Path(f"{file}.part")
    part.write_text(json.dumps(asdict(finding)), encoding="utf-8")
    os.replace(part, file)
    # Engines and libraries that are broken do not always come to an end.
    os._exit(0)


if __name__ == "__main__":
    main()
