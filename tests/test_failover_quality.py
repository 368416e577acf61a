"""The demo model's replies after a kill: the same distribution as if nobody had died.

    uninterrupted  |-- history, from its first token --|-- input, reply ------------------|   live cache
    owner                                    |-- input, reply up to the kill X
    heir                        sinks, last windows R, input, reply so far ->|-- the rest -|
    noise floor    |-- all of it again, in other chunks -------------------->|-- the rest -|

Owner and heir are production's own: turn runner, engine loop, CPU engine, a real Valkey server. The heir
draws its own tokens and is then made to go on with the uninterrupted reply's, so that both give their
next-token distributions to the same tokens. All they differ by is how their cache was made.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from cluster.conversation import GENESIS, Message, NewConversation, new_conversation_id
from cluster.redis_store import RedisStore
from cluster.store import ConversationStore
from deployments.config import Tunables
from deployments.text import ChatCodec
from deployments.turn_call import TurnAccepted, TurnCall, TurnDone, TurnItem
from deployments.turn_runner import ReplicaParts, TurnRunner
from engine.loop import EngineLoop
from engine.onnx_engine import OnnxEngine
from engine.protocol import Engine, Logits, Row, RowResult, StepPlan, StepResult, TokenIds
from engine.replay_quality import kl_divergence
from engine.sampling import SamplingParams
from engine_build.build import BuildOptions
from engine_build.demo import ensure_demo_engine
from engine_build.spec import EngineSpec, WeightFormat
from tests.engine_fixtures import row_for, window_of
from tests.mortal import MortalStore, tokens_of
from tests.toy_service import run_turn

CAPACITY, SINKS = 128, 4
WINDOW = CAPACITY - SINKS
DEEPEST = 8
REPLY_TOKENS = 44
HISTORY_INPUTS, CUT_INPUT = (250, 250, 250), 50
"""Words of the user's messages: in the history, and in a turn that is cut."""
PATIENCE_S = 900.0
FLOOR_CHUNK = 61
BAR = 3.0
"""Times the noise floor: what the mean KL of a restored cache may be."""
UNSEEN = 1e-6
"""Nats a token: who reads a million tokens gains one nat of evidence on which cache wrote them."""
CUTS = (9, 21, 3)
"""Tokens of each cut reply that are stored when its owner dies."""
SAMPLING = SamplingParams(temperature=0.8, top_p=0.95, seed=11)
TENANT = "t"
PASSAGES = ("LICENSE", "docs/guarantees.md", "docs/errors.md")

Place = tuple[int, int]
"""Of a sampled token: turn, and number in its reply."""


class Recorder:
    """An engine that keeps the logits behind every token it draws, and draws what `script` says."""

    def __init__(self, engine: Engine, script: dict[Place, int]) -> None:
        self._engine, self._script = engine, script
        self.logits: dict[Place, Logits] = {}
        self.drawn: dict[Place, int] = {}

    @property
    def spec(self) -> EngineSpec:
        return self._engine.spec

    @property
    def max_resident(self) -> int:
        return self._engine.max_resident

    def step(self, plan: StepPlan) -> StepResult:
        asked = [replace(row, logits="last") if row.sample else row for row in plan.rows]
        result = self._engine.step(StepPlan(tuple(asked)))
        return StepResult(tuple(map(self._scripted, plan.rows, result.rows)))

    def _scripted(self, row: Row, result: RowResult) -> RowResult:
        if row.sample is None:
            return result
        assert result.logits is not None
        assert result.token_id is not None
        place = row.sample.turn, row.sample.k
        self.logits[place], self.drawn[place] = result.logits[-1], result.token_id
        return replace(result, token_id=self._script.get(place, result.token_id))

    def close(self) -> None:
        self._engine.close()


class Reciter:
    """An engine that computes nothing and knows the replies."""

    def __init__(self, spec: EngineSpec, script: dict[Place, int]) -> None:
        self.spec, self._script = spec, script
        self.max_resident = 1

    def step(self, plan: StepPlan) -> StepResult:
        asked = [row.sample for row in plan.rows]
        return StepResult(
            tuple(RowResult(self._script[one.turn, one.k] if one else None) for one in asked)
        )

    def close(self) -> None:
        """Nothing to free."""


