"""What fits where: a policy and its scorer on GPUs, by their shapes alone; nothing is loaded.

`weight_forms`, `cards` and `shape_of_config` are data; `footprint` has the bytes, `floor` the
seconds, `ways` the arrangements, and `placement` the plan.
"""

from typing import TYPE_CHECKING

from guided_decode.public_names import handed_on

__all__ = ["Card", "Placement", "Plan", "Workload", "find_card", "make_plan"]

if TYPE_CHECKING:
    from guided_decode.checkpoints.plan.cards import Card, find_card
    from guided_decode.checkpoints.plan.footprint import Workload
    from guided_decode.checkpoints.plan.placement import Placement, Plan, make_plan
else:
    __getattr__, __dir__ = handed_on(
        __name__,
        {
            "Card": "cards",
            "Placement": "placement",
            "Plan": "placement",
            "Workload": "footprint",
            "find_card": "cards",
            "make_plan": "placement",
        },
    )
