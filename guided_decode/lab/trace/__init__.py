"""What happened at each token of a response, and one HTML page that shows it."""

from typing import TYPE_CHECKING

from guided_decode.public_names import handed_on

__all__ = ["Run", "Step", "Trace", "TracedPrompt", "page", "replay"]

if TYPE_CHECKING:
    from guided_decode.lab.trace.html_page import page
    from guided_decode.lab.trace.record import Run, Trace, TracedPrompt
    from guided_decode.lab.trace.steps import Step, replay
else:
    __getattr__, __dir__ = handed_on(
        __name__,
        {
            "Run": "record",
            "Step": "steps",
            "Trace": "record",
            "TracedPrompt": "record",
            "page": "html_page",
            "replay": "steps",
        },
    )