@dataclass(frozen=True)
class Served:
    """What is served, by whom, on which store."""

    folder: Path
    store: ConversationStore
    codec: ChatCodec
    exits: AsyncExitStack

    def engine(self) -> OnnxEngine:
        """Each has its own memory: nothing that another one has cached is in it."""
        return OnnxEngine(self.folder, memory_budget_bytes=1 << 26, threads=2, capacity=CAPACITY)

    def replica(self, name: str, engine: Engine) -> Replica:
        store = MortalStore(self.store)
        loop = EngineLoop(engine)
        parts = ReplicaParts(name, engine.spec, "demo", loop, store, self.codec)
        self.exits.push_async_callback(asyncio.to_thread, loop.stop, drain=False, timeout_s=20.0)
        return Replica(store, loop, TurnRunner(parts, Tunables()))


@dataclass(frozen=True)
class Replica:
    """A turn runner that can be killed."""

    store: MortalStore
    loop: EngineLoop
    runner: TurnRunner

    async def die_in(self, call: TurnCall, k: int) -> tuple[int, ...]:
        """Be killed when `k` tokens of the reply are stored; those that its client was shown."""
        items = list[TurnItem]()
        self.store.dies_at = k

        async def read() -> None:
            async for item in self.runner.turn(call):
                if self.store.died.is_set():
                    break
                items.append(item)

        reading = asyncio.create_task(read())
        await self.store.died.wait()
        await asyncio.to_thread(self.loop.stop, drain=False, timeout_s=20.0)
        reading.cancel()
        return tokens_of(items)


@dataclass
class Story:
    """The uninterrupted conversation: its calls and replies, what came before each call, and what was
    drawn, from which logits."""

    recorder: Recorder
    calls: list[TurnCall] = field(default_factory=list)
    replies: list[tuple[int, ...]] = field(default_factory=list)
    before: list[TokenIds] = field(default_factory=list)

    @property
    def cut_turns(self) -> list[tuple[int, int]]:
        """(index of the call, tokens of its reply that are stored when the owner dies)."""
        first = len(self.calls) - len(CUTS)
        return [(first + n, k) for n, k in enumerate(CUTS)]

    def live(self, index: int, k: int) -> list[Logits]:
        """Of the live cache: the logits behind the reply's tokens from number `k` on."""
        return [self.recorder.logits[index + 1, n] for n in range(k, REPLY_TOKENS)]


async def new_conversation(served: Served, replay_windows: int) -> str:
    new = NewConversation(
        new_conversation_id(), TENANT, "demo", SINKS, WINDOW, replay_windows=replay_windows
    )
    await served.store.create(new)
    return new.conversation_id


def passages() -> Iterator[Message]:
    """What the user says: this project's own texts, piece by piece."""
    root = Path(__file__).parent.parent
    words = " ".join((root / name).read_text(encoding="utf-8") for name in PASSAGES).split()
    begin = 0
    for count in itertools.chain(HISTORY_INPUTS, itertools.repeat(CUT_INPUT)):
        yield Message("user", " ".join(words[begin : begin + count]))
        begin += count


async def tell(served: Served) -> Story:
    """The conversation that nobody interrupts: from its first token on in one slot."""
    story = Story(Recorder(served.engine(), {}))
    replica = served.replica("uninterrupted", story.recorder)
    conversation_id = await new_conversation(served, 1)
    ids = np.zeros(0, np.int32)
    closing = served.codec.close_reply([], []).closing_ids
    said = passages()
    for number in range(len(HISTORY_INPUTS) + len(CUTS)):
        message = next(said)
        encode = served.codec.encode_turn if number else served.codec.encode_opening
        call = TurnCall(
            tenant=TENANT,
            conversation_id=conversation_id,
            input_ids=encode([message]),
            messages=(message,),
            history=GENESIS,
            sampling=SAMPLING,
            max_tokens=REPLY_TOKENS,
            ignore_eos=True,
            key=f"turn {number + 1}",
        )
        done = (await run_turn(replica.runner, call))[-1]
        assert isinstance(done, TurnDone), done
        assert done.usage.recovery == "none"
        reply = tuple(done.output_ids.tolist())
        assert len(reply) == REPLY_TOKENS
        story.calls.append(call)
        story.replies.append(reply)
        story.before.append(ids)
        ids = np.concatenate([ids, call.input_ids, done.output_ids, closing])
    # Not even the deepest replay sees the first tokens.
    assert len(story.before[-len(CUTS)]) > SINKS + (DEEPEST + 1) * WINDOW
    return story


