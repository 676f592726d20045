"""A scorer in another process: the wire that both sides speak, and the client, which is a scorer.

`guided_decode.serving` is the other side. pyzmq and msgspec come with the extra `remote`; this
package's `address` and `libraries` do without them.
"""

from typing import TYPE_CHECKING

from guided_decode.public_names import handed_on

__all__ = ["RemoteScorer", "ScorerServerError", "is_address"]

if TYPE_CHECKING:
    from guided_decode.scoring.remote.address import is_address
    from guided_decode.scoring.remote.failures import ScorerServerError
    from guided_decode.scoring.remote.scorer import RemoteScorer
else:
    __getattr__, __dir__ = handed_on(
        __name__,
        {
            "RemoteScorer": "scorer",
            "ScorerServerError": "failures",
            "is_address": "address",
        },
    )
