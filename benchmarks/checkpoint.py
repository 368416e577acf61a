"""What it costs to store every token before it is shown, against storing a turn at its commit.

    python -m benchmarks.checkpoint              batches of 1, 16 and 64 running turns, 256 tokens each
    python -m benchmarks.checkpoint --record     the same, saved under benchmarks/results

Starts an embedded store of its own, once with `appendfsync always` (as `sinkserve up` runs it) and once
with `everysec`. Each step of a batch is one pipelined round trip (`durability: token`); beside each step
one PING is timed over the same connection pool, so the ratio holds when the machine's speed drifts.
`durability: turn` stores nothing between `begin` and `commit` and renews each lease now and then.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import redis
from rich.console import Console

from benchmarks import report
from cluster import embedded
from cluster.conversation import (
    BeginTurn,
    Checkpoint,
    NewConversation,
    Ownership,
    TurnCommit,
    chain_head,
    new_conversation_id,
)
from cluster.redis_store import RedisStore

BATCHES = (1, 16, 64)
FSYNC = ("always", "everysec")
TENANT, MODEL = "benchmark", "model"
LEASE_S = 10.0
INPUT_TOKENS = 64


@dataclass(slots=True)
class Costs:
    """Milliseconds: of each step and of the PING beside it; of all tokens of a turn, by durability."""

    steps: list[float] = field(default_factory=list)
    pings: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    turn: list[float] = field(default_factory=list)

    def summary(self, batch: int, tokens: int) -> dict[str, float]:
        step = report.median(self.steps)
        return {
            "batch": batch,
            "step_ms_p50": step,
            "step_ms_p99": report.percentile(self.steps, 99),
            "ping_ms_p50": report.median(self.pings),
            "step_to_ping": report.paired_ratio(self.steps, self.pings),
            "checkpoints_per_s": 1e3 * batch / step,
            "us_per_token_durability_token": 1e3 * report.median(self.token) / (batch * tokens),
            "us_per_token_durability_turn": 1e3 * report.median(self.turn) / (batch * tokens),
        }


async def begin(store: RedisStore, batch: int) -> list[Ownership]:
    """A new conversation with a running turn for each of the batch."""
    owned = []
    for _ in range(batch):
        record = await store.create(
            NewConversation(new_conversation_id(), TENANT, MODEL, 4, 2044, replay_windows=4)
        )
        turn = BeginTurn(
            conversation_id=record.conversation_id,
            tenant=TENANT,
            replica="replica",
            input_ids=np.arange(INPUT_TOKENS, dtype=np.int32),
            fingerprint=MODEL,
            lease_s=LEASE_S,
        )
        begun = await store.begin(turn)
        if not isinstance(begun, Ownership):
            raise RuntimeError(f"a new turn was answered {begun}")
        owned.append(begun)
    return owned


async def commit(store: RedisStore, owned: list[Ownership], tokens: int) -> None:
    output_ids = np.arange(tokens, dtype=np.int32)
    for one in owned:
        record = one.conversation
        head = chain_head(record.head, one.input_ids, output_ids)
        fence = one.fence
        done = TurnCommit(record.conversation_id, TENANT, fence, output_ids, head, head, ())
        await store.commit(done)


async def measure(url: str, batch: int, rounds: int, tokens: int) -> Costs:
    """`rounds` turns of `tokens` tokens in each of `batch` conversations, either way."""
    costs = Costs()
    store = await RedisStore.connect(url)
    try:
        for _ in range(rounds):
            owned = await begin(store, batch)
            spent = 0.0
            for k in range(tokens):
                costs.pings.append(1e3 * await store.ping())
                step = [
                    Checkpoint(
                        *(one.conversation.conversation_id, TENANT, one.fence, k),
                        token_ids=np.array([k], dtype=np.int32),
                        lease_s=LEASE_S,
                    )
                    for one in owned
                ]
                start_s = time.perf_counter()
                answers = await store.checkpoint(step)
                costs.steps.append(1e3 * (time.perf_counter() - start_s))
                if any(answers):
                    raise RuntimeError(f"a checkpoint was answered {answers}")
                spent += costs.steps[-1]
            start_s = time.perf_counter()
            await commit(store, owned, tokens)
            costs.token.append(spent + 1e3 * (time.perf_counter() - start_s))

            owned = await begin(store, batch)
            start_s = time.perf_counter()
            for one in owned:
                name = one.conversation.conversation_id
                await store.renew(TENANT, name, one.fence, LEASE_S)
            await commit(store, owned, tokens)
            costs.turn.append(1e3 * (time.perf_counter() - start_s))
    finally:
        await store.close()
    return costs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--record", action="store_true", help="save JSON")
    options = parser.parse_args()
    console = Console()
    found: dict[str, list[dict[str, float]]] = {}
    for fsync in FSYNC:
        with tempfile.TemporaryDirectory(prefix="sinkserve-") as folder:
            url = embedded.ensure_running(folder)
            try:
                with redis.Redis.from_url(url) as client:
                    client.config_set("appendfsync", fsync)
                found[fsync] = [
                    asyncio.run(measure(url, batch, options.rounds, options.tokens)).summary(
                        batch, options.tokens
                    )
                    for batch in BATCHES
                ]
            finally:
                embedded.stop(folder)
        names = list(found[fsync][0])
        rows = [[name, *(f"{row[name]:.3g}" for row in found[fsync])] for name in names]
        console.print(f"appendfsync {fsync}")
        console.print(report.table([["", *("",) * len(BATCHES)], *rows]))
    if options.record:
        result: dict[str, Any] = {"tokens": options.tokens, "rounds": options.rounds}
        console.print(report.save("checkpoint", {**result, "appendfsync": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
