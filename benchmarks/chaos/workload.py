"""Several clients in endless conversations, and traps that spring when a stream gets to token k."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from benchmarks.chaos.client import ChaosClient, ClientOptions
from benchmarks.chaos.oracle import Asked

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Scale:
    """How many clients, how long their turns are at most, and the seed of all they choose."""

    num_clients: int = 5
    max_tokens: int = 128
    seed: int = 0


@dataclass(slots=True)
class _Trap:
    """Springs for `turn`, the number of one of `client`'s turns or a later one, at `k` characters."""

    client: ChaosClient
    turn: int
    k: int
    sprung: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Workload:
    """Use `start`, then traps and faults, then `finish`. `turn_ended` is awaited after every turn."""

    turn_ended: Callable[[ChaosClient], Awaitable[None]] | None = None

    def __init__(self, options: ClientOptions, scale: Scale) -> None:
        self._rng = random.Random(scale.seed)
        self._max_tokens = scale.max_tokens
        self._traps: list[_Trap] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._resting: set[int] = set()
        self._options = options
        self.clients = [ChaosClient(options, self._noticed) for _ in range(scale.num_clients)]

    async def start(self) -> None:
        """Returns when every client has had a turn. Raises httpx.HTTPError."""
        await asyncio.gather(*(client.create() for client in self.clients))
        self._tasks = [asyncio.create_task(self._talk(client)) for client in self.clients]
        while not all(client.turns and client.turns[0].ended_s for client in self.clients):
            if any(task.done() for task in self._tasks):
                break
            await asyncio.sleep(0.05)

    async def join(self, count: int) -> list[ChaosClient]:
        """More clients, with new conversations. Raises httpx.HTTPError."""
        joined = [ChaosClient(self._options, self._noticed) for _ in range(count)]
        await asyncio.gather(*(client.create() for client in joined))
        self.clients += joined
        self._tasks += [asyncio.create_task(self._talk(client)) for client in joined]
        return joined

    def rest(self, clients: Iterable[ChaosClient]) -> None:
        """They end the turn they are in and ask for no more until `finish`."""
        self._resting |= {id(client) for client in clients}

    async def return_once(self, clients: Iterable[ChaosClient]) -> None:
        """One more turn of each of these that rest, all at once."""
        await asyncio.gather(*(self._turn(client) for client in clients))

    async def finish(self) -> None:
        """Let every client end its turn and have one more in peace."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        await asyncio.gather(*(self._turn(client) for client in self.clients))

    async def stop(self) -> None:
        """At once, whatever is running."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def reach(self, k: int) -> ChaosClient:
        """A random client, just as a turn has shown it `k` characters."""
        ahead = [one for one in self.live() if 0 < one.turns[-1].num_chars < k]
        client = self._rng.choice(ahead or self.clients)
        trap = _Trap(client, len(client.turns) + (not ahead), k)
        self._traps.append(trap)
        await trap.sprung
        return client

    def random_k(self) -> int:
        """Where to cut a reply: at least one character is still to come."""
        return self._rng.randrange(self._max_tokens - 10)

    def live(self) -> list[ChaosClient]:
        """The clients with a running turn."""
        return [client for client in self.clients if client.live is not None]

    def ask(self) -> Asked:
        """A random turn; one in six is greedy, one in six has a stop string."""
        rng = self._rng
        text = " ".join(
            "".join(rng.choices(_LETTERS, k=rng.randint(2, 8))) for _ in range(rng.randint(2, 8))
        )
        stop = ("".join(rng.choices(_LETTERS, k=2)),) if rng.random() < 1 / 6 else ()
        temperature = 0.0 if rng.random() < 1 / 6 else 1.0
        return Asked(text, self._max_tokens, rng.getrandbits(32), temperature, stop)

    async def _talk(self, client: ChaosClient) -> None:
        while not self._stopping and id(client) not in self._resting:
            await self._turn(client)

    async def _turn(self, client: ChaosClient) -> None:
        await client.say(self.ask())
        if self.turn_ended is not None:
            await self.turn_ended(client)

    def _noticed(self, client: ChaosClient) -> None:
        for trap in self._traps:
            is_due = trap.client is client and len(client.turns) >= trap.turn
            if is_due and client.turns[-1].num_chars >= trap.k and not trap.sprung.done():
                trap.sprung.set_result(None)
        self._traps = [trap for trap in self._traps if not trap.sprung.done()]
