from __future__ import annotations

import itertools
import queue
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from cluster.conversation import ReplayLog
from cluster.restore import plan_restore, retained_ids
from engine.host_tier import HostTier, SlotContent
from engine.loop import EngineLoop
from engine.loop_types import LoopConfig, LoopStopped, Overloaded, TurnHandle, TurnRunning
from engine.protocol import (
    EngineDead,
    RowResult,
    SlotCopy,
    StepPlan,
    StepResult,
    TokenIds,
    TurnFailed,
)
from engine.sampling import SamplingParams
from engine.toy_engine import (
    BYTE_VOCAB,
    END_OF_TURN,
    EOS,
    NoisyToyEngine,
    ToyEngine,
    ToyText,
    byte_spec,
    toy_reply,
)
from engine.turn import (
    Prefill,
    Segment,
    TokenSampled,
    TurnEnded,
    TurnError,
    TurnEvent,
    TurnRequest,
    TurnStarted,
)
from engine.window import SinkWindow

PATIENCE_S = 20.0
SPEC = byte_spec(capacity=24, max_chunk=6)
WINDOW = SinkWindow(4, 20, SPEC.slot_tokens - 4)
RECENT = 2 * WINDOW.window_tokens
NO_IDS = np.zeros(0, np.int32)
PARAMS = SamplingParams(seed=11)


