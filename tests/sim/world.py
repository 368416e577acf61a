"""One simulated cluster and what befalls it: replicas, clients, a store, and faults drawn from a seed.

    seed -> kind of fault, sizes, habits -> everything happens in virtual time -> quiet -> verdict

Kinds name what may go wrong. In all but `storm` nothing that was acknowledged may be lost; in `storm`
the store may go back in time while owners are dead, and then a loss must be a refusal.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from cluster.conversation import NewConversation
from cluster.store import ConversationStore, NotFound, StoreUnavailable
from tests.sim.backends import Backend
from tests.sim.claims import Violation
from tests.sim.client import Habits, Runner, Server, Surroundings, User
from tests.sim.ledger import Known, Ledger, Oracle
from tests.sim.network import Network
from tests.sim.replica import REPLAY_WINDOWS, Host, SimReplica
from tests.sim.toy import CAPACITY, MODEL, oracle_reply
from tests.sim.virtual import Dice, Process, VirtualLoop, bury_all, run_virtual
from tests.sim.watched import WatchedStore

T = TypeVar("T")

FAULTS: dict[str, dict[str, float]] = {
    "calm": {},
    "crash": {"crash": 3},
    "pause": {"pause": 1, "pause_until_replaced": 2},
    "clock": {"forward": 2, "back": 1},
    "restart": {"restart": 2, "outage": 1},
    "rollback": {"roll_back": 1, "roll_back_a_moment": 3, "restart": 1},
    "churn": {"crash": 2, "pause": 2, "forward": 1, "back": 1, "restart": 1, "outage": 1},
    "storm": {
        "crash": 2,
        "pause": 2,
        "roll_back": 2,
        "roll_back_and_kill": 2,
        "roll_back_and_strand": 2,
        "forward": 0.5,
        "outage": 0.5,
        "delete": 0.3,
    },
    "delete": {"delete_and_restart": 2, "delete": 1, "crash": 1, "restart": 1, "expire": 0.3},
}
KINDS = tuple(FAULTS)
KEEPS_LEASES = ("calm", "crash", "pause", "restart")
LIFETIME_S = 900.0
"""Virtual seconds after which a run that has not ended is stuck."""

TORMENT_S = 40.0
"""Until when there are faults."""

SETTLE_S = 3.0
"""What turns that nobody waits for may still need."""

OpenBackend = Callable[[Network], Backend]
MakeReplica = Callable[[Host], Runner]


@dataclass(frozen=True, slots=True)
class Cast:
    """Which replicas play, what the deterministic ones must say, what else has to be virtual; `durable`:
    whether they store tokens before they show them. If not, only a client that keeps what it has seen, and
    reads alone, can count on it."""

    make: MakeReplica = SimReplica
    oracle: Oracle = oracle_reply
    around: Callable[[VirtualLoop], AbstractContextManager[None]] = lambda _: nullcontext()
    durable: bool = True


SMALL = Cast()


async def _answered(call: Callable[[str, str], Awaitable[object]], *names: str) -> bool:
    await call(*names)
    return True


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. `kind` of FAULTS; `noisy` replicas compute other tokens each."""

    seed: int
    kind: str
    noisy: bool
    turns: int = 4

    @classmethod
    def of(cls, seed: int) -> Plan:
        """What the seed alone decides: every kind with both toys in turn."""
        return cls(seed, KINDS[seed % len(KINDS)], noisy=seed // len(KINDS) % 2 == 1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`problem` is empty when every promise held."""

    plan: Plan
    problem: str
    counts: Counter[str]
    trace: tuple[str, ...]

    def report(self) -> str:
        """What a person needs who has to find out why."""
        last = "\n".join(self.trace[-80:])
        again = f"python -m tests.sim {self.plan.seed} --trace"
        return f"seed {self.plan.seed} ({self.plan.kind}): {self.problem}\n{last}\nagain: {again}"


class World:
    """Of one plan. `run` raises Violation."""

    def __init__(
        self, plan: Plan, loop: VirtualLoop, open_backend: OpenBackend, players: Cast
    ) -> None:
        self.plan = plan
        self._loop = loop
        self.ledger = Ledger(plan.noisy, plan.kind in KEEPS_LEASES, players.oracle, players.durable)
        dice = Dice(plan.seed)
        self._dice = dice
        self._random = dice.stream("world")
        loss = self._random.choice((0.0, 0.01, 0.05))
        delay_s = self._random.choice((0.004, 0.004, 0.03, 0.15))
        self.network = Network(loop, dice.stream("network"), loss, delay_s)
        self._backend = open_backend(self.network)
        self._make = players.make
        self._durable = players.durable
        self._num_replicas = self._random.randrange(2, 5)
        self._num_made = 0
        self._servers: list[Server] = []
        self._buried: list[Process] = []
        self._saved: list[Any] = []
        self._client_process = Process("client")
        self._store = self._backend.open(self._client_process, self.network)
        self._users: list[User] = []

    async def run(self) -> None:
        """Everything, then the verdict. Raises Violation."""
        for _ in range(self._num_replicas):
            self._add_replica()
        for number in range(self._random.randrange(1, 4)):
            await self._open_conversation(number)
        story = asyncio.create_task(self._story())
        keeper = asyncio.create_task(self._keep_replicas())
        try:
            async with asyncio.timeout(LIFETIME_S):
                await asyncio.wait({story, self._loop.failed}, return_when=asyncio.FIRST_COMPLETED)
            await (self._loop.failed if self._loop.failed.done() else story)
        except TimeoutError as error:
            raise Violation(f"stuck: not done after {LIFETIME_S} virtual seconds") from error
        finally:
            story.cancel()
            keeper.cancel()
            await asyncio.gather(story, keeper, return_exceptions=True)
            for process in (*self._buried, *(server.process for server in self._servers)):
                await process.bury()
            await bury_all()
            self._loop.failed.cancel()
            self._backend.close()

    async def _story(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            nemesis = tasks.create_task(self._torment())
            talks = [tasks.create_task(user.talk(self.plan.turns)) for user in self._users]
            await asyncio.wait(talks)
            nemesis.cancel()
        self._make_peace()
        await asyncio.sleep(SETTLE_S)
        await self._verdict()

    def _add_replica(self) -> None:
        self._num_made += 1
        name = f"r{self._num_made}"
        process = Process(name)
        store = self._backend.open(process, self.network)
        watched = cast(ConversationStore, WatchedStore(store, name, self.ledger, self.network))
        salt = name if self.plan.noisy else ""
        slots = 2 if self.plan.kind not in ("rollback", "restart") else 100
        host = Host(process, watched, self._dice.stream(name), salt, slots, self.ledger.poisoned)
        self._servers.append(Server(process, self._make(host)))

    async def _open_conversation(self, number: int) -> None:
        sink_tokens = self._random.choice((0, 2, 4))
        new = NewConversation(
            conversation_id=f"conv_{self._random.getrandbits(112):028x}{number:04x}",
            tenant=self._random.choice(("ann", "bob")),
            fingerprint=MODEL,
            sink_tokens=sink_tokens,
            window_tokens=CAPACITY - sink_tokens,
            replay_windows=REPLAY_WINDOWS,
        )
        self.ledger.created(new)
        while True:
            try:
                await self._store.create(new)
                break
            except StoreUnavailable:
                await asyncio.sleep(0.1)
        users = self._random.choice((1, 1, 2))
        habits = self._habits(users)
        around = Surroundings(
            ledger=self.ledger,
            network=self.network,
            store=self._store,
            servers=self._live_servers,
            random=self._dice.stream(f"users of {number}"),
            habits=habits,
        )
        self._users += [User(f"u{number}{'ab'[user]}", new, around) for user in range(users)]

    def _live_servers(self) -> list[Server]:
        return [server for server in self._servers if not server.process.died.is_set()]

    def _habits(self, users: int) -> Habits:
        draw = self._random
        poisonous = self.plan.kind in ("crash", "churn", "storm")
        return Habits(
            cancels=draw.choice((0.0, 0.0, 0.2)),
            stale=draw.choice((0.0, 0.1)),
            # Who does not say what it expects could not be told of a loss, nor of another's turn.
            without_expectation=0.0 if users > 1 or self.plan.kind == "storm" else 0.3,
            # To take a turn from a live owner is a fault too, so not beside a roll-back.
            steals=0.0 if self.plan.kind == "rollback" else draw.choice((0.0, 0.2, 0.7)),
            patience_s=12.0 if self.plan.kind == "rollback" else 3.0,
            lies=0.1 if self.plan.kind == "calm" else 0.0,
            **({} if self._durable else {"forgets_shown": 0.0, "second_reader": 0.0}),
            poison=0.05 if poisonous and draw.random() < 0.5 else 0.0,
        )

    # Faults.

    async def _torment(self) -> None:
        faults = FAULTS[self.plan.kind]
        if not faults:
            return
        names, weights = list(faults), list(faults.values())
        actions: dict[str, Callable[[], Awaitable[None]]] = {
            "crash": self._crash,
            "pause": self._pause,
            "pause_until_replaced": self._pause_until_replaced,
            "forward": self._forward,
            "back": self._back,
            "restart": self._restart,
            "roll_back": self._roll_back,
            "roll_back_a_moment": self._roll_back_a_moment,
            "roll_back_and_kill": self._roll_back_and_kill,
            "roll_back_and_strand": self._roll_back_and_strand,
            "outage": self._outage,
            "delete": self._delete,
            "delete_and_restart": self._delete_and_restart,
            "expire": self._expire,
        }
        self._saved.append(self._backend.save())
        while self._loop.now_s < TORMENT_S:
            await asyncio.sleep(self._random.uniform(0.0, 1.0))
            if "roll_back" in faults and self._random.random() < 0.5:
                self._saved.append(self._backend.save())
                await asyncio.sleep(self._random.uniform(0.0, 1.0))
            [name] = self._random.choices(names, weights)
            self.network.note("fault", name)
            self.ledger.counts[name] += 1
            await actions[name]()

    def _victim(self) -> Process:
        """Mostly the replica that was given a turn last."""
        live = [server.process for server in self._live_servers()]
        busy = [process for process in live if process.name == self.ledger.last_owner]
        if busy and self._random.random() < 0.7:
            return busy[0]
        return self._random.choice(live or [server.process for server in self._servers])

    async def _wait_for(self, what: str, patience_s: float = 1.0) -> None:
        """Until the ledger has counted one more of these; not for ever."""
        count = self.ledger.counts[what]
        for _ in range(round(patience_s / 0.01)):
            if self.ledger.counts[what] != count:
                return
            await asyncio.sleep(0.01)

    async def _busy_moment(self) -> None:
        await self._wait_for("begun")
        await asyncio.sleep(self._random.uniform(0.0, 0.4))

    async def _crash(self) -> None:
        await self._busy_moment()
        self._victim().crash()
        await asyncio.sleep(self._random.uniform(0.0, 0.5))

    async def _pause(self) -> None:
        await self._busy_moment()
        process = self._victim()
        process.pause()
        await asyncio.sleep(self._random.choice((0.3, 2.0, 5.0, 9.0)))
        process.resume()

    async def _pause_until_replaced(self) -> None:
        """Wake up in the midst of what the successor does."""
        await self._busy_moment()
        process = self._victim()
        process.pause()
        await self._wait_for("resumed", patience_s=8.0)
        await asyncio.sleep(self._random.uniform(0.0, 0.3))
        process.resume()

    async def _forward(self) -> None:
        self.network.clock_offset_s += self._random.choice((1.0, 7.0, 60.0))
        self._backend.clock_moved()

    async def _back(self) -> None:
        self.network.clock_offset_s -= self._random.choice((0.01, 1.0, 7.0, 60.0))

    async def _restart(self) -> None:
        self._backend.restart(None)
        await self._let_recover()

    async def _roll_back(self) -> None:
        """To one of the latest states saved."""
        if self.plan.kind == "storm":
            self.ledger.excuse_losses()
        index = max(0, len(self._saved) - self._random.randrange(1, 4))
        self._backend.restart(self._saved[index])
        del self._saved[index + 1 :]
        await self._let_recover()

    async def _roll_back_a_moment(self) -> None:
        """To what it was a fraction of a second ago, in the midst of a turn or of its commit."""
        await self._wait_for("begun" if self._random.random() < 0.5 else "shown")
        saved = self._backend.save()
        await self._wait_for("proposed" if self._random.random() < 0.5 else "shown")
        await asyncio.sleep(self._random.uniform(0.0, 0.2))
        if self.plan.kind == "storm":
            self.ledger.excuse_losses()
        self._backend.restart(saved)
        await self._let_recover()

    async def _roll_back_and_kill(self) -> None:
        """Nobody is left who knows better."""
        await self._roll_back_a_moment()
        for server in self._servers:
            server.process.crash()

    async def _roll_back_and_strand(self) -> None:
        """Who knows better wakes up when it is too late."""
        await self._roll_back_a_moment()
        live = [server.process for server in self._live_servers()]
        stranded = [process for process in live if process.name == self.ledger.last_owner]
        for process in stranded:
            process.pause()
        await asyncio.sleep(self._random.uniform(3.0, 8.0))
        for process in stranded:
            process.resume()

    async def _let_recover(self) -> None:
        """Where one fault at a time is the point, the next one waits for the end of this one."""
        if self.plan.kind in ("restart", "rollback"):
            await asyncio.sleep(self._random.uniform(4.0, 6.0))

    async def _outage(self) -> None:
        self.network.store_is_up = False
        await asyncio.sleep(self._random.choice((0.3, 1.5, 4.0)))
        self.network.store_is_up = True

    async def _delete(self) -> None:
        """By a client; the answer may be lost, so it is deleted from now on or a little later."""
        known = self._random.choice(list(self.ledger.known.values()))
        self.ledger.deleted(known.new.conversation_id)
        while True:
            try:
                await self._store.delete(known.new.tenant, known.new.conversation_id)
                return
            except StoreUnavailable:
                await asyncio.sleep(0.1)
            except NotFound:
                return

    async def _delete_and_restart(self) -> None:
        """What was deleted is not to be repaired."""
        await self._delete()
        await asyncio.sleep(self._random.uniform(0.0, 1.0))
        self._backend.restart(None)

    async def _expire(self) -> None:
        """More time than a conversation is kept for."""
        for known in self.ledger.known.values():
            known.may_be_gone = True
        self.network.clock_offset_s += 5000.0
        self._backend.clock_moved()

    async def _keep_replicas(self) -> None:
        """As Serve does: put a new replica in the place of a dead one."""
        while True:
            await asyncio.sleep(self._random.uniform(0.1, 0.6))
            dead = [server for server in self._servers if server.process.died.is_set()]
            for server in dead:
                self._servers.remove(server)
                self.ledger.died(server.process.name)
                self._buried.append(server.process)
                self._add_replica()

    def _make_peace(self) -> None:
        """No more faults: what runs comes to its end."""
        self.network.store_is_up = True
        self.network.loss = 0.0
        for server in self._servers:
            server.process.resume()

    # The verdict.

    async def _verdict(self) -> None:
        for user in self._users:
            if not user.gone:
                # Every conversation goes on: nothing blocks it, and its cache is what the log says.
                await user.say()
        await asyncio.sleep(SETTLE_S)
        for known in self.ledger.known.values():
            await self._judge(known)

    async def _judge(self, known: Known) -> None:
        tenant, conversation_id = known.new.tenant, known.new.conversation_id
        stranger = "bob" if tenant == "ann" else "ann"
        store = self._store
        foreign: tuple[Callable[[str, str], Awaitable[object]], ...]
        foreign = (store.get, store.transcript, store.delete)
        for call in foreign:
            # A foreign id looks like a missing one.
            if await self._found(partial(_answered, call, stranger, conversation_id)):
                raise Violation("a stranger got an answer")
        record = await self._found(lambda: store.get(tenant, conversation_id))
        if record is None:
            if not known.deleted and not known.may_be_gone:
                raise Violation(f"{conversation_id} is gone")
            return
        if known.deleted and self.plan.kind != "storm":
            raise Violation(f"{conversation_id} was deleted, and is back")
        transcript = await self._found(lambda: store.transcript(tenant, conversation_id, 1000))
        if transcript is not None:
            self.ledger.verify(record, (transcript[0], list(transcript[1])))

    @staticmethod
    async def _found(call: Callable[[], Awaitable[T]]) -> T | None:
        """The answer, None for NotFound."""
        while True:
            try:
                return await call()
            except NotFound:
                return None
            except StoreUnavailable:
                await asyncio.sleep(0.2)


def simulate(plan: Plan, open_backend: OpenBackend, players: Cast = SMALL) -> Outcome:
    """Run one plan to its verdict."""
    worlds: list[World] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        if not isinstance(loop, VirtualLoop):
            raise TypeError("a simulation runs in virtual time")
        world = World(plan, loop, open_backend, players)
        worlds.append(world)
        with players.around(loop):
            await world.run()

    problem = ""
    try:
        run_virtual(main())
    except ExceptionGroup as group:
        problem = f"{type(group.exceptions[0]).__name__}: {group.exceptions[0]}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    [world] = worlds
    return Outcome(plan, problem, world.ledger.counts, tuple(world.network.trace))
