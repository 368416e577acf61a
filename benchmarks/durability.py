"""What storing every token before it is shown costs, against storing at the commit alone.

    python -m benchmarks.durability            the store in this process, and a real Valkey

For 1, 4 and 16 turns at once, on a toy engine whose step takes 10 ms: the time from the moment the
engine has sampled a token to the moment its reader has it (median, p99), processor time per token of
the whole replica, and round trips per step. The modes take turns, round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import report
from cluster.conversation import GENESIS, Message, NewConversation, new_conversation_id
from cluster.memory_store import MemoryStore
from cluster.redis_store import RedisStore
from cluster.store import ConversationStore
from deployments.config import Tunables
from deployments.text import ChatCodec
from deployments.turn_call import TurnCall, TurnTokens
from deployments.turn_runner import ReplicaParts, TurnRunner
from engine.loop import EngineLoop
from engine.loop_types import LoopConfig
from engine.protocol import StepPlan, StepResult
from engine.sampling import SamplingParams
from engine.toy_engine import ToyEngine, byte_spec
from tests.valkey_fixture import start_valkey

STEP_S = 0.010
TOKENS = 100
CONCURRENT = (1, 4, 16)
Durability = Literal["token", "turn"]


class TimedEngine(ToyEngine):
    """Notes when each step has ended."""

    def __init__(self) -> None:
        super().__init__(byte_spec(128, 16), max_resident=16, step_delay_s=STEP_S)
        self.ended_s: dict[int, list[float]] = {}

    def step(self, plan: StepPlan) -> StepResult:
        result = super().step(plan)
        now_s = time.perf_counter()
        for row in plan.rows:
            if row.sample is not None:
                self.ended_s.setdefault(row.kv_slot, []).append(now_s)
        return result


@asynccontextmanager
async def open_store(kind: str) -> AsyncIterator[ConversationStore]:
    """The in-memory reference, or a Valkey server of its own."""
    if kind == "memory":
        yield MemoryStore()
        return
    with tempfile.TemporaryDirectory(prefix="ss-dur-") as folder:
        server = start_valkey(Path(folder))
        store = await RedisStore.connect(server.url)
        yield store
        await store.close()
        server.process.kill()
        server.process.wait()


async def measure(store: ConversationStore, durability: Durability, turns: int) -> dict[str, Any]:
    """One round: `turns` replies of TOKENS tokens at once."""
    engine = TimedEngine()
    loop = EngineLoop(engine, LoopConfig(max_running=16, prefill_tokens=256))
    spec, codec = engine.spec, ChatCodec.for_toy()
    parts = ReplicaParts("r", spec, spec.fingerprint, loop, store, codec)
    runner = TurnRunner(parts, Tunables(durability=durability))
    message = Message("user", "Go on.")
    delays: list[float] = []

    async def turn() -> None:
        name = new_conversation_id()
        await store.create(NewConversation(name, "t", spec.fingerprint, 4, 124, 4))
        call = TurnCall(
            tenant="t",
            conversation_id=name,
            input_ids=codec.encode_opening([message]),
            messages=(message,),
            history=GENESIS,
            sampling=SamplingParams(seed=1),
            max_tokens=TOKENS,
            ignore_eos=True,
        )
        async with aclosing(runner.turn(call)) as items:
            shown: list[float] = []
            async for item in items:
                if isinstance(item, TurnTokens):
                    shown += [time.perf_counter()] * len(item.token_ids)
        seen.append(np.array(shown))

    seen: list[np.typing.NDArray[np.float64]] = []
    before_s = time.process_time()
    await asyncio.gather(*(turn() for _ in range(turns)))
    cpu_s = time.process_time() - before_s
    # Readers finish in no fixed order; the turns of a round run in step, so sort both.
    sampled = np.sort(np.concatenate([np.array(times) for times in engine.ended_s.values()]))
    delays = (np.sort(np.concatenate(seen)) - sampled).tolist()
    stats = runner.stats().values
    await runner.close()
    return {
        "delays_s": delays,
        "cpu_s": cpu_s / (turns * TOKENS),
        "round_trips": stats["checkpoints"] / stats["engine_steps"],
    }


async def main_async(rounds: int) -> None:
    """Measure, print, save."""
    rows = [["store", "turns", "durability", "delay median", "p99", "CPU a token", "trips a step"]]
    results = []
    for kind in ("memory", "valkey"):
        async with open_store(kind) as store:
            for turns in CONCURRENT:
                found: dict[Durability, list[dict[str, Any]]] = {"token": [], "turn": []}
                for _ in range(rounds):
                    for durability, measured in found.items():
                        measured.append(await measure(store, durability, turns))
                for durability, measured in found.items():
                    delays = [one for part in measured for one in part["delays_s"]]
                    entry = {
                        "store": kind,
                        "turns": turns,
                        "durability": durability,
                        "delay_median_ms": 1e3 * report.median(delays),
                        "delay_p99_ms": 1e3 * report.percentile(delays, 99),
                        "cpu_us_per_token": 1e6 * report.median([m["cpu_s"] for m in measured]),
                        "round_trips_per_step": report.median([m["round_trips"] for m in measured]),
                    }
                    results.append(entry)
                    rows.append(
                        [
                            *(kind, str(turns), durability),
                            f"{entry['delay_median_ms']:.2f} ms",
                            f"{entry['delay_p99_ms']:.2f} ms",
                            f"{entry['cpu_us_per_token']:.0f} us",
                            f"{entry['round_trips_per_step']:.2f}",
                        ]
                    )
    print(report.table(rows))
    path = report.save(
        "durability", {"step_ms": 1e3 * STEP_S, "rounds": rounds, "results": results}
    )
    print(f"saved {path.name}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    asyncio.run(main_async(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