class SteppedToy(ToyEngine):
    """A toy that takes a step only when told to, and keeps the plans."""

    def __init__(
        self, max_resident: int = 4, free_running: bool = False, host_slots: int = 0
    ) -> None:
        super().__init__(SPEC, max_resident, ToyText(stop_period=40), host_slots=host_slots)
        self.plans: list[StepPlan] = []
        self.asked = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.free_running = free_running
        self.sabotage: Callable[[StepPlan, StepResult], StepResult] = lambda plan, result: result

    def step(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        if not self.free_running:
            self.asked.release()
            if not self.go.acquire(timeout=PATIENCE_S):
                raise EngineDead("the test forgot to step")
        return self.sabotage(plan, super().step(plan))

    def run_freely(self) -> None:
        self.free_running = True
        self.go.release()

    def wait_for_step(self) -> StepPlan:
        """The plan of the step that the loop is in now."""
        assert self.asked.acquire(timeout=PATIENCE_S)
        return self.plans[-1]

    def finish_step(self) -> StepPlan:
        """Let the current step end; the plan of the next one."""
        self.go.release()
        return self.wait_for_step()


@dataclass
class Client:
    """A conversation as its replica sees it: log, head, and the events of the running turn."""

    loop: EngineLoop
    name: str
    tokens: list[int] = field(default_factory=list)
    turn: int = 0
    head: str = "head 0"
    events: queue.Queue[TurnEvent] = field(default_factory=queue.Queue)
    input_ids: TokenIds = field(default_factory=lambda: NO_IDS)

    @property
    def log(self) -> ReplayLog:
        empty = ReplayLog(NO_IDS, NO_IDS, 0)
        return empty.advanced(np.array(self.tokens, np.int32), WINDOW.sink_tokens, RECENT)

    def request(self, num_input: int = 9, max_tokens: int = 7) -> TurnRequest:
        rng = np.random.default_rng([self.turn, *self.name.encode()])
        self.input_ids = rng.integers(0, 256, num_input).astype(np.int32)
        log, input_ids = self.log, self.input_ids

        def prefill(resident_length: int | None) -> Prefill:
            plan = plan_restore(log, input_ids, resident_length)
            segments = tuple(Segment(one.start, one.tokens) for one in plan.segments)
            return Prefill(segments, plan.window_start, plan.recovery)

        return TurnRequest(
            conversation_id=self.name,
            turn=self.turn,
            head=self.head,
            window=WINDOW,
            token_count=len(self.tokens),
            input_tokens=num_input,
            prefill=prefill,
            retained=retained_ids(log, input_ids),
            sampling=PARAMS,
            max_tokens=max_tokens,
            eos_ids=frozenset({EOS, END_OF_TURN}),
        )

    def submit(self, request: TurnRequest | None = None) -> TurnHandle:
        return self.loop.submit(request or self.request(), self.events.put)

    def next_event(self) -> TurnEvent:
        return self.events.get(timeout=PATIENCE_S)

    def finish(self) -> list[TurnEvent]:
        """All events up to the last one of the turn."""
        events = [self.next_event()]
        while not isinstance(events[-1], TurnEnded | TurnError):
            events.append(self.next_event())
        assert self.events.empty()
        return events

    def commit(self, output: list[int], closing: tuple[int, ...] = ()) -> None:
        self.turn += 1
        self.head = f"head {self.turn}"
        self.tokens += [*self.input_ids.tolist(), *output, *closing]
        self.loop.settle(self.name, self.head, len(self.tokens))

    def expected(self, max_tokens: int = 7) -> list[int]:
        engine = ToyEngine(SPEC, text=ToyText(stop_period=40))
        context = [*self.tokens, *self.input_ids.tolist()]
        stops = frozenset({EOS, END_OF_TURN})
        return toy_reply(engine.model, WINDOW, context, (PARAMS, self.turn), max_tokens, stops)

    def converse(self, num_input: int = 9, max_tokens: int = 7) -> TurnStarted:
        """A whole turn, checked against the oracle and committed."""
        self.submit(self.request(num_input, max_tokens))
        events = self.finish()
        output = tokens_of(events)
        assert output == self.expected(max_tokens)
        started, ended = events[0], events[-1]
        assert isinstance(started, TurnStarted)
        assert isinstance(ended, TurnEnded)
        assert ended.reason == ("stop" if output[-1] == END_OF_TURN else "length")
        assert ended.cached_length == len(self.tokens) + num_input + len(output) - 1
        self.commit(output, closing=(10, 11))
        return started


def tokens_of(events: list[TurnEvent]) -> list[int]:
    sampled = [event for event in events if isinstance(event, TokenSampled)]
    assert [event.k for event in sampled] == list(range(len(sampled)))
    return [event.token_id for event in sampled]


Make = Callable[..., EngineLoop]


@pytest.fixture
def start() -> Iterator[Make]:
    loops: list[tuple[EngineLoop, ToyEngine]] = []

    def make(engine: ToyEngine | None = None, **config: int) -> EngineLoop:
        engine = engine or SteppedToy(free_running=True)
        loop = EngineLoop(engine, LoopConfig(**config))
        loops.append((loop, engine))
        return loop

    yield make
    for loop, engine in loops:
        if isinstance(engine, SteppedToy):
            engine.run_freely()
        assert loop.stop(drain=False, timeout_s=PATIENCE_S)
        loop.check_integrity()


# Turns and conversations.


def test_a_turn_is_started_sampled_and_ended_in_order(start: Make) -> None:
    client = Client(start(), "a")
    client.submit()
    events = client.finish()
    assert events[0] == TurnStarted("none", cached_tokens=0, prefill_tokens=9)
    assert len(events) == 9
    assert tokens_of(events) == client.expected()
    ended = events[-1]
    assert isinstance(ended, TurnEnded)
    assert (ended.reason, ended.cached_length) == ("length", 15)
    assert ended.timings.keys() == {"queue_s", "prefill_s", "ttft_s", "decode_s"}
    assert ended.timings["ttft_s"] == pytest.approx(
        ended.timings["queue_s"] + ended.timings["prefill_s"]
    )


def test_a_long_conversation_prefills_only_its_new_tokens(start: Make) -> None:
    client = Client(start(), "a")
    client.converse()
    for turn in range(1, 30):
        context = len(client.tokens)
        started = client.converse(num_input=3 + turn % 9, max_tokens=1 + turn % 11)
        # The last sampled token and the two closing ids were not in the cache yet; what has slid
        # out of the window is there no more.
        assert started == TurnStarted("none", min(context - 3, 24), 3 + turn % 9 + 3)


def test_a_turn_says_exactly_what_the_engine_is_asked(start: Make) -> None:
    engine = SteppedToy(free_running=True)
    client = Client(start(engine), "a")
    params = replace(PARAMS, repetition_penalty=1.3)
    client.submit(replace(client.request(), sampling=params, turn=5))
    output = tokens_of(client.finish())
    inputs = client.input_ids.tolist()
    rows = [row for plan in engine.plans for row in plan.rows]
    assert [(row.start, row.tokens.tolist()) for row in rows] == [
        (0, inputs[:6]),
        (6, inputs[6:]),
        *((9 + k, [token]) for k, token in enumerate(output[:-1])),
    ]
    assert rows[0].sample is None
    for k, row in enumerate(rows[1:]):
        assert row.sample is not None
        assert (row.sample.params, row.sample.turn, row.sample.k) == (params, 5, k)
        assert row.sample.history.tolist() == inputs + output[:k]
        assert row.sample.history.dtype == np.int32


def test_more_conversations_than_slots_all_stay_right(start: Make) -> None:
    loop = start(SteppedToy(max_resident=3, free_running=True), max_running=3)
    clients = [Client(loop, name) for name in "abcdefgh"]
    failures: list[BaseException] = []

    def chat(client: Client) -> None:
        try:
            for turn in range(12):
                client.converse(num_input=2 + turn, max_tokens=5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=chat, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert failures == []
    stats = loop.stats()
    assert (stats.running, stats.waiting, stats.unsettled) == (0, 0, 0)
    assert stats.clean_slots + stats.free_slots == 3
    assert stats.evicted_slots > 0


def test_a_cold_conversation_is_restored_whole_or_from_its_recent_windows(start: Make) -> None:
    engine = SteppedToy(max_resident=1, free_running=True)
    loop = start(engine)
    client, other = Client(loop, "a"), Client(loop, "b")
    client.converse()
    other.converse()
    started = client.converse()
    assert (started.recovery, started.cached_tokens) == ("exact", 0)
    for _ in range(6):
        client.converse()
    other.converse()
    context = len(client.tokens)
    started = client.converse(num_input=5)
    assert started == TurnStarted("replay", 0, WINDOW.sink_tokens + RECENT + 5)
    replayed = [row for plan in engine.plans for row in plan.rows if row.window_start]
    assert {row.window_start for row in replayed} == {context - RECENT}
    # The slot still knows what it lacks when the next turn finds it warm.
    assert client.converse().recovery == "none"
    assert engine.plans[-1].rows[0].window_start == context - RECENT


def test_a_conversation_at_another_head_starts_cold(start: Make) -> None:
    client = Client(start(), "a")
    client.converse()
    client.head = "forked"
    started = client.converse()
    assert (started.recovery, started.cached_tokens) == ("exact", 0)


def test_a_cut_reply_rewinds_the_slot(start: Make) -> None:
    client = Client(start(), "a")
    for _ in range(9):
        client.submit(client.request(max_tokens=12))
        output = tokens_of(client.finish())
        context = len(client.tokens)
        client.commit(output[:4])
        (resident,) = client.loop.stats().residents
        assert resident.length == context + 9 + min(len(output) - 1, 4)
    assert client.converse().recovery == "none"


# Going on where another engine stopped.


def resumed(client: Client, request: TurnRequest, output: list[int]) -> TurnRequest:
    """The same turn after `output` was sampled for it elsewhere."""
    log, ids = client.log, np.array([*client.input_ids.tolist(), *output], np.int32)

    def prefill(resident_length: int | None) -> Prefill:
        plan = plan_restore(log, ids, resident_length)
        segments = tuple(Segment(one.start, one.tokens) for one in plan.segments)
        return Prefill(segments, plan.window_start, plan.recovery)

    return replace(request, prefill=prefill, output_ids=np.array(output, np.int32))


def sampled_after(events: list[TurnEvent], k: int) -> list[int]:
    sampled = [event for event in events if isinstance(event, TokenSampled)]
    assert [event.k for event in sampled] == list(range(k, k + len(sampled)))
    return [event.token_id for event in sampled]


@pytest.mark.parametrize("noisy", [False, True])
def test_a_turn_cut_anywhere_goes_on_as_if_it_had_not_been(start: Make, noisy: bool) -> None:
    """With every penalty, a seed, and a conversation longer than its window."""
    text = ToyText(words=tuple(b"abcdef "), stop_period=0)
    params = SamplingParams(
        seed=5, temperature=1.0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.9
    )

    def engine() -> ToyEngine:
        return NoisyToyEngine("a", SPEC, 2, text) if noisy else ToyEngine(SPEC, 2, text)

    before = list(range(97, 97 + 70))
    whole = Client(start(engine()), "a", tokens=list(before))
    request = replace(whole.request(num_input=9, max_tokens=40), sampling=params)
    whole.submit(request)
    due = sampled_after(whole.finish(), 0)
    assert len(due) == 40
    plain = replace(request, sampling=SamplingParams(seed=5), conversation_id="b")
    whole.submit(plain)
    # The penalties have something to say here.
    assert sampled_after(whole.finish(), 0) != due
    for k in range(1, 40):
        heir = Client(start(engine()), "a", tokens=list(before))
        heir.request(num_input=9, max_tokens=40)
        heir.submit(resumed(heir, request, due[:k]))
        events = heir.finish()
        assert sampled_after(events, k) == due[k:], k
        ended = events[-1]
        assert isinstance(ended, TurnEnded)
        assert (ended.reason, ended.cached_length) == ("length", 70 + 9 + 39)
        assert ended.timings.keys() == {"queue_s", "prefill_s", "ttft_s", "decode_s"}
        heir.commit(due, closing=(10, 11))
        assert heir.loop.stats().clean_slots == 1


def test_a_resumed_turn_that_is_discarded_takes_its_slot_back_to_where_it_began(
    start: Make,
) -> None:
    client = Client(start(), "a")
    client.converse()
    request = client.request(num_input=3, max_tokens=9)
    due = client.expected(9)
    client.submit(resumed(client, request, due[:4]))
    started = client.finish()[0]
    # The slot was resident: only what it lacks is run, the output so far included.
    assert started == TurnStarted("none", 15, 3 + 3 + 4)
    client.loop.discard("a")
    # All that is committed, and nothing else, is still there.
    assert client.converse(num_input=3) == TurnStarted("none", 18, 3)


@pytest.mark.parametrize("output", [[1] * 7, [1] * 8, [-1], [BYTE_VOCAB]])
def test_output_that_leaves_nothing_to_sample_or_is_no_output_is_refused(
    start: Make, output: list[int]
) -> None:
    client = Client(start(), "a")
    request = client.request(max_tokens=7)
    if len(output) >= 7:
        with pytest.raises(ValueError, match="more than there are output_ids"):
            client.submit(resumed(client, request, output))
    else:
        client.submit(resumed(client, request, output))
        assert isinstance(client.finish()[-1], TurnError)
    client.converse()


def test_output_that_is_not_prefilled_fails_its_turn(start: Make) -> None:
    client = Client(start(), "a")
    request = client.request(max_tokens=7)
    client.submit(replace(request, output_ids=np.array([1], np.int32)))
    error = client.finish()[-1]
    assert isinstance(error, TurnError)
    assert "what there is to run at 10" in error.message


def test_the_owner_is_woken_once_a_step(start: Make) -> None:
    engine = SteppedToy()
    loop = start(engine)
    clients = [Client(loop, name) for name in "abc"]
    wakes: list[int] = []
    loop.notify(lambda: wakes.append(sum(client.events.qsize() for client in clients)))
    for client in clients:
        client.submit(client.request(num_input=4, max_tokens=3))
        if client is clients[0]:
            engine.wait_for_step()
    engine.run_freely()
    for client in clients:
        events = [client.next_event() for _ in range(5)]
        assert isinstance(events[-1], TurnEnded)
    # All events of a step had come when it was told of them, and no step was told of twice.
    assert 1 < len(wakes) <= 2 * len(engine.plans)
    loop.notify(raise_wake)
    for client in clients:
        client.loop.discard(client.name)
    clients[0].converse()


def raise_wake() -> None:
    raise RuntimeError("nobody listens")


# Ends.


def test_eos_is_reported_and_ends_the_turn(start: Make) -> None:
    client = Client(start(), "a")
    request = client.request(max_tokens=50)
    wanted = client.expected(50)
    eos = wanted[10]
    client.submit(replace(request, eos_ids=frozenset({eos})))
    events = client.finish()
    output = tokens_of(events)
    assert output == wanted[: wanted.index(eos) + 1]
    ended = events[-1]
    assert isinstance(ended, TurnEnded)
    assert (ended.reason, ended.cached_length) == ("stop", 9 + len(output) - 1)


class StopAfter:
    def __init__(self, count: int) -> None:
        self.count = count
        self.pushed: list[int] = []

    def push(self, token_id: int) -> bool:
        self.pushed.append(token_id)
        return len(self.pushed) == self.count


def test_a_stop_string_ends_the_turn(start: Make) -> None:
    client = Client(start(), "a")
    stop = StopAfter(3)
    client.submit(replace(client.request(), stop=stop))
    events = client.finish()
    assert tokens_of(events) == stop.pushed == client.expected()[:3]
    assert isinstance(events[-1], TurnEnded)
    assert events[-1].reason == "stop"


def test_cancelling_frees_the_row_at_the_next_step(start: Make) -> None:
    engine = SteppedToy()
    loop = start(engine)
    client, other = Client(loop, "a"), Client(loop, "b")
    handle = client.submit(client.request(num_input=4))
    engine.wait_for_step()
    other.submit(other.request(num_input=4))
    assert [row.kv_slot for row in engine.finish_step().rows] == [0, 1]
    handle.cancel()
    assert [row.kv_slot for row in engine.finish_step().rows] == [1]
    events = client.finish()
    # The token of the step during which it was cancelled is not reported.
    assert tokens_of(events) == client.expected()[:1]
    assert isinstance(events[-1], TurnEnded)
    assert (events[-1].reason, events[-1].cached_length) == ("cancelled", 5)
    assert loop.stats().unsettled == 1
    engine.run_freely()
    assert tokens_of(other.finish()) == other.expected()
    loop.discard("a")
    loop.discard("b")
    assert client.converse().recovery == "none"


def test_a_waiting_turn_can_be_cancelled(start: Make) -> None:
    engine = SteppedToy(max_resident=1)
    loop = start(engine)
    first, second = Client(loop, "a"), Client(loop, "b")
    first.submit()
    engine.wait_for_step()
    second.submit()
    loop.cancel("b")
    engine.run_freely()
    first.finish()
    (ended,) = second.finish()
    assert ended == TurnEnded("cancelled", 0, {})
    loop.settle("b", "h", 5)
    loop.discard("b")
    loop.discard("a")
    second.converse()


def test_a_turn_cancelled_before_its_first_token_ran_keeps_what_was_resident(start: Make) -> None:
    engine = SteppedToy(free_running=True)
    loop = start(engine, max_running=2, prefill_tokens=1)
    first, second = Client(loop, "a"), Client(loop, "b")
    second.converse()
    engine.free_running = False
    first.submit()
    engine.wait_for_step()
    second.submit()
    assert [row.kv_slot for row in engine.finish_step().rows] == [1]
    loop.cancel("b")
    engine.run_freely()
    events = second.finish()
    assert isinstance(events[-1], TurnEnded)
    assert (events[-1].reason, events[-1].cached_length) == ("cancelled", 15)
    loop.discard("b")
    assert second.converse() == TurnStarted("none", 15, 12)


def test_cancelling_a_turn_that_has_ended_changes_nothing(start: Make) -> None:
    client = Client(start(), "a")
    handle = client.submit()
    output = tokens_of(client.finish())
    handle.cancel()
    client.loop.cancel("nobody")
    client.commit(output, closing=(10, 11))
    handle.cancel()
    assert client.converse().cached_tokens == 15


def test_a_discarded_turn_leaves_the_conversation_as_it_was(start: Make) -> None:
    client = Client(start(), "a")
    for _ in range(8):
        client.converse()
    client.submit(client.request(num_input=1, max_tokens=5))
    client.finish()
    client.loop.discard("a")
    assert client.converse() == TurnStarted("none", 24, 9)


def test_discarding_a_running_turn_silences_it(start: Make) -> None:
    engine = SteppedToy()
    client = Client(start(engine), "a")
    client.submit(client.request(max_tokens=1000))
    engine.wait_for_step()
    assert isinstance(client.next_event(), TurnStarted)
    client.loop.discard("a")
    engine.run_freely()
    # A new turn of the same conversation waits for the old one to leave its slot.
    client.converse()
    assert client.loop.stats().unsettled == 0


def test_turns_wait_for_a_slot_in_the_order_they_came(start: Make) -> None:
    engine = SteppedToy(max_resident=1)
    loop = start(engine)
    clients = [Client(loop, name) for name in "abc"]
    order: list[str] = []
    for client in clients:

        def note(event: TurnEvent, client: Client = client) -> None:
            if isinstance(event, TurnStarted):
                order.append(client.name)
            client.events.put(event)

        loop.submit(client.request(), note)
        if client is clients[0]:
            engine.wait_for_step()
    assert loop.stats().waiting == 2
    engine.run_freely()
    for client in clients:
        output = tokens_of(client.finish())
        assert output == client.expected()
        client.commit(output)
    assert order == ["a", "b", "c"]


def test_a_turn_that_waits_finds_its_slot_when_it_gets_there(start: Make) -> None:
    engine = SteppedToy(max_resident=3, free_running=True)
    loop = start(engine, max_running=1)
    warm, idle, busy, new = (Client(loop, name) for name in ("warm", "idle", "busy", "new"))
    warm.converse()
    idle.converse()
    engine.free_running = False
    busy.submit()
    engine.wait_for_step()
    new.submit()
    warm.submit()
    engine.run_freely()
    # The newcomer takes the slot of `idle`, though that of `warm` was used longer ago.
    new.finish()
    assert warm.next_event() == TurnStarted("none", cached_tokens=15, prefill_tokens=12)


# Host memory.


def test_an_evicted_conversation_comes_back_from_host_memory(start: Make) -> None:
    engine = SteppedToy(max_resident=1, free_running=True, host_slots=1)
    loop = start(engine)
    client, other = Client(loop, "a"), Client(loop, "b")
    for _ in range(5):
        client.converse()
    other.converse()
    context = len(client.tokens)
    assert client.converse(num_input=4) == TurnStarted("none", min(context - 3, 24), 4 + 3)
    # The only host slot was the returning conversation's own, so the other one was not kept.
    assert other.converse().recovery == "exact"
    stats = loop.stats()
    assert (stats.host_hits, stats.host_slots_used, stats.host_slots) == (1, 1, 1)
    copies = [copy for plan in engine.plans for copy in plan.copies]
    assert copies == [
        SlotCopy("save", 0, 0),
        SlotCopy("restore", 0, 0),
        SlotCopy("save", 0, 0),
    ]


def test_many_conversations_change_places_and_all_stay_right(start: Make) -> None:
    loop = start(SteppedToy(max_resident=2, free_running=True, host_slots=3), max_running=2)
    clients = [Client(loop, name) for name in "abcdefg"]
    rng = np.random.default_rng(3)
    recoveries = [
        clients[rng.integers(0, len(clients))].converse(2 + turn % 7, 5).recovery
        for turn in range(120)
    ]
    loop.check_integrity()
    assert recoveries.count("none") > 60
    assert loop.stats().host_hits > 30
    assert {"replay", "exact"} & set(recoveries)


def test_a_stale_head_is_never_restored(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = start(SteppedToy(max_resident=1, free_running=True, host_slots=2))

    def after_a_turn_elsewhere(name: str) -> TurnStarted:
        client, other = Client(loop, name), Client(loop, f"not {name}")
        client.converse()
        other.converse()
        client.tokens[3] ^= 1
        client.head = "elsewhere"
        return client.converse()

    assert after_a_turn_elsewhere("a").recovery == "exact"
    assert loop.stats().host_hits == 0
    take = HostTier.take

    def take_whatever_is_there(
        tier: HostTier, name: str, head: str, window: SinkWindow
    ) -> tuple[int, SlotContent] | None:
        kept = tier._kept.get(name)
        return take(tier, name, kept[1].head if kept else head, window)

    monkeypatch.setattr(HostTier, "take", take_whatever_is_there)
    with pytest.raises(AssertionError):
        after_a_turn_elsewhere("b")


def test_copies_made_after_the_rows_are_found_out(start: Make) -> None:
    class Late(SteppedToy):
        def step(self, plan: StepPlan) -> StepResult:
            result = super().step(replace(plan, copies=()))
            super().step(StepPlan((), plan.copies))
            return result

    loop = start(Late(max_resident=1, free_running=True, host_slots=2))
    client, other = Client(loop, "a"), Client(loop, "b")
    client.converse()
    other.converse()
    with pytest.raises(AssertionError):
        client.converse()


def test_copies_of_a_turn_that_never_ran_are_made_before_the_next_one(start: Make) -> None:
    engine = SteppedToy(max_resident=1, free_running=True, host_slots=2)
    loop = start(engine)
    client, other = Client(loop, "a"), Client(loop, "b")
    client.converse()

    def impossible(resident_length: int | None) -> Prefill:
        raise RuntimeError("no plan")

    other.submit(replace(other.request(), prefill=impossible))
    assert isinstance(other.finish()[-1], TurnError)
    assert client.converse().recovery == "none"
    (copies,) = [plan.copies for plan in engine.plans if plan.copies]
    assert copies == (SlotCopy("save", 0, 0), SlotCopy("restore", 0, 0))


# Fair shares.


def test_decoding_goes_on_beside_a_long_restore(start: Make) -> None:
    engine = SteppedToy()
    loop = start(engine)
    talker = Client(loop, "a")
    talker.submit(talker.request(num_input=2, max_tokens=40))
    engine.wait_for_step()
    restored = Client(loop, "b", tokens=list(range(200)))
    restored.submit(restored.request(num_input=1))
    seen = []
    for _ in range(9):
        plan = engine.finish_step()
        seen.append([(row.kv_slot, len(row.tokens)) for row in plan.rows])
    # 4 sinks, then 40 recent ids and the input.
    assert seen == [
        [(0, 1), (1, 4)],
        *[[(0, 1), (1, 6)]] * 6,
        [(0, 1), (1, 5)],
        [(0, 1), (1, 1)],
    ]


# Refusals.


def test_a_full_queue_refuses(start: Make) -> None:
    engine = SteppedToy(max_resident=1)
    loop = start(engine, max_waiting=2)
    clients = [Client(loop, name) for name in "abcd"]
    clients[0].submit()
    engine.wait_for_step()
    clients[1].submit()
    clients[2].submit()
    with pytest.raises(Overloaded):
        clients[3].submit()
    stats = loop.stats()
    assert (stats.running, stats.waiting, stats.free_slots) == (1, 2, 0)
    loop.discard("b")
    engine.finish_step()
    clients[3].submit()


def test_one_turn_of_a_conversation_at_a_time(start: Make) -> None:
    client = Client(start(), "a")
    client.submit()
    with pytest.raises(TurnRunning):
        client.submit()
    output = tokens_of(client.finish())
    with pytest.raises(TurnRunning):
        client.submit()
    client.commit(output)
    client.converse()


def test_a_running_turn_cannot_be_settled(start: Make) -> None:
    engine = SteppedToy()
    client = Client(start(engine), "a")
    client.submit()
    engine.wait_for_step()
    with pytest.raises(TurnRunning):
        client.loop.settle("a", "h", 3)


def test_a_turn_without_output_is_refused(start: Make) -> None:
    client = Client(start(), "a")
    with pytest.raises(ValueError, match="max_tokens"):
        client.submit(client.request(max_tokens=0))


@pytest.mark.parametrize("window", [SinkWindow(4, 20, 37), SinkWindow(13, 11, 20)])
def test_a_window_that_does_not_fit_is_refused(start: Make, window: SinkWindow) -> None:
    client = Client(start(), "a")
    with pytest.raises(ValueError, match="too small"):
        client.submit(replace(client.request(), window=window))


# Failures.


def fail_row(kv_slot: int, result: RowResult) -> Callable[[StepPlan, StepResult], StepResult]:
    def sabotage(plan: StepPlan, good: StepResult) -> StepResult:
        bad = [row.kv_slot == kv_slot and row.sample is not None for row in plan.rows]
        pairs = zip(bad, good.rows, strict=True)
        return StepResult(tuple(result if is_bad else ok for is_bad, ok in pairs))

    return sabotage


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (RowResult(failed="the model's logits are not finite"), "logits are not finite"),
        (RowResult(), "sampled no token"),
    ],
)
def test_a_failing_row_fails_its_turn_alone(start: Make, bad: RowResult, message: str) -> None:
    engine = SteppedToy(free_running=True)
    loop = start(engine)
    first, second = Client(loop, "a"), Client(loop, "b")
    first.converse()
    second.converse()
    engine.sabotage = fail_row(0, bad)
    first.submit()
    second.submit()
    assert tokens_of(second.finish()) == second.expected()
    error = first.finish()[-1]
    assert isinstance(error, TurnError)
    assert message in error.message
    assert not error.fatal
    # What its slot holds cannot be trusted.
    assert loop.stats().free_slots == 3
    engine.sabotage = lambda plan, result: result
    loop.discard("a")
    assert first.converse().cached_tokens == 0


def test_a_step_that_raises_turn_failed_fails_its_rows_only(start: Make) -> None:
    engine = SteppedToy(free_running=True)
    client = Client(start(engine), "a")

    def sabotage(plan: StepPlan, result: StepResult) -> StepResult:
        raise TurnFailed("not this one")

    engine.sabotage = sabotage
    client.submit()
    assert client.finish()[-1] == TurnError("not this one", fatal=False)
    engine.sabotage = lambda plan, result: result
    client.converse()


def raise_dead(plan: StepPlan, result: StepResult) -> StepResult:
    raise EngineDead("out of memory")


def raise_surprise(plan: StepPlan, result: StepResult) -> StepResult:
    raise ZeroDivisionError("surprise")


def lose_a_row(plan: StepPlan, result: StepResult) -> StepResult:
    return StepResult(())


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (raise_dead, "EngineDead: out of memory"),
        (raise_surprise, "ZeroDivisionError: surprise"),
        (lose_a_row, "another number of rows"),
    ],
)
def test_a_dead_engine_fails_every_turn_and_takes_no_more(
    start: Make, sabotage: Callable[[StepPlan, StepResult], StepResult], message: str
) -> None:
    engine = SteppedToy(max_resident=2)
    loop = start(engine)
    clients = [Client(loop, name) for name in "abc"]
    for client in clients:
        client.submit()
        if client is clients[0]:
            engine.wait_for_step()
    engine.sabotage = sabotage
    engine.run_freely()
    for client in clients:
        error = client.finish()[-1]
        assert isinstance(error, TurnError)
        assert error.fatal
        assert message in error.message
    with pytest.raises(LoopStopped, match=message):
        clients[0].submit()
    assert message in (loop.stats().dead or "")
    loop.discard("a")
    assert loop.stop(timeout_s=PATIENCE_S)
    with pytest.raises(EngineDead, match="closed"):
        ToyEngine.step(engine, StepPlan(()))


