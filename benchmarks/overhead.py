"""What the service adds to a turn's time to first token over calling the engine directly.

    python -m benchmarks.overhead                  toy engine: the clean figures
    python -m benchmarks.overhead --model smollm2-135m-instruct

One Ray cluster runs two applications side by side: SinkServe, and an empty one with the same shape (an
ingress that streams from one of two replicas, Ray's stock router, no store, no text, no model). Each
round sends one turn to each over HTTP, runs one on an engine loop in this process, and times the store
and the text by themselves. So all figures share the machine's good and bad moments.

added = SinkServe's first text over HTTP - the engine loop's first token; the floor is the empty
application's first item.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks import report
from cluster.conversation import (
    BeginTurn,
    Checkpoint,
    Message,
    NewConversation,
    Ownership,
    TurnCommit,
    chain_head,
    history_hash,
    new_conversation_id,
)
from cluster.redis_store import RedisStore
from deployments.config import ServiceConfig, load_config
from deployments.engine_files import EngineFiles, locate_engine, start_engine
from deployments.local.client import ApiClient, Reply
from deployments.local.home import Home
from deployments.local.progress import Steps
from deployments.local.service import LocalService
from deployments.openai_sampling import RequestLimits
from deployments.openai_schema import parse_chat
from deployments.strict_json import check_object, decode_json
from engine.loop import EngineLoop
from engine.protocol import TokenIds
from engine.sampling import SamplingParams
from engine.turn import Prefill, Segment, TokenSampled, TurnEnded, TurnEvent, TurnRequest
from engine.window import SinkWindow

MESSAGE = "Tell me something short about the sea."
OUTPUT_TOKENS = 4
WARM_UP_ROUNDS = 20
MAX_BYTES = 1 << 20
FLOOR = "floor"
TENANT = "benchmark"


class FloorReplica:
    """The empty application's second hop."""

    async def turn(self, body: bytes) -> AsyncGenerator[str, None]:
        for number in range(OUTPUT_TOKENS):
            yield f"data: {number}\n\n"


class FloorIngress:
    """The empty application's first hop: streams what a replica yields."""

    def __init__(self, replicas: Any) -> None:
        self._turns = replicas.options(stream=True).turn

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import StreamingResponse

        body = await request.body()

        async def events() -> AsyncGenerator[str, None]:
            async for event in self._turns.remote(body):
                yield event

        return StreamingResponse(events(), media_type="text/event-stream")


def deploy_floor() -> None:
    from ray import serve

    replicas: Any = serve.deployment(FloorReplica)
    ingress: Any = serve.deployment(FloorIngress)
    options = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": 100}
    front = ingress.options(**options).bind(replicas.options(num_replicas=2, **options).bind())
    serve.run(front, name=FLOOR, route_prefix=f"/{FLOOR}")


@dataclass(slots=True)
class Samples:
    """Milliseconds of every round, by what was timed."""

    values: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        self.values[name].append(1000 * seconds)

    def p50(self, name: str) -> float:
        return report.median(self.values[name])

    def p99(self, name: str) -> float:
        return report.percentile(self.values[name], 99)


