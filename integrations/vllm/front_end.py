"""What guided requests need of vLLM's API server: one ASGI middleware.

vllm serve POLICY --middleware guided_decode.integrations.vllm.front_end.FrontEnd
"""

from guided_decode.integrations.vllm.beam_refusal import RefuseGuidedBeams
from guided_decode.integrations.vllm.client_values.middleware import (
    App,
    Message,
    Receive,
    Send,
    ValuesToClient,
)


class FrontEnd:
    """Refuses guided beams, and puts values into the responses of those who asked for them."""

    def __init__(self, app: App) -> None:
        """app: vLLM's."""
        self._app = ValuesToClient(RefuseGuidedBeams(app))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        await self._app(scope, receive, send)