@pytest.mark.parametrize("kind", [TurnStarted, TokenSampled, TurnEnded])
def test_a_callback_that_raises_loses_its_turn_only(start: Make, kind: type[TurnEvent]) -> None:
    engine = SteppedToy()
    loop = start(engine)
    broken, other = Client(loop, "a"), Client(loop, "b")

    def callback(event: TurnEvent) -> None:
        if isinstance(event, kind):
            raise RuntimeError("the client went away")

    loop.submit(broken.request(), callback)
    engine.wait_for_step()
    other.submit()
    engine.run_freely()
    assert tokens_of(other.finish()) == other.expected()
    loop.discard("b")
    broken.converse()
    assert loop.stats().unsettled == 0


class RaisingStop:
    def push(self, token_id: int) -> bool:
        raise RuntimeError("bad text")


def raising_prefill(resident_length: int | None) -> Prefill:
    raise RuntimeError("no log")


def short_prefill(resident_length: int | None) -> Prefill:
    return Prefill((Segment(0, np.zeros(3, np.int32)),), 0, "none")


def overlapping_prefill(resident_length: int | None) -> Prefill:
    halves = (Segment(0, np.zeros(6, np.int32)), Segment(5, np.zeros(4, np.int32)))
    return Prefill(halves, 0, "none")