class DirectEngine:
    """One conversation on an engine loop in this process, resident between its turns."""

    def __init__(self, config: ServiceConfig, files: EngineFiles, threads: int) -> None:
        self._engine = start_engine(config, files, threads)
        self._loop = EngineLoop(self._engine)
        spec = files.spec
        sinks = 4
        self._window = SinkWindow(sinks, spec.capacity - sinks, spec.slot_tokens - sinks)
        self._turn, self._length, self._cached = 0, 0, 0
        self._tail: list[int] = []

    def first_token_s(self, input_ids: TokenIds) -> float:
        """Run one turn of `input_ids`; seconds from `submit` to its first token."""
        tokens = np.concatenate([np.array(self._tail, np.int32), input_ids])
        start, sampled, ended = self._cached, list[int](), threading.Event()
        times: list[float] = []

        def on_event(event: TurnEvent) -> None:
            if isinstance(event, TokenSampled):
                times.append(time.perf_counter())
                sampled.append(event.token_id)
            elif isinstance(event, TurnEnded):
                ended.set()

        self._turn += 1
        request = TurnRequest(
            conversation_id="direct",
            turn=self._turn,
            head=str(self._turn - 1),
            window=self._window,
            token_count=self._length,
            input_tokens=len(input_ids),
            prefill=lambda resident: Prefill((Segment(resident or 0, tokens),), 0, "none"),
            retained=tokens,
            sampling=SamplingParams(),
            max_tokens=OUTPUT_TOKENS,
            eos_ids=frozenset(),
        )
        submitted = time.perf_counter()
        self._loop.submit(request, on_event)
        if not ended.wait(60.0):
            raise TimeoutError("the engine did not end its turn")
        # As in a replica: the last sampled token is not cached and goes in with the next turn.
        self._cached = start + len(tokens) + len(sampled) - 1
        self._length, self._tail = self._cached + 1, sampled[-1:]
        self._loop.settle("direct", str(self._turn), self._cached)
        return times[0] - submitted

    def close(self) -> None:
        self._loop.stop(drain=False, timeout_s=10.0)
        self._engine.close()


class DirectStore:
    """One conversation in the service's store, operated from this process."""

    def __init__(self, store: RedisStore, fingerprint: str) -> None:
        self._store, self._fingerprint = store, fingerprint
        self._id = new_conversation_id()

    async def create(self) -> None:
        new = NewConversation(
            conversation_id=self._id,
            tenant=TENANT,
            fingerprint=self._fingerprint,
            sink_tokens=4,
            window_tokens=508,
            replay_windows=4,
        )
        await self._store.create(new)

    async def turn(self, samples: Samples, input_ids: TokenIds) -> None:
        """What a turn asks of the store, timed one by one."""
        begin = BeginTurn(
            conversation_id=self._id,
            tenant=TENANT,
            replica="benchmark",
            input_ids=input_ids,
            fingerprint=self._fingerprint,
            lease_s=10.0,
        )
        with samples.timed("store: begin"):
            owned = await self._store.begin(begin)
        if not isinstance(owned, Ownership):
            raise RuntimeError(f"the benchmark's own conversation was claimed: {owned}")
        outputs = np.arange(OUTPUT_TOKENS, dtype=np.int32)
        first = Checkpoint(self._id, TENANT, owned.fence, 0, outputs[:1], begin.lease_s)
        with samples.timed("store: checkpoint"):
            await self._store.checkpoint([first])
        now = owned.conversation
        commit = TurnCommit(
            conversation_id=self._id,
            tenant=TENANT,
            fence=owned.fence,
            output_ids=outputs,
            head=chain_head(now.head, input_ids, outputs),
            history=history_hash(now.history, "user", MESSAGE),
            messages=(Message("user", MESSAGE), Message("assistant", "abcd")),
        )
        with samples.timed("store: commit"):
            await self._store.commit(commit)


def time_text(samples: Samples, files: EngineFiles, body: bytes) -> None:
    """Reading the request, its token ids, and the text of the first token."""
    limits = RequestLimits(vocab_size=files.spec.model.vocab_size)
    with samples.timed("text"):
        request = parse_chat(check_object(decode_json(body, MAX_BYTES), MAX_BYTES), limits)
        ids = files.codec.encode_turn(request.messages)
        files.codec.text_stream().push(int(ids[0]))


