"""For authors of scorers: what every scorer promises, tried on one. Needs no test framework.

It knows the contract alone (`guided_decode.scorer`), and nothing of how a scorer keeps it.
"""

from typing import TYPE_CHECKING

from guided_decode.public_names import handed_on

__all__ = ["PROMISES", "BrokenPromise", "broken_promises", "check_scorer"]

if TYPE_CHECKING:
    from guided_decode.testing.check import PROMISES, broken_promises, check_scorer
    from guided_decode.testing.promise import BrokenPromise
else:
    __getattr__, __dir__ = handed_on(
        __name__,
        {
            "BrokenPromise": "promise",
            "PROMISES": "check",
            "broken_promises": "check",
            "check_scorer": "check",
        },
    )