def foreign_prefill(resident_length: int | None) -> Prefill:
    return Prefill((Segment(0, np.full(9, SPEC.model.vocab_size, np.int32)),), 0, "none")


def empty_prefill(resident_length: int | None) -> Prefill:
    return Prefill((Segment(9, NO_IDS),), 0, "none")


@pytest.mark.parametrize(
    "prefill", [raising_prefill, short_prefill, overlapping_prefill, foreign_prefill, empty_prefill]
)
def test_a_prefill_that_cannot_be_planned_fails_its_turn(
    start: Make, prefill: Callable[[int | None], Prefill]
) -> None:
    client = Client(start(), "a")
    client.submit(replace(client.request(), prefill=prefill))
    (error,) = client.finish()
    assert isinstance(error, TurnError)
    assert "the prefill cannot be planned" in error.message
    assert not error.fatal
    client.converse()


def test_retained_ids_outside_the_vocabulary_fail_their_turn(start: Make) -> None:
    client = Client(start(), "a")
    client.submit(replace(client.request(), retained=np.array([3, -1], np.int32)))
    (error,) = client.finish()
    assert isinstance(error, TurnError)
    assert "a token id is not in 0..258" in error.message


def test_a_stop_check_that_raises_fails_its_turn(start: Make) -> None:
    client = Client(start(), "a")
    client.submit(replace(client.request(), stop=RaisingStop()))
    assert client.finish()[-1] == TurnError("the stop check raised: bad text", fatal=False)
    client.converse()


