"""`lm_eval`, with the model guided-decode."""

import sys
from argparse import Namespace
from typing import Any

from guided_decode.integrations.lm_eval.registration import register


def main() -> None:
    """The harness's own command."""
    harness, arguments = _read()
    harness.execute(arguments)


def parse_arguments() -> Namespace:
    """What was typed, as the harness reads it."""
    arguments: Namespace = _read()[1]
    return arguments


def _read() -> tuple[Any, Any]:
    try:
        register()
    except ImportError as error:
        sys.exit(f"error: {error}")
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    harness = HarnessCLI()
    return harness, harness.parse_args()


if __name__ == "__main__":
    main()
