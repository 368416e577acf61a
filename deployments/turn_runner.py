"""One replica's turns, without Ray: who reads which, when it is healthy, how it ends.

    call -> a turn of this key runs here?  yes: join it
                                           no:  a TurnTask of its own  (see deployments.turn_task)
    engine events -> OutputGate -> TurnLog -> readers

The parts: `turn_begin` gets hold of a turn, `output_gate` stores what is to be shown, `turn_log` keeps it
for readers, `turn_progress` makes the commit of it, `store_watch` repairs a store that lost something.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import numpy as np

from cluster.conversation import new_nonce
from deployments.config import Tunables
from deployments.errors import ErrorInfo
from deployments.output_gate import OutputGate
from deployments.store_errors import KEY_REUSED
from deployments.store_watch import StoreWatch
from deployments.task_ending import end_tasks
from deployments.turn_call import FollowCall, ReplicaStats, TurnCall, TurnItem, TurnRefused
from deployments.turn_ending import HANDED_OVER
from deployments.turn_host import ReplicaParts, TurnFigures, TurnHost
from deployments.turn_task import TurnTask

__all__ = ["ReplicaParts", "TurnRunner"]

_STOP_TIMEOUT_S = 10.0


class TurnRunner:
    """Runs turns on one engine loop. Use it from one event loop, which must be running."""

    def __init__(self, parts: ReplicaParts, tunables: Tunables) -> None:
        self.tunables = tunables
        self._parts = parts
        self._turns: dict[tuple[str, str, str], TurnTask] = {}
        self._running: set[asyncio.Task[None]] = set()
        gate = OutputGate(parts.store, lambda: self.tunables)
        watch = StoreWatch(parts.store, self._turns.values, parts.loop.stats(0).num_slots)
        self._host = TurnHost(parts, lambda: self.tunables, gate, watch, TurnFigures())
        self._closing = False
        parts.loop.notify(gate.wake)

    async def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        """TurnAccepted, TurnTokens..., TurnDone; or TurnRefused at any point, which is then the last.

        Joins the turn if it runs here. Closing the generator, or cancelling who awaits it, ends the
        turn as if it had never begun, unless somebody else reads it or one of its calls says `finish`.
        """
        problem = self._problem(call)
        if problem is not None:
            yield TurnRefused(problem)
            return
        task = await self._task_of(call)
        if task.call.request_hash != call.request_hash:
            yield TurnRefused(KEY_REUSED)
            return
        async with aclosing(task.read(call)) as items:
            async for item in items:
                yield item

    async def follow(self, call: FollowCall) -> AsyncGenerator[TurnItem, None]:
        """The items, from the first, of the turn of the conversation that runs here."""
        mine = (call.tenant, call.conversation_id)
        for key, task in self._turns.items():
            if key[:2] == mine and not task.is_ending:
                async with aclosing(task.follow()) as items:
                    async for item in items:
                        yield item
                return
        yield TurnRefused(ErrorInfo("replica_lost", "No turn of the conversation runs here."))

    def routing_stats(self) -> dict[str, int | bool]:
        """What `cluster.placement.ReplicaView` is made from."""
        stats = self._parts.loop.stats(0)
        return {
            "free_slots": stats.free_slots,
            "clean_slots": stats.clean_slots,
            "running": stats.running,
            "waiting": stats.waiting,
            "draining": self._closing or stats.dead is not None,
        }

    def stats(self) -> ReplicaStats:
        """Figures for health and metrics."""
        stats, turns = self._parts.loop.stats(0), self._host.figures
        gate, watch = self._host.gate.figures, self._host.watch.figures
        values: dict[str, float] = {
            "running_turns": stats.running,
            "waiting_turns": stats.waiting,
            "resident_conversations": stats.clean_slots,
            "kv_slots": stats.num_slots,
            "free_slots": stats.free_slots,
            "evicted_slots": stats.evicted_slots,
            "host_slots": stats.host_slots,
            "host_slots_used": stats.host_slots_used,
            "host_hits": stats.host_hits,
            "engine_steps": stats.num_steps,
            "prefilled_tokens": stats.prefilled_tokens,
            "generated_tokens": stats.generated_tokens,
            "committed_turns": turns.committed_turns,
            "refused_turns": turns.refused_turns,
            "cancelled_turns": turns.cancelled_turns,
            "joined_turns": turns.joined_turns,
            "resumed_turns": turns.resumed_turns,
            "fenced_turns": turns.fenced_turns,
            "handed_over_turns": turns.handed_over_turns,
            "checkpoints": gate.checkpoints,
            "checkpointed_tokens": gate.checkpointed_tokens,
            "held_s": gate.held_s,
            "store_restarts": watch.store_restarts,
            "repaired_conversations": watch.repaired_conversations,
        }
        return ReplicaStats(self._parts.replica, {k: float(v) for k, v in values.items()})

    def check_health(self, step_timeout_s: float) -> None:
        """Raises RuntimeError when the engine loop is dead or one step lasts longer than that. Turns that
        hang are then told to go on elsewhere."""
        stats = self._parts.loop.stats(0)
        if stats.dead is not None:
            raise RuntimeError(f"the engine loop is dead: {stats.dead}")
        if stats.step_running_s > step_timeout_s:
            self.hand_over()
            raise RuntimeError(f"an engine step has been running for {stats.step_running_s:.0f} s")

    def hand_over(self) -> None:
        """End every turn that is not being committed; its claim and tokens stay in the store, and its
        readers are told that another replica can go on with it."""
        for task in self._turns.values():
            task.stop(HANDED_OVER)

    async def close(self, drain_s: float = 0.0) -> None:
        """Refuse new turns, let running ones end for `drain_s`, hand over the rest, stop the loop."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while self._running:
                    await asyncio.wait(self._running)
        self.hand_over()
        if self._running:
            await asyncio.wait(self._running)
        await asyncio.to_thread(self._parts.loop.stop, drain=False, timeout_s=_STOP_TIMEOUT_S)
        await end_tasks(tuple(self._host.chores))
        await self._host.gate.close()
        await self._host.watch.close()

    async def _task_of(self, call: TurnCall) -> TurnTask:
        """The turn that the call is about, which may run already."""
        name = (call.tenant, call.conversation_id, call.key or new_nonce())
        while (task := self._turns.get(name)) is not None:
            if not task.is_ending:
                self._host.figures.joined_turns += 1
                return task
            await task.over.wait()
        task = self._turns[name] = TurnTask(self._host, call)
        running = asyncio.create_task(self._run(name, task))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return task

    async def _run(self, name: tuple[str, str, str], task: TurnTask) -> None:
        try:
            await task.run()
        finally:
            del self._turns[name]

    def _problem(self, call: TurnCall) -> ErrorInfo | None:
        """What would harm the engine or breaks a limit."""
        ids, limits = call.input_ids, self.tunables.limits
        given: object = ids
        if self._closing or self._parts.loop.stats(0).dead is not None:
            return ErrorInfo("replica_lost", "The replica is stopping; send the turn again.")
        if not isinstance(given, np.ndarray) or ids.dtype != np.int32 or ids.ndim != 1:
            return ErrorInfo(
                "invalid_type", "input_ids must be int32 of one dimension.", "input_ids"
            )
        if not self._are_ids(ids) or not self._are_ids(np.array(call.shown_ids, np.int64), 0):
            return ErrorInfo("invalid_value", "input_ids must be of the vocabulary.", "input_ids")
        if len(ids) > limits.max_input_tokens:
            message = f"The input takes {len(ids)} tokens, at most {limits.max_input_tokens} may."
            return ErrorInfo("input_too_long", message, "messages")
        if not 1 <= call.max_tokens <= limits.max_output_tokens:
            message = f"max_tokens must be 1 to {limits.max_output_tokens}."
            return ErrorInfo("invalid_value", message, "max_tokens")
        return None

    def _are_ids(self, ids: np.typing.NDArray[np.integer[Any]], at_least: int = 1) -> bool:
        if not len(ids):
            return not at_least
        return bool(ids.min() >= 0 and ids.max() < self._parts.spec.model.vocab_size)
