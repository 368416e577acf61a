"""Does it matter how old a conversation is when its replica dies?

    python -m benchmarks.failover --quick                two ages, one kill each
    python -m benchmarks.failover                        100 to 100,000 tokens, three kills each
    python -m benchmarks.failover --record --plot        also writes its JSON and its picture

Two replicas of the demo model serve on a Ray cluster of this machine's own. Conversations are made old in
the store, by turns with long inputs that no engine computes. Then a client streams a reply over HTTP, the
replica that writes it gets SIGKILL after a few tokens, and the client notes when the next one comes: the
other replica has by then noticed, claimed the conversation and rebuilt its cache from the bounded record.

Beside it, the same kill under Serve's stock ConsistentHashRouter (`benchmarks/stock_router.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve
from rich.console import Console
from rich.progress import Progress

from benchmarks import report, stock_router
from benchmarks.chaos.client import ChaosClient, ClientOptions, TurnLog
from benchmarks.chaos.oracle import Asked
from benchmarks.chaos.rig import APPLICATION, DEMO_FIELDS, NotHappened, Rig, kill
from benchmarks.endurance import messages
from cluster.conversation import BeginTurn, Conversation, Message, Ownership, TurnCommit, chain_head
from cluster.redis_store import RedisStore
from cluster.store import ConversationStore
from deployments.auth import DEFAULT_TENANT
from deployments.config import DEMO_MODEL, ConfigError, load_config
from deployments.conversation_records import hash_all
from deployments.engine_files import locate_engine
from deployments.text import ChatCodec

Json = dict[str, Any]

AGES = (100, 1_000, 3_000, 10_000, 30_000, 100_000)
QUICK_AGES = (100, 3_000)
REPLICAS = 2
KILL_AT = 4
"""Pieces of text that the client has seen."""
REPLY_TOKENS = 24
PATIENCE_S = 180.0
AGED_TURN_TOKENS = 4_000
LIVE_TOKENS = 34
"""Of the two live turns before the cut, about."""
TEMPLATE_TOKENS = 16
"""At the end of an input: the template's opening of the reply lies in them."""
PLOT = Path(__file__).parent.parent / "docs" / "failover.png"


@dataclass(frozen=True, slots=True)
class Resumed:
    """One kill as the client saw it. `age_tokens` is the conversation's length at the turn that was cut.

    `resumed_s` runs from the SIGKILL to the next piece of text; `prefill_tokens` were computed by the new
    owner before it, the turn's input included. `replay_depth` is the most ids that the record keeps: S and
    four windows. `requests` is 1 when the client noticed nothing.
    """

    target_tokens: int
    age_tokens: int
    resumed_s: float
    recovery: str
    prefill_tokens: int
    replay_depth: int
    requests: int
    is_complete: bool


class Client(ChaosClient):
    """Its replies are REPLY_TOKENS long whatever the model thinks."""

    def _body(self, asked: Asked) -> Json:
        return super()._body(asked) | {"ignore_eos": True}