# Stopping.


def test_draining_ends_running_and_waiting_turns_first(start: Make) -> None:
    engine = SteppedToy(max_resident=1)
    loop = start(engine)
    first, second = Client(loop, "a"), Client(loop, "b")
    first.submit()
    engine.wait_for_step()
    second.submit()
    assert not loop.stop(timeout_s=0)
    with pytest.raises(LoopStopped, match="stopping"):
        Client(loop, "c").submit()
    engine.run_freely()
    output = tokens_of(first.finish())
    assert output == first.expected()
    first.commit(output)
    assert tokens_of(second.finish()) == second.expected()
    assert loop.stop(timeout_s=PATIENCE_S)
    assert loop.stop()


def test_stopping_now_fails_what_is_left(start: Make) -> None:
    engine = SteppedToy(max_resident=1)
    loop = start(engine)
    first, second = Client(loop, "a"), Client(loop, "b")
    first.submit()
    engine.wait_for_step()
    second.submit()
    assert not loop.stop(drain=False, timeout_s=0)
    engine.run_freely()
    assert first.finish()[-1] == TurnError("the engine has stopped", fatal=True)
    assert second.finish() == [TurnError("the engine has stopped", fatal=True)]


def test_an_idle_loop_stops(start: Make) -> None:
    assert start().stop(timeout_s=PATIENCE_S)


