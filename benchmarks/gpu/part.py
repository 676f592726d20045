"""One part in a process of its own: what it breaks, the others do not feel.

    python -m benchmarks.gpu.part "8B" --out records.jsonl --seconds 100 --rates 4.3e12 7.9e14

Each record is written as it comes, so that a part that is stopped leaves what it had.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Else CUPTI goes down behind a profile, and graphs that were captured before may not survive it.
os.environ.setdefault("TEARDOWN_CUPTI", "0")
os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")


def records(
    name: str, seconds: float, rates: tuple[float, float], without: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """The part's records; imports only what it needs."""
    import torch

    from benchmarks.gpu.budget import Deadline
    from benchmarks.gpu.floors import Rates

    # What is compared in float32 is compared without TF32, whatever the environment asks for.
    torch.set_float32_matmul_precision("highest")
    deadline, ceilings = Deadline(seconds), Rates(*rates)
    if name == "device":
        from benchmarks.gpu import device

        return device.run()
    if name == "kernels":
        from benchmarks.gpu import kernels

        return kernels.run(ceilings, deadline)
    from benchmarks.gpu import decoding

    if name == "agreement":
        return decoding.agreement()
    return decoding.run(name, ceilings, deadline, without)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.part")
    parser.add_argument("name", help='"device", "kernels", "agreement", or a stage of decoding')
    parser.add_argument("--out", type=Path, required=True, help="a record a line")
    parser.add_argument("--seconds", type=float, required=True, help="begin nothing after these")
    parser.add_argument("--without", nargs="*", default=(), help="ways that are not timed")
    parser.add_argument("--rates", type=float, nargs=2, default=(1.0, 1.0), help="bytes, flops")
    options = parser.parse_args()
    bytes_a_second, flops = options.rates
    with options.out.open("w") as file:
        for record in records(
            options.name, options.seconds, (bytes_a_second, flops), options.without
        ):
            file.write(json.dumps(record) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