def time_floor(samples: Samples, http: httpx.Client, body: dict[str, Any]) -> None:
    started = time.perf_counter()
    first = 0.0
    with http.stream("POST", f"/{FLOOR}", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line and not first:
                first = time.perf_counter() - started
    samples.add("floor", first)
    samples.add("floor, whole", time.perf_counter() - started)


def time_service(samples: Samples, client: ApiClient, body: dict[str, Any]) -> None:
    reply = Reply()
    started = time.perf_counter()
    for _ in client.stream(body, reply):
        pass
    samples.add("service", reply.ttft_s or 0.0)
    samples.add("service, whole", time.perf_counter() - started)


async def measure(service: LocalService, rounds: int, console: Console) -> Samples:
    config = service.config
    files = locate_engine(config)
    engine = DirectEngine(config, files, config.threads_of(config.max_replicas))
    store = await RedisStore.connect(config.redis_url)
    record = DirectStore(store, files.fingerprint)
    await record.create()
    ids = files.codec.encode_turn([Message("user", MESSAGE)])
    samples = Samples()
    url = service.state.url
    with ApiClient(url) as client, httpx.Client(base_url=url, trust_env=False) as http:
        conversation = client.post("/v1/conversations", {})["id"]
        messages = [{"role": "user", "content": MESSAGE}]
        body = {"model": client.model(), "messages": messages, "conversation": conversation}
        body |= {"max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "stream": True}
        raw = httpx.Request("POST", "http://-", json=body).content
        steps: list[Callable[[], None]] = [
            lambda: time_floor(samples, http, body),
            lambda: time_service(samples, client, body),
            lambda: samples.add("engine", engine.first_token_s(ids)),
            lambda: time_text(samples, files, raw),
        ]
        for number in track(range(WARM_UP_ROUNDS + rounds), "rounds", console=console):
            if number == WARM_UP_ROUNDS:
                samples.values.clear()
            for step in steps if number % 2 else reversed(steps):
                step()
            await record.turn(samples, ids)
    engine.close()
    await store.close()
    return samples


def rows(samples: Samples) -> list[list[str]]:
    """Where the time to the first token goes."""

    def row(what: str, name: str) -> list[str]:
        return [what, f"{samples.p50(name):.2f}", f"{samples.p99(name):.2f}"]

    known = ("floor", "engine", "text", "store: begin", "store: checkpoint")
    rest = samples.p50("service") - sum(samples.p50(name) for name in known)
    return [
        ["time to first token, ms", "p50", "p99"],
        row("HTTP, proxy, two hops (the empty application)", "floor"),
        row("read the request, encode, decode the first token", "text"),
        row("store: claim the turn, on disk (replica)", "store: begin"),
        row("engine: submit to first token", "engine"),
        row("store: the first token, on disk (replica)", "store: checkpoint"),
        ["the rest: router, checks, hand-overs between threads", f"{rest:.2f}", ""],
        row("**SinkServe over HTTP**", "service"),
        row("after the last token: store: commit, on disk", "store: commit"),
        row("the whole exchange: empty application", "floor, whole"),
        row("the whole exchange: SinkServe", "service, whole"),
    ]


def ratios(samples: Samples) -> dict[str, float]:
    """(SinkServe - engine) / floor. At p99 the engine's median is taken off: its tail is its own."""
    engine = samples.p50("engine")
    return {
        "p50": (samples.p50("service") - engine) / samples.p50("floor"),
        "p99": (samples.p99("service") - engine) / samples.p99("floor"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--record", action="store_true", help="save JSON")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="sinkserve-overhead-") as folder:
        config = load_config(
            {"model": options.model, "port": options.port, "data_dir": f"{folder}/data"}
        )
        service = LocalService(Home(Path(folder)), config, Steps(console))
        try:
            service.start()
            deploy_floor()
            samples = asyncio.run(measure(service, options.rounds, console))
        finally:
            service.stop()
    table, ratio = rows(samples), ratios(samples)
    console.print(report.table(table))
    console.print(f"added / floor: p50 {ratio['p50']:.2f}, p99 {ratio['p99']:.2f}")
    if options.record:
        result = {"model": options.model, "rounds": options.rounds, "ratio": ratio}
        result["milliseconds"] = {
            name: {"p50": samples.p50(name), "p99": samples.p99(name)} for name in samples.values
        }
        console.print(report.save(f"overhead-{options.model}", result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