def noise_floor(served: Served, story: Story) -> float:
    """Mean KL of a cache that has run all the same tokens, in other chunks."""
    engine = served.engine()
    row, length = row_for(window_of(engine.spec, SINKS)), 0
    divergences = list[float]()

    def run(tokens: TokenIds) -> Logits:
        nonlocal length
        step = replace(row, start=length, tokens=tokens, logits="last")
        (result,) = engine.step(StepPlan((step,))).rows
        length += len(tokens)
        assert result.logits is not None
        last: Logits = result.logits[-1]
        return last

    for index, k in story.cut_turns:
        reply = np.array(story.replies[index], np.int32)
        ids = np.concatenate([story.before[index], story.calls[index].input_ids, reply])
        end = len(ids) - REPLY_TOKENS + k
        while length < end:
            logits = run(ids[length : min(end, length + FLOOR_CHUNK)])
        found = [logits, *(run(reply[n : n + 1]) for n in range(k, REPLY_TOKENS - 1))]
        divergences += map(kl_divergence, story.live(index, k), found)
    engine.close()
    return float(np.mean(divergences))


@dataclass(frozen=True)
class Resumed:
    """`kl`: mean, live cache against the heirs'. `same`: the part of their tokens that the heirs, left to
    themselves, would have said too."""

    kl: float
    same: float


async def interrupted(served: Served, story: Story, windows: int) -> Resumed:
    """The same conversation with `windows` of replay; in each of its last turns the owner dies."""
    script = story.recorder.drawn
    conversation_id = await new_conversation(served, windows)
    reciter = served.replica("reciter", Reciter(story.recorder.spec, script))
    for call in story.calls[: -len(CUTS)]:
        items = await run_turn(reciter.runner, replace(call, conversation_id=conversation_id))
        assert isinstance(items[-1], TurnDone), items[-1]
    owner = served.replica("owner", Recorder(served.engine(), script))
    divergences, same = list[float](), list[bool]()
    for index, k in story.cut_turns:
        call = replace(story.calls[index], conversation_id=conversation_id)
        shown = await owner.die_in(call, k)
        record = await served.store.get(TENANT, conversation_id)
        assert (record.turn, record.running) == (index, True)  # the dead owner's claim
        recorder = Recorder(served.engine(), script)
        heir = served.replica(f"heir {index}", recorder)
        items = await run_turn(heir.runner, replace(call, steal=True, shown_ids=shown))
        accepted, done = items[0], items[-1]
        assert isinstance(accepted, TurnAccepted)
        assert isinstance(done, TurnDone), done
        assert (accepted.recovery, done.usage.recovery) == ("replay", "replay")
        restored = SINKS + windows * WINDOW + len(call.input_ids) + k
        assert done.usage.prefill_tokens == restored
        # The answer goes on: what is stored is not drawn again, nothing is missing or repeated.
        assert list(recorder.drawn) == [(index + 1, n) for n in range(k, REPLY_TOKENS)]
        assert shown + tokens_of(items, len(shown)) == story.replies[index]
        assert tuple(done.output_ids.tolist()) == story.replies[index]
        divergences += map(kl_divergence, story.live(index, k), recorder.logits.values())
        same += [script[place] == token for place, token in recorder.drawn.items()]
        owner = heir
    return Resumed(float(np.mean(divergences)), float(np.mean(same)))


def measured(
    home: Path, url: str, weights: WeightFormat, depths: tuple[int, ...]
) -> tuple[float, dict[int, Resumed]]:
    """The noise floor, and what each depth of replay gives, in one run."""
    folder = ensure_demo_engine(home, BuildOptions(weight_format=weights))

    async def run() -> tuple[float, dict[int, Resumed]]:
        async with AsyncExitStack() as exits:
            store = await RedisStore.connect(url)
            exits.push_async_callback(store.close)
            served = Served(folder, store, ChatCodec.load(folder), exits)
            story = await tell(served)
            floor = await asyncio.to_thread(noise_floor, served, story)
            found = {windows: await interrupted(served, story, windows) for windows in depths}
        print(f"{weights}: noise floor {floor:.1e}, {found}")
        return floor, found

    return asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


@pytest.mark.slow
def test_8_bit_replies_after_a_kill_are_at_the_noise_floor(
    cache_folder: Path, redis_url: str
) -> None:
    floor, found = measured(cache_folder, redis_url, "int8", (1, 4))
    assert floor > 0
    assert found[4].kl <= BAR * floor
    assert found[1].kl > BAR * floor  # the bar would notice a cache that is too shallow


@pytest.mark.slow
def test_float32_replies_after_a_kill_are_the_same(cache_folder: Path, redis_url: str) -> None:
    """Its floor is so low that the traces beyond 4 windows stand out of it: nobody could see them."""
    floor, found = measured(cache_folder, redis_url, "float32", (1, 4, DEEPEST))
    assert 0 < floor < found[4].kl <= UNSEEN < found[1].kl
    assert found[DEEPEST].kl <= BAR * floor
    assert found[4].same == found[DEEPEST].same == 1.0
