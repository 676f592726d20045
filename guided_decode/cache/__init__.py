"""What is remembered: a radix tree over token ids, whose nodes own key-value slots of a pool.

It knows no model. A look-up says what a row still has to forward (`RowWork`), and where to.
"""

from typing import TYPE_CHECKING

from guided_decode.public_names import handed_on

__all__ = [
    "Placement",
    "PrefixCache",
    "RadixTree",
    "RowWork",
    "SlotPool",
    "SlotTables",
]

if TYPE_CHECKING:
    from guided_decode.cache.pool import SlotPool
    from guided_decode.cache.prefix_cache import Placement, PrefixCache
    from guided_decode.cache.radix import RadixTree
    from guided_decode.cache.row_work import RowWork
    from guided_decode.cache.slot_tables import SlotTables
else:
    __getattr__, __dir__ = handed_on(
        __name__,
        {
            "Placement": "prefix_cache",
            "PrefixCache": "prefix_cache",
            "RadixTree": "radix",
            "RowWork": "row_work",
            "SlotPool": "pool",
            "SlotTables": "slot_tables",
        },
    )
