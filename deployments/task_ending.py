"""Ending background tasks that would otherwise go on for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

_ASK_AGAIN_S = 1.0


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel them and wait until they have ended. For tasks that have nothing to clean up.

    A cancellation can get lost: Python 3.11's `asyncio.wait_for`, which redis-py calls, drops one that
    comes together with its result. So it is repeated.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_ASK_AGAIN_S)