def test_a_callback_may_call_the_loop(start: Make) -> None:
    client = Client(start(), "a")
    loop = client.loop

    def on_event(event: TurnEvent) -> None:
        if isinstance(event, TokenSampled) and event.k == 2:
            loop.cancel("a")
        if isinstance(event, TurnEnded):
            loop.discard("a")
            assert loop.stats().free_slots == 4
        client.events.put(event)

    loop.submit(client.request(), on_event)
    assert len(tokens_of(client.finish())) == 3
    client.converse()


# Figures.


def test_stats_count(start: Make) -> None:
    engine = SteppedToy()
    loop = start(engine)
    client = Client(loop, "a")
    client.submit(client.request(num_input=8, max_tokens=3))
    engine.wait_for_step()
    stats = loop.stats()
    assert (stats.running, stats.num_steps, stats.free_slots, stats.num_slots) == (1, 0, 3, 4)
    assert stats.step_running_s > 0
    engine.run_freely()
    output = tokens_of(client.finish())
    assert loop.stats().unsettled == 1
    client.commit(output)
    stats = loop.stats()
    assert (stats.running, stats.unsettled, stats.clean_slots) == (0, 0, 1)
    assert (stats.num_steps, stats.prefilled_tokens, stats.generated_tokens) == (4, 8, 3)
    assert stats.step_running_s == 0
    assert stats.dead is None
    assert [(r.conversation_id, r.head, r.length) for r in stats.residents] == [("a", "head 1", 10)]
    assert loop.stats(max_residents=0).residents == ()


