"""The scorer server: any `Scorer`, for clients in other processes (`guided_decode.scoring.remote`).

One thread takes what has arrived, scores it together and answers. It keeps the history of each
client's prefixes, so that a step sends what is new in them; what it does not know it asks for.
"""

from typing import TYPE_CHECKING

from guided_decode.public_names import handed_on

__all__ = ["Limits", "ScorerServer", "describe"]

if TYPE_CHECKING:
    from guided_decode.serving.description import describe
    from guided_decode.serving.limits import Limits
    from guided_decode.serving.server import ScorerServer
else:
    __getattr__, __dir__ = handed_on(
        __name__,
        {"Limits": "limits", "ScorerServer": "server", "describe": "description"},
    )
