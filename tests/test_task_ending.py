from __future__ import annotations

import asyncio
import contextlib

from deployments.task_ending import end_tasks


async def test_a_task_that_loses_a_cancellation_is_ended_all_the_same() -> None:
    lost: list[str] = []

    async def beat() -> None:
        while True:
            if lost:
                await asyncio.sleep(0.01)
                continue
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
            lost.append("a cancellation")

    task = asyncio.create_task(beat())
    await asyncio.sleep(0)
    await end_tasks((task,))
    assert task.cancelled()
    assert lost == ["a cancellation"]


async def test_ended_tasks_and_none_at_all_are_fine() -> None:
    task = asyncio.create_task(asyncio.sleep(0))
    await task
    await end_tasks((task,))
    await end_tasks(())
