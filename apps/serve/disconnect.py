"""Work that ends when its client leaves."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive


async def until_gone(receive: Receive, work: Any) -> Any:
    """Return what `work` returns, or None, `work` cancelled, if the client leaves before that."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
