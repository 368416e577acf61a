"""What every `ConversationStore` must do. `tests/test_store.py` runs it on each implementation."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import numpy as np
import pytest

from cluster.conversation import (
    GENESIS,
    BeginTurn,
    Checkpoint,
    CommittedTurn,
    Conversation,
    Fence,
    Message,
    NewConversation,
    Ownership,
    TokenIds,
    TurnCommit,
    chain_head,
    history_hash,
    new_conversation_id,
)
from cluster.store import (
    AlreadyExists,
    Conflict,
    ConversationStore,
    Fenced,
    HistoryMatch,
    ModelChanged,
    NotFound,
    RolledBack,
    StoreLimits,
    TurnConflict,
    TurnTooLong,
)

ANN, BOB = "tenant-ann", "tenant-bob"
MODEL = "fingerprint-1"
LEASE_S = 10.0
LIMITS = StoreLimits(ttl_s=1000.0, transcript_messages=10, transcript_bytes=2000, max_lapses=3)


class StoreEnv(Protocol):
    """A store under test, its clock in the test's hands."""

    @property
    def store(self) -> ConversationStore: ...

    async def advance(self, seconds: float) -> None:
        """Let the store's clock go on."""
        ...

    async def restart(self) -> None:
        """The store loses nothing but knows that it was away."""
        ...

    async def save(self) -> object:
        """All that the store keeps, to come back to."""
        ...

    async def roll_back(self, saved: object) -> None:
        """The store restarts with what it kept at the time of `save`; time goes on."""
        ...

    async def record_bytes(self, conversation_id: str) -> int:
        """Size of the record as stored."""
        ...


def ids(*values: int) -> TokenIds:
    return np.array(values, dtype=np.int32)


def new_conversation(**changes: Any) -> NewConversation:
    defaults: dict[str, Any] = {
        "conversation_id": new_conversation_id(),
        "tenant": ANN,
        "fingerprint": MODEL,
        "sink_tokens": 4,
        "window_tokens": 8,
        "replay_windows": 2,
    }
    return NewConversation(**(defaults | changes))


def claim(record: Conversation, **changes: Any) -> BeginTurn:
    defaults: dict[str, Any] = {
        "conversation_id": record.conversation_id,
        "tenant": record.tenant,
        "replica": "replica-1",
        "input_ids": ids(1, 2, 3),
        "fingerprint": MODEL,
        "lease_s": LEASE_S,
    }
    return BeginTurn(**(defaults | changes))


def commit_of(turn: BeginTurn, ownership: Ownership, **changes: Any) -> TurnCommit:
    """A commit whose reply is 7 8 9 and whose hashes follow from the record."""
    record = ownership.conversation
    output_ids = changes.pop("output_ids", ids(7, 8, 9))
    messages = (Message("user", f"q{record.turn}"), Message("assistant", f"a{record.turn}"))
    history = record.history
    for message in changes.get("messages", messages):
        history = history_hash(history, message.role, message.content)
    defaults: dict[str, Any] = {
        "conversation_id": record.conversation_id,
        "tenant": record.tenant,
        "fence": ownership.fence,
        "output_ids": output_ids,
        "head": chain_head(record.head, turn.input_ids, output_ids),
        "history": history,
        "messages": messages,
    }
    return TurnCommit(**(defaults | changes))


async def own(store: ConversationStore, turn: BeginTurn) -> Ownership:
    """A claim that must succeed."""
    ownership = await store.begin(turn)
    assert isinstance(ownership, Ownership)
    return ownership


async def checkpoint(
    store: ConversationStore,
    turn: BeginTurn,
    ownership: Ownership,
    k: int,
    token_ids: TokenIds,
    lease_s: float = LEASE_S,
) -> None:
    """One checkpoint by itself, its answer raised."""
    one = Checkpoint(turn.conversation_id, turn.tenant, ownership.fence, k, token_ids, lease_s)
    [refusal] = await store.checkpoint([one])
    if refusal is not None:
        raise refusal