async def grow_old(
    store: ConversationStore, codec: ChatCodec, conversation_id: str, num_tokens: int
) -> Conversation:
    """Give an empty conversation about `num_tokens` tokens of history: claims and commits as a replica
    makes them, but their input is never computed and the replies are empty."""
    record = await store.get(DEFAULT_TENANT, conversation_id)
    text = " ".join(itertools.islice(messages(), AGED_TURN_TOKENS // 10))
    said = (Message("user", text), Message("assistant", ""))
    closing = codec.close_reply([]).closing_ids
    while (left := num_tokens - record.token_count) >= 2 * TEMPLATE_TOKENS:
        encode = codec.encode_turn if record.turn else codec.encode_opening
        ids = encode(said[:1])
        room = min(left, AGED_TURN_TOKENS, len(ids)) - len(closing)
        ids = np.concatenate([ids[: room - TEMPLATE_TOKENS], ids[-TEMPLATE_TOKENS:]])
        begun = await store.begin(
            BeginTurn(
                conversation_id=conversation_id,
                tenant=DEFAULT_TENANT,
                replica="nobody",
                input_ids=ids,
                fingerprint=record.fingerprint,
                lease_s=60.0,
            )
        )
        if not isinstance(begun, Ownership):
            raise NotHappened(f"the conversation is taken: {begun}")
        record = await store.commit(
            TurnCommit(
                conversation_id=conversation_id,
                tenant=DEFAULT_TENANT,
                fence=begun.fence,
                output_ids=closing,
                head=chain_head(record.head, ids, closing),
                history=hash_all(record.history, said),
                messages=said,
                reply_tokens=0,
            )
        )
    return record


def resumption_s(log: TurnLog, killed_s: float) -> float:
    """From the kill to the text that ends the longest silence after it: pieces that were under way when
    the replica died come within milliseconds. Raises NotHappened."""
    times = [killed_s, *(at for at, _ in log.texts if at > killed_s)]
    if len(times) == 1:
        raise NotHappened("no text after the kill")
    return max(itertools.pairwise(times), key=lambda pair: pair[1] - pair[0])[1] - killed_s


class Measurement:
    """Kills on one service that is up."""

    def __init__(self, rig: Rig, store: ConversationStore, codec: ChatCodec) -> None:
        self._rig = rig
        self._store = store
        self._codec = codec
        self._options = ClientOptions(
            rig.url, patience_s=PATIENCE_S, silence_s=PATIENCE_S, model=DEMO_MODEL
        )

    async def kill_at(self, num_tokens: int, seed: int) -> Resumed:
        """One conversation of that age, one kill. Raises NotHappened."""
        reached = asyncio.Event()

        def seen(client: ChaosClient) -> None:
            if len(client.turns) == 2 and len(client.turns[1].texts) >= KILL_AT:
                reached.set()

        client = Client(self._options, seen)
        await client.create()
        record = await grow_old(
            self._store, self._codec, client.conversation_id, num_tokens - LIVE_TOKENS
        )
        # The first live turn brings the conversation into a slot, while the replica killed last comes back.
        await client.say(Asked("Shall we go on?", 1, seed))
        await asyncio.to_thread(self._rig.await_ready)
        owner = (await self._store.get(DEFAULT_TENANT, client.conversation_id)).owner
        pid = self._rig.replicas()[owner].pid
        turn = asyncio.create_task(client.say(Asked("Tell me a long story.", REPLY_TOKENS, seed)))
        turn.add_done_callback(lambda _: reached.set())
        await reached.wait()
        killed_s = time.monotonic()
        await asyncio.to_thread(kill, pid)
        log = await turn
        counts = log.usage.get("sinkserve", {})
        if counts.get("recovery", "none") == "none":
            raise NotHappened(f"the turn was over before the kill: {log.error or counts}")
        return Resumed(
            target_tokens=num_tokens,
            age_tokens=int(log.usage.get("prompt_tokens", 0)),
            resumed_s=round(resumption_s(log, killed_s), 3),
            recovery=str(counts.get("recovery", "")),
            prefill_tokens=int(counts.get("prefill_tokens", 0)),
            replay_depth=record.sink_tokens + record.replay_windows * record.window_tokens,
            requests=len(log.attempts),
            is_complete=log.is_done
            and log.usage.get("completion_tokens") == REPLY_TOKENS
            and log.event_ids[-1][1] == log.num_chars,
        )

    async def kills(self, ages: Sequence[int], repeats: int) -> AsyncIterator[Resumed]:
        """Age by age within a round: the machine's drift falls on all of them. Raises NotHappened."""
        for seed, age in itertools.product(range(repeats), ages):
            yield await self.kill_at(age, seed)


def run(options: argparse.Namespace, console: Console) -> tuple[Json, list[Resumed], list[Json]]:
    """Facts of the service, the kills, and those of the baseline. Raises NotHappened, ConfigError."""
    fields = {**DEMO_FIELDS, "capacity": options.capacity}
    config = load_config({**fields, "model": DEMO_MODEL})
    files = locate_engine(config)
    ours: list[Resumed] = []
    with (
        Progress(console=console) as progress,
        Rig(REPLICAS, keeps_gcs=False, fields=fields) as rig,
    ):
        task = progress.add_task("SinkServe", total=options.repeats * len(options.ages))
        rig.deploy()

        async def measure() -> None:
            store = await RedisStore.connect(rig.store.url)
            kills = Measurement(rig, store, files.codec).kills(options.ages, options.repeats)
            async for one in kills:
                console.print(
                    f"{one.age_tokens:>8,} tokens: {one.resumed_s:6.2f} s, {one.recovery}, "
                    f"{one.prefill_tokens:,} prefilled, {one.requests} request(s)"
                )
                progress.advance(task)
                ours.append(one)
            await store.close()

        asyncio.run(measure())
        serve.delete(APPLICATION)
        application = stock_router.build(REPLICAS)
        serve.run(application, name=stock_router.NAME, route_prefix=f"/{stock_router.NAME}")
        theirs = [
            stock_router.cut_turn(rig.url, f"session-{number}")
            for number in progress.track(range(options.repeats), description="stock router")
        ]
    facts = {
        "load_average_1_5_15_min": os.getloadavg(),
        "ray": ray.__version__,
        "model": DEMO_MODEL,
        "capacity": options.capacity,
        "replay_windows": config.replay_windows,
        "replicas": REPLICAS,
        "threads_per_replica": config.threads_per_replica,
    }
    return facts, ours, theirs


def summarise(kills: Sequence[Resumed]) -> list[Json]:
    """One entry per age, medians."""
    found = []
    for target, group in itertools.groupby(
        sorted(kills, key=lambda one: one.target_tokens), key=lambda one: one.target_tokens
    ):
        ours = list(group)
        found.append(
            {
                "target_tokens": target,
                "age_tokens": statistics.median(one.age_tokens for one in ours),
                "resumed_s": statistics.median(one.resumed_s for one in ours),
                "recovery": sorted({one.recovery for one in ours}),
                "prefill_tokens": statistics.median(one.prefill_tokens for one in ours),
                "kills": len(ours),
                "noticed": sum(one.requests > 1 or not one.is_complete for one in ours),
            }
        )
    return found


def draw(kills: Sequence[Resumed], path: Path) -> None:
    """Time and tokens against age."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    ages = [one.age_tokens for one in kills]
    summary = summarise(kills)
    depth = kills[0].replay_depth
    panels = (
        ("resumed_s", "from SIGKILL to the next token at the client, s"),
        ("prefill_tokens", "tokens computed by the new owner"),
    )
    for axis, (name, title) in zip(axes, panels, strict=True):
        axis.plot(ages, [getattr(one, name) for one in kills], ".", alpha=0.5, label="one kill")
        axis.plot(
            [one["age_tokens"] for one in summary], [one[name] for one in summary], label="median"
        )
        axis.axvline(depth, color="gray", linestyle=":", label=f"replay depth, {depth:,} tokens")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_ylim(0, None)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("age of the conversation, tokens")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    description, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ages", type=int, nargs="+", default=AGES, help="tokens, at least 100")
    parser.add_argument("--repeats", type=int, default=3, help="kills per age and of the baseline")
    parser.add_argument("--capacity", type=int, default=512, help="tokens that a query sees")
    parser.add_argument("--quick", action="store_true", help=f"ages {QUICK_AGES}, one kill each")
    parser.add_argument(
        "--record", action="store_true", help="save benchmarks/results/failover-DATE.json"
    )
    parser.add_argument("--plot", action="store_true", help="draw docs/failover.png")
    options = parser.parse_args()
    if options.quick:
        options.ages, options.repeats = QUICK_AGES, 1
    if min(options.ages) < AGES[0] or options.repeats < 1:
        parser.error(f"--ages start at {AGES[0]} and --repeats at 1")
    console = Console()
    try:
        facts, kills, stock = run(options, console)
    except (NotHappened, ConfigError) as error:
        console.print(f"no measurement: {error}")
        return 1
    result = {
        **facts,
        "summary": summarise(kills),
        "kills": [asdict(one) for one in kills],
        "consistent_hash_router": stock,
    }
    console.print_json(data={"summary": result["summary"], "consistent_hash_router": stock})
    if options.record:
        console.print(report.save("failover", result))
    if options.plot:
        draw(kills, PLOT)
        console.print(PLOT)
    return int(any(one["noticed"] for one in result["summary"]))


if __name__ == "__main__":
    sys.exit(main())
