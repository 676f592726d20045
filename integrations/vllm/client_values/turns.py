"""Long work on the event loop that all requests share."""

import asyncio
from collections.abc import AsyncIterator

# Tokens that take a few milliseconds.
_PIECE = 1024


async def turns(tokens: int) -> AsyncIterator[slice]:
    """Pieces of so many tokens, after each of which all others have their turn."""
    for start in range(0, tokens, _PIECE):
        yield slice(start, start + _PIECE)
        await asyncio.sleep(0)