async def run_turn(store: ConversationStore, record: Conversation, **changes: Any) -> Conversation:
    """A whole turn; `changes` go to the claim, `output_ids` and `messages` to the commit."""
    of_commit = {key: changes.pop(key) for key in ("output_ids", "messages") if key in changes}
    turn = claim(record, **changes)
    return await store.commit(commit_of(turn, await own(store, turn), **of_commit))


async def largest_record(env: StoreEnv, sink_tokens: int, window_tokens: int, turns: int) -> int:
    """The most bytes that a record takes while `turns` turns, each as large as can be, run and end."""
    limits = StoreLimits()
    new = new_conversation(
        sink_tokens=sink_tokens,
        window_tokens=window_tokens,
        replay_windows=4,
        metadata={f"{i:064}": "x" * 550 for i in range(16)},
    )
    record = await env.store.create(new)
    fed = np.arange(limits.input_tokens, dtype=np.int32)
    replied = np.arange(limits.output_tokens, dtype=np.int32)
    sizes = []
    # The key of a turn that another one put an end to stays.
    await own(env.store, claim(record, key="l" * 256))
    await env.advance(LEASE_S + 1)
    for number in range(turns):
        # One by one in the first turn, as an engine makes them; later in bulk, as a repair may.
        step = 1 if number == 0 else 1000
        turn = claim(
            record, input_ids=fed, replica="r" * 200, key=f"{number:0256}", request_hash="h" * 64
        )
        ownership = await own(env.store, turn)
        for k in range(0, len(replied), step):
            await checkpoint(env.store, turn, ownership, k, replied[k : k + step])
        sizes.append(await env.record_bytes(record.conversation_id))
        result = {"x": "y" * (limits.result_bytes - 8)}
        await env.store.commit(commit_of(turn, ownership, output_ids=replied, result=result))
        sizes.append(await env.record_bytes(record.conversation_id))
    known = await env.store.begin(claim(record, key=turn.key, request_hash="h" * 64))
    assert isinstance(known, CommittedTurn)
    np.testing.assert_array_equal(known.reply_ids, replied)
    return max(sizes)