def test_the_clock_is_the_callers() -> None:
    ticks = itertools.count()
    engine = ToyEngine(SPEC)
    loop = EngineLoop(engine, clock=lambda: float(next(ticks)))
    client = Client(loop, "a")
    client.submit(client.request(num_input=3, max_tokens=2))
    ended = client.finish()[-1]
    assert loop.stop(timeout_s=PATIENCE_S)
    assert isinstance(ended, TurnEnded)
    assert all(value == int(value) >= 1 for value in ended.timings.values())


# Everything at once.


def test_a_crowd_that_cancels_discards_and_commits_leaves_no_trace(start: Make) -> None:
    loop = start(SteppedToy(max_resident=5, free_running=True), max_running=4, max_waiting=100)
    failures: list[BaseException] = []

    def chat(number: int) -> None:
        dice = random.Random(number)
        client = Client(loop, f"conversation {number}")
        try:
            for _ in range(25):
                fate = dice.random()
                if fate < 0.5:
                    client.converse(dice.randint(1, 20), dice.randint(1, 12))
                    continue
                request = client.request(dice.randint(1, 20), 50)
                handle = client.submit(replace(request, eos_ids=frozenset()))
                for _ in range(dice.randint(0, 3)):
                    client.next_event()
                if fate < 0.7:
                    loop.discard(client.name)
                    client.events = queue.Queue()
                    continue
                handle.cancel()
                assert isinstance(client.finish()[-1], TurnEnded)
                loop.discard(client.name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=chat, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
        loop.check_integrity()
    assert failures == []
    stats = loop.stats()
    assert (stats.waiting, stats.unsettled, stats.dead) == (0, 0, None)