class StoreContract:
    """Subclasses give the fixture `env`."""

    async def test_created_conversation_is_empty_and_unowned(self, env: StoreEnv) -> None:
        new = new_conversation(metadata={"topic": "küche"}, history="ab" * 32)
        record = await env.store.create(new)
        assert await env.store.get(ANN, new.conversation_id) == record
        assert (record.turn, record.token_count, record.owner, record.epoch) == (0, 0, "", 0)
        assert (record.head, record.history, record.running) == (GENESIS, "ab" * 32, False)
        assert (record.sink_tokens, record.window_tokens) == (4, 8)
        assert (record.metadata, record.result) == ({"topic": "küche"}, {})
        assert record.created_s == record.updated_s

    async def test_create_may_be_repeated_but_not_reused(self, env: StoreEnv) -> None:
        new = new_conversation(messages=(Message("system", "be kind"),))
        record = await env.store.create(new)
        assert await env.store.create(new) == record
        assert await env.store.transcript(ANN, new.conversation_id) == (0, list(new.messages))
        for other in ({"tenant": BOB}, {"sink_tokens": 5}, {"metadata": {"a": "b"}}):
            with pytest.raises(AlreadyExists):
                await env.store.create(dataclasses.replace(new, **other))
        await run_turn(env.store, record)
        with pytest.raises(AlreadyExists):
            await env.store.create(new)

    async def test_a_turn_from_begin_to_commit(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        turn = claim(record)
        ownership = await own(env.store, turn)
        running = await env.store.get(ANN, record.conversation_id)
        assert ownership.conversation == running
        assert (running.turn, running.owner, running.running) == (0, "replica-1", True)
        assert ownership.fence == Fence(running.epoch, turn.nonce)
        assert ownership.replay.token_count == 0

        await env.advance(1)
        commit = commit_of(turn, ownership, result={"usage": [1, None, "x"]})
        done = await env.store.commit(commit)
        assert await env.store.get(ANN, record.conversation_id) == done
        assert (done.turn, done.token_count, done.running) == (1, 6, False)
        assert (done.head, done.history) == (commit.head, commit.history)
        assert done.owner == "replica-1"
        assert done.result == {"usage": [1, None, "x"]}
        assert done.updated_s > done.created_s
        assert await env.store.transcript(ANN, record.conversation_id) == (
            0,
            [Message("user", "q0"), Message("assistant", "a0")],
        )

    async def test_only_one_turn_runs(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        await own(env.store, claim(record))
        with pytest.raises(Conflict) as conflict:
            await own(env.store, claim(record, replica="replica-2"))
        assert 0 < conflict.value.retry_after_s <= LEASE_S

    async def test_of_many_begins_at_once_one_wins(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        begins = [env.store.begin(claim(record, replica=f"replica-{i}")) for i in range(8)]
        answers = await asyncio.gather(*begins, return_exceptions=True)
        assert sum(isinstance(answer, Ownership) for answer in answers) == 1
        assert sum(isinstance(answer, Conflict) for answer in answers) == 7

    async def test_a_lost_owner_is_replaced_and_fenced(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        lost_turn = claim(record, input_ids=ids(66, 66))
        lost = await own(env.store, lost_turn)
        await env.advance(LEASE_S + 1)
        idle = await env.store.get(ANN, record.conversation_id)
        assert (idle.running, idle.owner) == (False, "")

        turn = claim(record, replica="replica-2")
        ownership = await own(env.store, turn)
        assert ownership.fence.epoch > lost.fence.epoch
        for late in self.writes_of(env.store, lost_turn, lost):
            with pytest.raises(Fenced):
                await late()
        done = await env.store.commit(commit_of(turn, ownership))
        assert (done.owner, done.token_count) == ("replica-2", 6)
        for late in self.writes_of(env.store, lost_turn, lost):
            with pytest.raises(Fenced):
                await late()
        assert await env.store.get(ANN, record.conversation_id) == done

    async def test_a_late_owner_that_nobody_replaced_still_commits(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        turn = claim(record)
        ownership = await own(env.store, turn)
        await env.advance(LEASE_S * 5)
        assert (await env.store.commit(commit_of(turn, ownership))).turn == 1

    async def test_renew_keeps_the_lease(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        ownership = await own(env.store, claim(record))
        for _ in range(4):
            await env.advance(LEASE_S - 2)
            await env.store.renew(ANN, record.conversation_id, ownership.fence, LEASE_S)
        await env.advance(LEASE_S - 2)
        with pytest.raises(Conflict):
            await own(env.store, claim(record))

    async def test_abort_leaves_no_trace_but_the_epoch(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        before = await run_turn(env.store, record)
        turn = claim(record, replica="replica-2", input_ids=ids(66))
        ownership = await own(env.store, turn)
        await env.store.abort(ANN, record.conversation_id, ownership.fence)
        after = await env.store.get(ANN, record.conversation_id)
        assert after == dataclasses.replace(before, epoch=ownership.fence.epoch)
        with pytest.raises(Fenced):
            await env.store.commit(commit_of(turn, ownership))
        with pytest.raises(Fenced):
            await env.store.renew(ANN, record.conversation_id, ownership.fence, LEASE_S)
        following = await own(env.store, claim(record))
        assert following.replay.recent_ids.tolist() == [8, 9]

    async def test_abort_may_be_repeated_but_does_not_undo_a_commit(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        aborted = await own(env.store, claim(record))
        for _ in range(2):
            await env.store.abort(ANN, record.conversation_id, aborted.fence)
        turn = claim(record)
        ownership = await own(env.store, turn)
        done = await env.store.commit(commit_of(turn, ownership))
        with pytest.raises(Fenced):
            await env.store.abort(ANN, record.conversation_id, ownership.fence)
        assert await env.store.get(ANN, record.conversation_id) == done

    async def test_a_stale_view_is_refused_before_any_work(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        done = await run_turn(env.store, record)
        for stale in ({"expect_turn": 0}, {"expect_turn": 2}, {"expect_head": GENESIS}):
            with pytest.raises(TurnConflict) as conflict:
                await own(env.store, claim(record, **stale))
            assert (conflict.value.turn, conflict.value.head) == (1, done.head)
        await own(env.store, claim(record, expect_turn=1, expect_head=done.head))
        with pytest.raises(TurnConflict):  # waiting for the running turn would not help
            await own(env.store, claim(record, expect_turn=0))

    async def test_another_model_is_refused(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        with pytest.raises(ModelChanged):
            await own(env.store, claim(record, fingerprint="fingerprint-2"))
        assert not (await env.store.get(ANN, record.conversation_id)).running

    async def test_begin_may_be_repeated(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        turn = claim(record, expect_turn=0)
        first = await own(env.store, turn)
        again = await own(env.store, turn)
        assert (again.fence, again.conversation) == (first.fence, first.conversation)
        await env.store.commit(commit_of(turn, first))
        with pytest.raises(Fenced):
            await own(env.store, turn)
        assert not (await env.store.get(ANN, record.conversation_id)).running

    async def test_commit_may_be_repeated(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        turn = claim(record)
        commit = commit_of(turn, await own(env.store, turn))
        done = await env.store.commit(commit)
        assert await env.store.commit(commit) == done
        assert len((await env.store.transcript(ANN, record.conversation_id))[1]) == 2
        await own(env.store, claim(record))
        again = await env.store.commit(commit)
        assert (again.turn, again.head, again.running) == (1, done.head, True)

    async def test_the_whole_fence_counts(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        turn = claim(record)
        ownership = await own(env.store, turn)
        fence = ownership.fence
        for forged, refusal in (
            (Fence(fence.epoch, "other"), Fenced),
            (Fence(fence.epoch - 1, fence.nonce), Fenced),
            (Fence(fence.epoch + 1, fence.nonce), RolledBack),
        ):
            for write in self.writes_of(
                env.store, turn, dataclasses.replace(ownership, fence=forged)
            ):
                with pytest.raises(refusal):
                    await write()
        assert (await env.store.commit(commit_of(turn, ownership))).turn == 1

    async def test_delete_forgets_also_a_running_turn(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        done = await run_turn(env.store, record)
        turn = claim(record)
        ownership = await own(env.store, turn)
        await env.store.delete(ANN, record.conversation_id)
        for call in self.calls_of(env.store, turn, ownership, ANN):
            with pytest.raises(NotFound):
                await call()
        assert await env.store.match_history(ANN, done.history) is None
        assert list(await env.store.list(ANN)) == []

    async def test_a_new_life_under_an_old_id(self, env: StoreEnv) -> None:
        new = new_conversation(messages=(Message("system", "s"),))
        record = await env.store.create(new)
        done = await run_turn(env.store, record)
        turn = claim(record)
        old = await own(env.store, turn)
        await env.store.delete(ANN, new.conversation_id)
        await env.advance(1)
        assert (await env.store.create(new)).turn == 0
        assert await env.store.transcript(ANN, new.conversation_id) == (0, list(new.messages))
        assert await env.store.match_history(ANN, done.history) is None
        ownership = await own(env.store, claim(record))
        assert ownership.fence.epoch > old.fence.epoch
        assert ownership.replay.token_count == 0
        for write in self.writes_of(env.store, turn, old):
            with pytest.raises(Fenced):
                await write()

    async def test_a_foreign_conversation_looks_like_a_missing_one(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        done = await run_turn(env.store, record)
        turn = claim(record)
        ownership = await own(env.store, turn)
        running = await env.store.get(ANN, record.conversation_id)
        foreign_turn = claim(record, tenant=BOB, expect_turn=9, fingerprint="other")
        foreign = await self.refusals(self.calls_of(env.store, foreign_turn, ownership, BOB))
        absent = claim(record, tenant=BOB, conversation_id="conv_" + "0" * 32)
        missing = await self.refusals(self.calls_of(env.store, absent, ownership, BOB))
        assert foreign == [text.replace("0" * 32, record.conversation_id[5:]) for text in missing]
        assert await env.store.match_history(BOB, done.history) is None
        assert list(await env.store.list(BOB)) == []
        with pytest.raises(NotFound):
            await env.store.list(BOB, after=record.conversation_id)
        assert await env.store.get(ANN, record.conversation_id) == running

    async def test_history_leads_to_the_turn_after_which_it_was_true(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        identifier = record.conversation_id
        assert await env.store.match_history(ANN, GENESIS) is None
        first = await run_turn(env.store, record)
        assert await env.store.match_history(ANN, first.history) == HistoryMatch(identifier, 1)
        second = await run_turn(env.store, record)
        # Who repeats the request of the second turn names the history before it.
        assert await env.store.match_history(ANN, first.history) == HistoryMatch(identifier, 1)
        assert await env.store.match_history(ANN, second.history) == HistoryMatch(identifier, 2)
        await run_turn(env.store, record)
        assert await env.store.match_history(ANN, first.history) is None
        assert await env.store.match_history(ANN, second.history) == HistoryMatch(identifier, 2)

        twin = await env.store.create(new_conversation())
        assert (await run_turn(env.store, twin)).history == first.history
        match = HistoryMatch(twin.conversation_id, 1)
        assert await env.store.match_history(ANN, first.history) == match
        third = await env.store.create(new_conversation())
        assert (await run_turn(env.store, third)).history == first.history
        await run_turn(env.store, twin)
        match = HistoryMatch(third.conversation_id, 1)
        assert await env.store.match_history(ANN, first.history) == match

    async def test_history_of_an_earlier_life_does_not_match(self, env: StoreEnv) -> None:
        new = new_conversation()
        record = await env.store.create(new)
        hello = await run_turn(env.store, record)
        await env.store.delete(ANN, new.conversation_id)
        await env.store.create(new)
        for _ in range(2):
            assert await env.store.match_history(ANN, hello.history) is None
            await run_turn(env.store, record, messages=(Message("user", "other"),))
        assert await env.store.match_history(ANN, hello.history) is None

    @pytest.mark.parametrize("sink_tokens", [0, 4, 7])
    async def test_replay_ids_are_the_ends_of_the_token_log(
        self, env: StoreEnv, sink_tokens: int
    ) -> None:
        new = new_conversation(sink_tokens=sink_tokens, window_tokens=8, replay_windows=3)
        record = await env.store.create(new)
        random = np.random.default_rng(sink_tokens)
        everything = ids()
        for length in (1, 2, 0, 3, 5, 30, 0, 7, 24, 1, 100, 2):
            fed = random.integers(-(2**31), 2**31, size=length).astype(np.int32)
            replied = random.integers(0, 2**31, size=length // 2).astype(np.int32)
            turn = claim(record, input_ids=fed)
            ownership = await own(env.store, turn)
            replay, past_sinks = ownership.replay, everything[sink_tokens:]
            np.testing.assert_array_equal(replay.sink_ids, everything[:sink_tokens])
            np.testing.assert_array_equal(replay.recent_ids, past_sinks[-24:])
            assert replay.sink_ids.dtype == replay.recent_ids.dtype == np.int32
            assert replay.token_count == len(everything)
            assert replay.is_whole == (len(past_sinks) <= 24)
            await env.store.commit(commit_of(turn, ownership, output_ids=replied))
            everything = np.concatenate([everything, fed, replied])

    @pytest.mark.parametrize("sink_tokens", [4, 1024])
    async def test_a_record_stays_below_100_kib(self, env: StoreEnv, sink_tokens: int) -> None:
        assert await largest_record(env, sink_tokens, 2048 - sink_tokens, turns=6) <= 100 * 1024

    async def test_too_long_an_input_is_refused(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        with pytest.raises(TurnTooLong) as refusal:
            await own(env.store, claim(record, input_ids=np.zeros(8001, dtype=np.int32)))
        assert (refusal.value.tokens, refusal.value.limit) == (8001, 8000)

    async def test_oversized_metadata_and_results_are_mistakes(self, env: StoreEnv) -> None:
        with pytest.raises(ValueError, match="metadata takes 10010 bytes"):
            await env.store.create(new_conversation(metadata={"key": "x" * 10000}))
        record = await env.store.create(new_conversation())
        turn = claim(record)
        commit = commit_of(turn, await own(env.store, turn), result={"key": "x" * 1024})
        with pytest.raises(ValueError, match="result takes"):
            await env.store.commit(commit)

    async def test_transcript_pages_backwards(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation(messages=(Message("system", "s"),)))
        for _ in range(2):
            await run_turn(env.store, record)
        whole = [(0, "s"), (1, "q0"), (2, "a0"), (3, "q1"), (4, "a1")]

        async def page(limit: int, before: int | None) -> list[tuple[int, str]]:
            first, messages = await env.store.transcript(ANN, record.conversation_id, limit, before)
            return list(enumerate((message.content for message in messages), start=first))

        assert await page(100, None) == whole
        assert await page(2, None) == whole[3:]
        assert await page(2, 3) == whole[1:3]
        assert await page(2, 1) == whole[:1]
        assert await page(2, 99) == whole[3:]
        assert await page(2, 0) == []
        assert await page(0, None) == []

    async def test_transcript_is_bounded_in_messages_and_bytes(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        for _ in range(8):
            await run_turn(env.store, record)
        first, messages = await env.store.transcript(ANN, record.conversation_id)
        assert (first, len(messages), messages[0].content) == (6, 10, "q3")
        long = (Message("user", "é" * 480), Message("assistant", "x" * 950))
        await run_turn(env.store, record, messages=long)
        first, messages = await env.store.transcript(ANN, record.conversation_id)
        assert messages[-2:] == list(long)
        assert 2 < len(messages) < 10
        assert sum(len(message.encode()) for message in messages) <= 2000
        assert first + len(messages) == 18
        assert await env.store.transcript(ANN, record.conversation_id, before=3) == (first, [])

    async def test_the_system_messages_outlive_the_transcript(self, env: StoreEnv) -> None:
        system = (Message("system", "Be brief."), Message("system", "ü\ud800"))
        late = Message("system", "not at the beginning")
        record = await env.store.create(
            new_conversation(messages=(*system, Message("user", "q"), late))
        )
        for number in range(12):
            found = await env.store.system_messages(ANN, record.conversation_id)
            assert tuple(found) == system
            messages = (
                Message("system" if number == 1 else "user", "q"),
                Message("assistant", "a"),
            )
            await run_turn(env.store, record, messages=messages)
        first, kept = await env.store.transcript(ANN, record.conversation_id)
        assert (first, len(kept)) == (18, 10)
        with pytest.raises(NotFound):
            await env.store.system_messages(BOB, record.conversation_id)
        await env.advance(900)
        await run_turn(env.store, record)
        await env.advance(900)
        assert tuple(await env.store.system_messages(ANN, record.conversation_id)) == system
        await env.store.delete(ANN, record.conversation_id)
        with pytest.raises(NotFound):
            await env.store.system_messages(ANN, record.conversation_id)

    async def test_system_messages_may_be_half_gone_or_all_there_is(self, env: StoreEnv) -> None:
        system = tuple(Message("system", str(n)) for n in range(14))
        record = await env.store.create(new_conversation(messages=system))
        first, _ = await env.store.transcript(ANN, record.conversation_id)
        assert first == 4
        assert tuple(await env.store.system_messages(ANN, record.conversation_id)) == system
        none = await env.store.create(new_conversation())
        assert list(await env.store.system_messages(ANN, none.conversation_id)) == []
        await run_turn(env.store, none, messages=(Message("user", "q"), Message("system", "s")))
        assert list(await env.store.system_messages(ANN, none.conversation_id)) == []

    async def test_any_text_survives(self, env: StoreEnv) -> None:
        texts = ["", "\x00\r\n", "日本語 🦙", "lone \ud800 surrogate", '"}{\\', "sinkserve:{x}"]
        messages = tuple(Message("user", text) for text in texts)
        new = new_conversation(messages=messages, metadata={text: text for text in texts[:3]})
        record = await env.store.create(new)
        assert record.metadata == new.metadata
        _, stored = await env.store.transcript(ANN, record.conversation_id)
        assert tuple(stored) == messages

    async def test_a_long_history_can_be_stored_at_once(self, env: StoreEnv) -> None:
        messages = tuple(Message("user", str(i)) for i in range(9000))
        record = await env.store.create(new_conversation(messages=messages))
        first, stored = await env.store.transcript(ANN, record.conversation_id)
        assert (first, stored[-1].content) == (8990, "8999")

    async def test_an_idle_conversation_is_forgotten(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        await env.advance(900)
        done = await run_turn(env.store, record)
        await env.advance(900)
        assert (await env.store.get(ANN, record.conversation_id)).turn == 1
        aborted = await own(env.store, claim(record))
        await env.store.abort(ANN, record.conversation_id, aborted.fence)
        await env.advance(900)
        assert (await env.store.get(ANN, record.conversation_id)).turn == 1
        await env.advance(101)
        with pytest.raises(NotFound):
            await env.store.get(ANN, record.conversation_id)
        assert await env.store.match_history(ANN, done.history) is None
        assert list(await env.store.list(ANN)) == []

    async def test_a_running_turn_is_never_forgotten(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        turn = claim(record, lease_s=5000.0)
        ownership = await own(env.store, turn)
        for _ in range(3):
            await env.advance(4999)
            await env.store.renew(ANN, record.conversation_id, ownership.fence, 5000.0)
        await env.advance(5900)
        assert (await env.store.commit(commit_of(turn, ownership))).turn == 1

    async def test_list_pages_from_new_to_old(self, env: StoreEnv) -> None:
        records = []
        for tenant in (ANN, ANN, BOB, ANN, ANN, ANN):
            records.append(await env.store.create(new_conversation(tenant=tenant)))
            await env.advance(1)
        mine = [record for record in reversed(records) if record.tenant == ANN]
        await run_turn(env.store, mine[-1])
        mine[-1] = await env.store.get(ANN, mine[-1].conversation_id)
        assert list(await env.store.list(ANN)) == mine
        assert list(await env.store.list(ANN, limit=2)) == mine[:2]
        assert list(await env.store.list(ANN, 2, mine[1].conversation_id)) == mine[2:4]
        assert list(await env.store.list(ANN, 9, mine[4].conversation_id)) == []
        await env.store.delete(ANN, mine[2].conversation_id)
        assert list(await env.store.list(ANN, limit=3)) == [mine[0], mine[1], mine[3]]
        with pytest.raises(NotFound):
            await env.store.list(ANN, after=mine[2].conversation_id)

    async def test_ping_and_close(self, env: StoreEnv) -> None:
        assert await env.store.ping() >= 0
        await env.store.close()
        await env.store.close()

    @staticmethod
    def writes_of(
        store: ConversationStore, turn: BeginTurn, ownership: Ownership
    ) -> list[Callable[[], Awaitable[object]]]:
        """Every write that needs a fence."""
        identifier, fence = turn.conversation_id, ownership.fence
        return [
            lambda: store.renew(turn.tenant, identifier, fence, LEASE_S),
            lambda: store.commit(commit_of(turn, ownership, tenant=turn.tenant)),
            lambda: store.abort(turn.tenant, identifier, fence),
        ]

    @staticmethod
    def calls_of(
        store: ConversationStore, turn: BeginTurn, ownership: Ownership, tenant: str
    ) -> list[Callable[[], Awaitable[object]]]:
        """Every operation on one existing conversation."""
        identifier, fence = turn.conversation_id, ownership.fence
        commit = commit_of(turn, ownership, tenant=tenant, conversation_id=identifier)
        return [
            lambda: store.get(tenant, identifier),
            lambda: store.transcript(tenant, identifier),
            lambda: store.system_messages(tenant, identifier),
            lambda: store.begin(turn),
            lambda: store.renew(tenant, identifier, fence, LEASE_S),
            lambda: store.commit(commit),
            lambda: store.abort(tenant, identifier, fence),
            lambda: store.delete(tenant, identifier),
        ]

    @staticmethod
    async def refusals(calls: list[Callable[[], Awaitable[object]]]) -> list[str]:
        texts = []
        for call in calls:
            with pytest.raises((NotFound, RolledBack)) as refusal:
                await call()
            texts.append(repr(refusal.value))
        return texts
