"""What every `ConversationStore` must do for turns that lose their owner and for stores that lose their
memory. `tests/test_store.py` runs it on each implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cluster.conversation import (
    BeginTurn,
    BusyTurn,
    Checkpoint,
    CommittedTurn,
    Conversation,
    Fence,
    Message,
    Ownership,
    Rebase,
    RememberedTurn,
    ReplayLog,
    RunningSnapshot,
    Snapshot,
    TokenIds,
    TurnCommit,
    new_nonce,
)
from cluster.store import (
    AlreadyExists,
    Conflict,
    ConversationStore,
    Fenced,
    HistoryMatch,
    KeyReused,
    ModelChanged,
    NotFound,
    Quarantined,
    Recovering,
    RolledBack,
    TurnConflict,
)
from tests.store_contract import (
    ANN,
    BOB,
    LEASE_S,
    LIMITS,
    StoreEnv,
    checkpoint,
    claim,
    commit_of,
    ids,
    new_conversation,
    own,
    run_turn,
)

OTHER_MODEL = "fingerprint-2"


def again(turn: BeginTurn, **changes: Any) -> BeginTurn:
    """Another claim of the same turn, by another replica."""
    return dataclasses.replace(turn, **({"nonce": new_nonce(), "replica": "replica-2"} | changes))


def running_snapshot(turn: BeginTurn, ownership: Ownership, output_ids: TokenIds) -> Snapshot:
    """What the owner of a running turn knows."""
    running = RunningSnapshot(
        *(turn.nonce, turn.key or turn.nonce, turn.request_hash),
        *(ownership.input_ids, output_ids, LEASE_S),
    )
    return Snapshot(
        conversation=ownership.conversation,
        replay=ownership.replay,
        replay_windows=2,
        messages=(),
        first_message=2 * ownership.conversation.turn,
        running=running,
    )


def idle_snapshot(
    done: Conversation, turn: BeginTurn, ownership: Ownership, commit: TurnCommit
) -> Snapshot:
    """What the owner of the last turn knows after its commit."""
    ended = np.concatenate([ownership.input_ids, commit.output_ids])
    result = RememberedTurn(
        *(turn.key or turn.nonce, turn.request_hash, done.turn, done.head),
        *(ownership.conversation.token_count + len(turn.input_ids), commit.output_ids),
        commit.result,
    )
    return Snapshot(
        conversation=done,
        replay=ownership.replay.advanced(ended, done.sink_tokens, 2 * done.window_tokens),
        replay_windows=2,
        messages=commit.messages,
        first_message=2 * (done.turn - 1),
        results=(result,),
    )


async def take_turn(
    store: ConversationStore, record: Conversation, **changes: Any
) -> tuple[Conversation, Snapshot]:
    """A whole turn, and what its owner then knows."""
    turn = claim(record, **changes)
    ownership = await own(store, turn)
    commit = commit_of(turn, ownership, result={"n": ownership.conversation.turn})
    done = await store.commit(commit)
    return done, idle_snapshot(done, turn, ownership, commit)


def same_replay(found: ReplayLog, wanted: ReplayLog) -> bool:
    return (
        np.array_equal(found.sink_ids, wanted.sink_ids)
        and np.array_equal(found.recent_ids, wanted.recent_ids)
        and found.token_count == wanted.token_count
    )


class KeyContract:
    """Idempotency keys and takeovers. Subclasses give the fixture `env`."""

    async def test_a_committed_key_gives_the_same_bytes_again(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        turn = claim(record, key="k", request_hash="r", expect_turn=0)
        ownership = await own(env.store, turn)
        commit = commit_of(
            turn, ownership, output_ids=ids(7, 8, 9, 0), reply_tokens=3, result={"a": [1, "é"]}
        )
        done = await env.store.commit(commit)
        for _ in range(2):
            for claimed in (again(turn), again(turn, fingerprint=OTHER_MODEL, steal=True)):
                known = await env.store.begin(claimed)
                assert isinstance(known, CommittedTurn)
                assert (known.turn, known.head) == (1, done.head)
                assert (known.reply_ids.tolist(), known.result) == ([7, 8, 9], {"a": [1, "é"]})
                assert known.reply_ids.dtype == np.int32
            await run_turn(env.store, record, input_ids=ids(4))
        with pytest.raises(KeyReused):
            await env.store.begin(again(turn, request_hash="other"))
        assert not (await env.store.get(ANN, record.conversation_id)).running

    async def test_a_key_counts_for_its_conversation_only(self, env: StoreEnv) -> None:
        for _ in range(2):
            record = await env.store.create(new_conversation())
            assert (await run_turn(env.store, record, key="k")).turn == 1

    async def test_results_are_bounded_and_the_newest_is_whole(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        turns = []
        for number in range(40):
            turn = claim(record, key=f"{number}" + "k" * 200, input_ids=ids(number))
            # Longer than the replay ids now and then: S + 2 R are 20 tokens.
            reply = np.arange(50 if number % 8 == 7 else 2, dtype=np.int32)
            await env.store.commit(commit_of(turn, await own(env.store, turn), output_ids=reply))
            turns.append((turn, reply))
            known = await env.store.begin(again(turn))
            assert isinstance(known, CommittedTurn)
            np.testing.assert_array_equal(known.reply_ids, reply)
        remembered = []
        for number, (turn, reply) in enumerate(turns):
            known = await env.store.begin(again(turn))
            if isinstance(known, CommittedTurn):
                assert (known.turn, known.reply_ids.tolist()) == (number + 1, reply.tolist())
                remembered.append(number)
            else:
                assert isinstance(known, Ownership)
                await env.store.abort(ANN, record.conversation_id, known.fence)
        assert remembered == [39]
        short = [claim(record, key=f"{n}") for n in range(3)]
        for turn in short:
            await env.store.commit(
                commit_of(turn, await own(env.store, turn), output_ids=ids(1, 2))
            )
        for turn in short:
            assert isinstance(await env.store.begin(again(turn)), CommittedTurn)

    async def test_a_running_key_is_busy_and_can_be_joined(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        await run_turn(env.store, record)
        turn = claim(record, key="k", request_hash="r")
        ownership = await own(env.store, turn)
        await checkpoint(env.store, turn, ownership, 0, ids(5, 6))
        busy = await env.store.begin(again(turn, expect_turn=7))
        assert isinstance(busy, BusyTurn)
        assert (busy.owner, busy.turn, busy.output_ids.tolist()) == ("replica-1", 2, [5, 6])
        assert 0 < busy.retry_after_s <= LEASE_S
        with pytest.raises(KeyReused):
            await env.store.begin(again(turn, request_hash="other", steal=True))
        with pytest.raises(Conflict):
            await env.store.begin(again(turn, key="other", steal=True))
        done = await env.store.commit(commit_of(turn, ownership, output_ids=ids(5, 6)))
        assert done.owner == "replica-1"

    @pytest.mark.parametrize("steal", [True, False])
    async def test_a_turn_goes_on_at_another_owner(self, env: StoreEnv, steal: bool) -> None:
        record = await env.store.create(new_conversation())
        before = await run_turn(env.store, record)
        turn = claim(record, key="k", input_ids=ids(1, 2))
        lost = await own(env.store, turn)
        assert (lost.input_ids.tolist(), lost.output_ids.tolist()) == ([1, 2], [])
        assert (lost.attempt, lost.resumed) == (0, False)
        await checkpoint(env.store, turn, lost, 0, ids(5, 6))
        if not steal:
            await env.advance(LEASE_S + 1)
        thief = again(turn, steal=steal, input_ids=ids(66), expect_turn=9)
        taken = await own(env.store, thief)
        assert taken.fence.epoch > lost.fence.epoch
        assert (taken.input_ids.tolist(), taken.output_ids.tolist()) == ([1, 2], [5, 6])
        assert (taken.attempt, taken.resumed) == (1, True)
        assert taken.input_ids.dtype == taken.output_ids.dtype == np.int32
        assert same_replay(taken.replay, lost.replay)
        assert (taken.conversation.owner, taken.conversation.running) == ("replica-2", True)
        repeated = await own(env.store, thief)
        assert (repeated.fence, repeated.attempt, repeated.resumed) == (taken.fence, 1, True)
        for late in (
            checkpoint(env.store, turn, lost, 2, ids(7)),
            env.store.renew(ANN, record.conversation_id, lost.fence, LEASE_S),
            env.store.commit(commit_of(turn, lost, output_ids=ids(5, 6))),
            env.store.abort(ANN, record.conversation_id, lost.fence),
        ):
            with pytest.raises(Fenced):
                await late
        await checkpoint(env.store, turn, taken, 2, ids(7))
        done = await env.store.commit(commit_of(turn, taken, output_ids=ids(5, 6, 7)))
        assert (done.turn, done.owner) == (2, "replica-2")
        assert done.token_count == before.token_count + 5
        known = await env.store.begin(again(turn))
        assert isinstance(known, CommittedTurn)
        assert known.reply_ids.tolist() == [5, 6, 7]

    async def test_a_turn_that_loses_its_owners_is_given_up(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        before = await run_turn(env.store, record)
        turn = claim(record, key="poison", request_hash="r")
        await own(env.store, turn)
        last = await own(env.store, again(turn, steal=True))
        for _ in range(2):
            with pytest.raises(Quarantined):
                await env.store.begin(again(turn, steal=True))
        with pytest.raises(Quarantined):
            await env.store.begin(again(turn))
        with pytest.raises(KeyReused):
            await env.store.begin(again(turn, request_hash="other"))
        with pytest.raises(Fenced):
            await env.store.commit(commit_of(turn, last))
        after = await env.store.get(ANN, record.conversation_id)
        assert after == dataclasses.replace(before, epoch=last.fence.epoch)
        assert (await run_turn(env.store, record, key="healthy")).turn == 2
        with pytest.raises(Quarantined):
            await env.store.begin(again(turn))

    async def test_a_lease_that_runs_out_is_no_death(self, env: StoreEnv) -> None:
        """Nor is an owner that let go. There is an end to them too."""
        record = await env.store.create(new_conversation())
        turn = claim(record, key="k")
        await own(env.store, turn)
        for lapse in range(1, LIMITS.max_lapses):
            if lapse % 2:
                await env.advance(LEASE_S + 1)
                taken = await own(env.store, again(turn))
            else:
                taken = await own(env.store, again(turn, steal=True, blameless=True))
            assert (taken.attempt, taken.resumed) == (lapse, True)
        # One death does not add up with them; a token makes all of it good.
        dead = again(turn, steal=True)
        taken = await own(env.store, dead)
        assert taken.attempt == LIMITS.max_lapses
        await checkpoint(env.store, dead, taken, 0, ids(5))
        for lapse in range(1, LIMITS.max_lapses):
            await env.advance(LEASE_S + 1)
            assert (await own(env.store, again(turn))).attempt == lapse
        await env.advance(LEASE_S + 1)
        with pytest.raises(Quarantined):
            await env.store.begin(again(turn))
        assert (await run_turn(env.store, record, key="healthy")).turn == 1

    async def test_losses_are_counted_beyond_another_key(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        poison, other = claim(record, key="poison"), claim(record, key="other")
        await own(env.store, poison)
        await own(env.store, again(poison, steal=True))
        await env.advance(LEASE_S + 1)
        # Two that are lost count for themselves.
        await own(env.store, other)
        await env.advance(LEASE_S + 1)
        with pytest.raises(TurnConflict):
            await env.store.begin(again(poison, steal=True, expect_turn=7))
        with pytest.raises(Quarantined):
            await env.store.begin(again(poison, steal=True))
        anew = await own(env.store, again(other, steal=True))
        assert (anew.attempt, anew.resumed) == (1, False)
        await env.advance(LEASE_S + 1)
        with pytest.raises(Quarantined):
            await env.store.begin(again(other, steal=True))
        with pytest.raises(Quarantined):
            await env.store.begin(again(poison))
        assert (await run_turn(env.store, record)).turn == 1

    async def test_a_turn_that_gets_on_is_not_given_up(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        turn = claim(record, key="k")
        ownership = await own(env.store, turn)
        for k in range(4):
            await checkpoint(env.store, turn, ownership, k, ids(k))
            await checkpoint(env.store, turn, ownership, k + 1, ids())
            turn = again(turn, steal=True)
            ownership = await own(env.store, turn)
            assert ownership.attempt == 1
        # What is stored already is no progress.
        await checkpoint(env.store, turn, ownership, 3, ids(3))
        with pytest.raises(Quarantined):
            await env.store.begin(again(turn, steal=True))

    async def test_another_model_cannot_take_over(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        turn = claim(record, key="k")
        ownership = await own(env.store, turn)
        other = again(turn, fingerprint=OTHER_MODEL)
        assert isinstance(await env.store.begin(other), BusyTurn)
        with pytest.raises(ModelChanged):
            await env.store.begin(dataclasses.replace(other, steal=True))
        assert (await env.store.commit(commit_of(turn, ownership))).turn == 1

    async def test_an_aborted_key_may_run_anew(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        turn = claim(record, key="k")
        ownership = await own(env.store, turn)
        await checkpoint(env.store, turn, ownership, 0, ids(5))
        await env.store.abort(ANN, record.conversation_id, ownership.fence)
        anew = await own(env.store, again(turn))
        assert (anew.attempt, anew.resumed, anew.output_ids.tolist()) == (0, False, [])

    async def test_a_turn_forgotten_after_its_lease_leaves_nothing(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        lost = claim(record, key="lost")
        await checkpoint(env.store, lost, await own(env.store, lost), 0, ids(66, 66))
        await env.advance(LEASE_S + 1)
        turn = claim(record, key="k")
        ownership = await own(env.store, turn)
        assert (ownership.resumed, ownership.output_ids.tolist()) == (False, [])
        await checkpoint(env.store, turn, ownership, 0, ids(7))
        assert (await env.store.commit(commit_of(turn, ownership))).turn == 1

    async def test_a_key_that_is_too_long_is_a_mistake(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        for changes in ({"key": "é" * 129}, {"request_hash": "r" * 257}):
            with pytest.raises(ValueError, match="more than 256 bytes"):
                await env.store.begin(claim(record, **changes))


class CheckpointContract:
    """Tokens of running turns. Subclasses give the fixture `env`."""

    async def test_tokens_are_stored_once_and_in_order(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        turn = claim(record, key="k")
        ownership = await own(env.store, turn)
        await checkpoint(env.store, turn, ownership, 0, ids(1, -2))
        for k, again_ids in ((0, ids(1)), (0, ids(1, -2)), (1, ids(-2)), (0, ids(1, -2, 3))):
            await checkpoint(env.store, turn, ownership, k, again_ids)
        for k, wrong in ((0, ids(9)), (2, ids(9)), (1, ids(-2, 4)), (0, ids(1, -2, 4, 5))):
            with pytest.raises(Fenced):
                await checkpoint(env.store, turn, ownership, k, wrong)
        with pytest.raises(RolledBack):
            await checkpoint(env.store, turn, ownership, 4, ids(5))
        assert (await own(env.store, turn)).output_ids.tolist() == [1, -2, 3]

    async def test_a_long_output_in_pieces_of_any_size(self, env: StoreEnv) -> None:
        random = np.random.default_rng(5)
        record = await env.store.create(new_conversation())
        turn = claim(record, key="k")
        ownership = await own(env.store, turn)
        whole = random.integers(-(2**31), 2**31, 3000).astype(np.int32)
        end = 0
        while end < len(whole):
            k = max(0, end - int(random.integers(0, 40)))
            size = int(random.choice([1, 1, 2, 5, 100, 250, 256, 257, 700]))
            await checkpoint(env.store, turn, ownership, k, whole[k : end + size])
            end = min(len(whole), end + size)
            if random.random() < 0.2:
                known = await own(env.store, turn)
                np.testing.assert_array_equal(known.output_ids, whole[:end])
        for k in (0, 100, 2000, 2990):
            with pytest.raises(Fenced):
                await checkpoint(env.store, turn, ownership, k, whole[k : k + 9] + 1)
        commit = commit_of(turn, ownership, output_ids=whole)
        assert (await env.store.commit(commit)).token_count == 3003

    async def test_each_of_a_batch_gets_its_own_answer(self, env: StoreEnv) -> None:
        records = [await env.store.create(new_conversation()) for _ in range(5)]
        turns = [claim(record, key="k") for record in records]
        owned = [await own(env.store, turn) for turn in turns]
        await env.store.delete(ANN, records[1].conversation_id)
        await own(env.store, again(turns[2], steal=True))

        def one(i: int, k: int = 0, **changes: Any) -> Checkpoint:
            given = Checkpoint(
                turns[i].conversation_id, ANN, owned[i].fence, k, ids(10 + i), LEASE_S
            )
            return dataclasses.replace(given, **changes)

        batch = [one(0), one(1), one(2), one(3, k=1), one(4), one(4, k=1), one(4, tenant=BOB)]
        answers = await env.store.checkpoint(batch)
        kinds: Sequence[type[Exception] | None] = [type(x) if x else None for x in answers]
        assert kinds == [None, NotFound, Fenced, RolledBack, None, None, RolledBack]
        assert (await own(env.store, turns[0])).output_ids.tolist() == [10]
        assert (await own(env.store, turns[4])).output_ids.tolist() == [14, 14]
        assert list(await env.store.checkpoint([])) == []

    @pytest.mark.parametrize("token_ids", [ids(), ids(1)])
    async def test_a_checkpoint_keeps_the_lease(self, env: StoreEnv, token_ids: TokenIds) -> None:
        record = await env.store.create(new_conversation())
        turn = claim(record, key="k")
        ownership = await own(env.store, turn)
        k = 0
        for _ in range(5):
            await env.advance(LEASE_S / 2)
            await checkpoint(env.store, turn, ownership, k, token_ids)
            k += len(token_ids)
        await env.advance(0.7 * LEASE_S)
        assert isinstance(await env.store.begin(again(turn)), BusyTurn)
        await env.advance(0.4 * LEASE_S)
        assert isinstance(await env.store.begin(again(turn)), Ownership)

    async def test_a_running_turn_that_only_checkpoints_is_never_forgotten(
        self, env: StoreEnv
    ) -> None:
        record = await env.store.create(new_conversation())
        turn = claim(record, key="k")
        ownership = await own(env.store, turn)
        for k in range(300):
            await env.advance(LEASE_S)
            await checkpoint(env.store, turn, ownership, k, ids(k))
        assert LIMITS.ttl_s < 300 * LEASE_S
        assert len((await own(env.store, turn)).output_ids) == 300

    @pytest.mark.parametrize("closed", [(7,), (7, 9), (7, 9, 9), (7, 8, 2)])
    async def test_a_reply_may_end_otherwise_than_it_was_sampled(
        self, env: StoreEnv, closed: tuple[int, ...]
    ) -> None:
        """It is cut before a stop string and encoded anew, or gets the template's closing ids."""
        record = await env.store.create(new_conversation())
        turn = claim(record, key="k")
        ownership = await own(env.store, turn)
        await checkpoint(env.store, turn, ownership, 0, ids(7, 8))
        commit = commit_of(turn, ownership, output_ids=ids(*closed))
        assert (await env.store.commit(commit)).turn == 1
        done = await env.store.begin(again(turn))
        assert isinstance(done, CommittedTurn)
        assert done.reply_ids.tolist() == list(closed)

    async def test_the_record_tells_what_a_snapshot_of_it_needs(self, env: StoreEnv) -> None:
        new = new_conversation(messages=(Message("system", "s"),))
        record = await env.store.create(new)
        assert (record.replay_windows, record.num_messages) == (new.replay_windows, 1)
        for n in range(1, 30):
            record = await run_turn(env.store, record)
            assert record.num_messages == 1 + 2 * n
            assert await env.store.get(ANN, new.conversation_id) == record


class RecoveryContract:
    """A store that restarts, and comes back older. Subclasses give the fixture `env`."""

    async def test_pulse_tells_a_restart(self, env: StoreEnv) -> None:
        first = await env.store.pulse()
        await env.store.create(new_conversation())
        assert await env.store.pulse() == first
        await env.restart()
        second = await env.store.pulse()
        assert second != first
        assert await env.store.pulse() == second

    async def test_after_a_restart_owners_go_first(self, env: StoreEnv) -> None:
        records = [await env.store.create(new_conversation()) for _ in range(4)]
        turns = [claim(record, key="k") for record in records[:2]]
        owned = [await own(env.store, turn) for turn in turns]
        done, _ = await take_turn(env.store, records[3])
        await env.store.delete(ANN, records[2].conversation_id)
        await env.restart()
        await checkpoint(env.store, turns[0], owned[0], 0, ids(7))
        await env.store.renew(ANN, records[1].conversation_id, owned[1].fence, LEASE_S)
        refused = [
            turns[0],
            again(turns[0], steal=True),
            # Its last owner, too: an older store may name one that has long been replaced.
            claim(records[3], key="new"),
            claim(records[3], conversation_id="conv_" + "0" * 32),
        ]
        for turn in refused:
            with pytest.raises(Recovering) as refusal:
                await env.store.begin(turn)
            assert 0 < refusal.value.retry_after_s <= LIMITS.recovery_s
        with pytest.raises(Recovering):
            await env.store.rebase(rebase_of(done))
        with pytest.raises(Recovering):
            await env.store.get(ANN, "conv_" + "0" * 32)
        with pytest.raises(Recovering):
            await env.store.get(BOB, records[3].conversation_id)
        with pytest.raises(NotFound):
            await env.store.begin(claim(records[2]))
        # What is there may be older than what was acknowledged: nobody is told of it yet.
        with pytest.raises(Recovering):
            await env.store.get(ANN, records[3].conversation_id)
        fresh = await env.store.create(new_conversation())
        assert (await env.store.commit(commit_of(turns[0], owned[0]))).turn == 1
        await env.store.abort(ANN, records[1].conversation_id, owned[1].fence)
        await env.advance(LIMITS.recovery_s + 0.1)
        assert await env.store.get(ANN, records[3].conversation_id) == done
        assert (await run_turn(env.store, fresh)).turn == 1
        assert (await run_turn(env.store, records[3])).turn == 2
        with pytest.raises(NotFound):
            await env.store.get(ANN, "conv_" + "0" * 32)

    async def test_lost_tokens_are_put_back(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        await run_turn(env.store, record)
        turn = claim(record, key="k", request_hash="r")
        ownership = await own(env.store, turn)
        await checkpoint(env.store, turn, ownership, 0, ids(5))
        saved = await env.save()
        await checkpoint(env.store, turn, ownership, 1, ids(6))
        await env.roll_back(saved)
        with pytest.raises(RolledBack):
            await checkpoint(env.store, turn, ownership, 2, ids(7))
        for _ in range(2):
            await env.store.repair(running_snapshot(turn, ownership, ids(5, 6)))
        await checkpoint(env.store, turn, ownership, 2, ids(7))
        with pytest.raises(Fenced):
            await env.store.repair(running_snapshot(turn, ownership, ids(5, 6)))
        await env.advance(LIMITS.recovery_s + 0.1)
        taken = await own(env.store, again(turn, steal=True))
        assert (taken.output_ids.tolist(), taken.input_ids.tolist()) == ([5, 6, 7], [1, 2, 3])
        with pytest.raises(KeyReused):
            await env.store.begin(again(turn, request_hash="other"))

    async def test_a_lost_claim_is_put_back(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        before = await run_turn(env.store, record)
        saved = await env.save()
        turn = claim(record, replica="replica-2", key="k")
        ownership = await own(env.store, turn)
        await checkpoint(env.store, turn, ownership, 0, ids(5))
        await env.roll_back(saved)
        for late in (
            checkpoint(env.store, turn, ownership, 1, ids(6)),
            env.store.renew(ANN, record.conversation_id, ownership.fence, LEASE_S),
            env.store.commit(commit_of(turn, ownership)),
            env.store.abort(ANN, record.conversation_id, ownership.fence),
        ):
            with pytest.raises(RolledBack):
                await late
        await env.store.repair(running_snapshot(turn, ownership, ids(5)))
        await env.advance(LIMITS.recovery_s + 0.1)
        running = await env.store.get(ANN, record.conversation_id)
        assert running == ownership.conversation
        await checkpoint(env.store, turn, ownership, 1, ids(6))
        await env.store.abort(ANN, record.conversation_id, ownership.fence)
        after = await env.store.get(ANN, record.conversation_id)
        assert after == dataclasses.replace(before, epoch=ownership.fence.epoch)

    async def test_a_lost_commit_is_put_back(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation(metadata={"a": "ü"}))
        await take_turn(env.store, record, key="first")
        saved = await env.save()
        await take_turn(env.store, record, key="second", input_ids=ids(4, 5))
        done, snapshot = await take_turn(env.store, record, key="third", request_hash="r")
        messages = (Message("user", "q1"), Message("assistant", "a1"), *snapshot.messages)
        snapshot = dataclasses.replace(snapshot, messages=messages, first_message=2)
        whole = await env.store.transcript(ANN, record.conversation_id)
        await env.roll_back(saved)
        for _ in range(2):
            await env.store.repair(snapshot)
        await env.advance(LIMITS.recovery_s + 0.1)
        assert await env.store.get(ANN, record.conversation_id) == done
        assert await env.store.transcript(ANN, record.conversation_id) == whole
        match = HistoryMatch(record.conversation_id, 3)
        assert await env.store.match_history(ANN, done.history) == match
        for key in ("third", "first"):
            known = await env.store.begin(
                claim(record, key=key, request_hash="r" if key == "third" else "")
            )
            assert isinstance(known, CommittedTurn)
            assert known.reply_ids.tolist() == [7, 8, 9]
            assert known.result == {"n": known.turn - 1}
        following = await own(env.store, claim(record, expect_turn=3, expect_head=done.head))
        assert same_replay(following.replay, snapshot.replay)

    @pytest.mark.parametrize("first_message", [1, 3, 40])
    async def test_a_repair_leaves_the_system_messages(
        self, env: StoreEnv, first_message: int
    ) -> None:
        """Also one that knows the end of the transcript alone, which then replaces all of it."""
        system = (Message("system", "s"),)
        record = await env.store.create(new_conversation(messages=system))
        await take_turn(env.store, record, key="first")
        saved = await env.save()
        _, snapshot = await take_turn(env.store, record, key="second")
        snapshot = dataclasses.replace(snapshot, first_message=first_message)
        await env.roll_back(saved)
        await env.store.repair(snapshot)
        await env.advance(LIMITS.recovery_s + 0.1)
        assert tuple(await env.store.system_messages(ANN, record.conversation_id)) == system
        first, messages = await env.store.transcript(ANN, record.conversation_id)
        assert messages[-2:] == list(snapshot.messages)
        assert first == (first_message if first_message == 40 else 0)

    async def test_a_lost_conversation_is_put_back(self, env: StoreEnv) -> None:
        saved = await env.save()
        new = new_conversation(messages=(Message("system", "s"),))
        record = await env.store.create(new)
        done, snapshot = await take_turn(env.store, record, key="k")
        snapshot = dataclasses.replace(snapshot, first_message=1)
        turn = claim(record, key="next")
        ownership = await own(env.store, turn)
        await env.roll_back(saved)
        with pytest.raises(Recovering):
            await env.store.get(ANN, new.conversation_id)
        with pytest.raises(RolledBack):
            await checkpoint(env.store, turn, ownership, 0, ids(1))
        await env.store.repair(snapshot)
        await env.advance(LIMITS.recovery_s + 0.1)
        assert await env.store.get(ANN, new.conversation_id) == done
        assert [r.conversation_id for r in await env.store.list(ANN)] == [new.conversation_id]
        assert await env.store.transcript(ANN, new.conversation_id) == (1, list(snapshot.messages))
        with pytest.raises(AlreadyExists):
            await env.store.create(new)
        await env.store.repair(running_snapshot(turn, ownership, ids(1)))
        done = await env.store.commit(commit_of(turn, ownership, output_ids=ids(1)))
        assert (done.turn, done.token_count) == (2, 10)
        assert isinstance(await env.store.begin(claim(record, key="k")), CommittedTurn)

    async def test_a_repair_goes_before_a_conversation_nobody_has_begun(
        self, env: StoreEnv
    ) -> None:
        saved = await env.save()
        new = new_conversation()
        done, snapshot = await take_turn(env.store, await env.store.create(new))
        await env.roll_back(saved)
        await env.store.create(new)
        await env.store.repair(snapshot)
        await env.advance(LIMITS.recovery_s + 0.1)
        assert await env.store.get(ANN, new.conversation_id) == done

    async def test_a_late_repair_changes_nothing(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        _, first = await take_turn(env.store, record)
        turn = claim(record, key="k")
        ownership = await own(env.store, turn)
        await checkpoint(env.store, turn, ownership, 0, ids(7, 8, 9))
        running = running_snapshot(turn, ownership, ids(7))
        with pytest.raises(Fenced):
            await env.store.repair(running)
        with pytest.raises(Fenced):
            await env.store.repair(first)
        await env.store.abort(ANN, record.conversation_id, ownership.fence)
        aborted = await env.store.get(ANN, record.conversation_id)
        with pytest.raises(Fenced):
            await env.store.repair(running_snapshot(turn, ownership, ids(7, 8, 9, 10)))
        assert await env.store.get(ANN, record.conversation_id) == aborted
        turn = claim(record, key="k")
        ownership = await own(env.store, turn)
        done = await env.store.commit(commit_of(turn, ownership))
        with pytest.raises(Fenced):
            await env.store.repair(running_snapshot(turn, ownership, ids(7, 8, 9, 10)))
        assert await env.store.get(ANN, record.conversation_id) == done

    async def test_nobody_repairs_what_was_deleted(self, env: StoreEnv) -> None:
        new = new_conversation()
        record = await env.store.create(new)
        _, idle = await take_turn(env.store, record)
        turn = claim(record)
        ownership = await own(env.store, turn)
        running = running_snapshot(turn, ownership, ids(7))
        await env.store.delete(ANN, new.conversation_id)
        await env.restart()
        for snapshot in (idle, running):
            with pytest.raises(NotFound):
                await env.store.repair(snapshot)
        for late in (
            checkpoint(env.store, turn, ownership, 0, ids(7)),
            env.store.abort(ANN, new.conversation_id, ownership.fence),
            env.store.get(ANN, new.conversation_id),
        ):
            with pytest.raises(NotFound):
                await late
        await env.store.create(new)
        for snapshot in (idle, running):
            with pytest.raises(Fenced):
                await env.store.repair(snapshot)
        await env.advance(LIMITS.recovery_s + 0.1)
        assert (await env.store.get(ANN, new.conversation_id)).turn == 0
        await env.store.create(new)
        with pytest.raises(NotFound):
            await env.store.repair(
                dataclasses.replace(
                    idle, conversation=dataclasses.replace(idle.conversation, tenant=BOB)
                )
            )

    async def test_nobody_repairs_what_has_expired(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        _, idle = await take_turn(env.store, record)
        await env.advance(LIMITS.ttl_s + 1)
        with pytest.raises(NotFound):
            await env.store.repair(idle)

    async def test_an_epoch_is_not_issued_twice_by_a_store_that_went_back(
        self, env: StoreEnv
    ) -> None:
        record = await env.store.create(new_conversation())
        saved = await env.save()
        lost_turn = claim(record, key="lost")
        lost = await own(env.store, lost_turn)
        await env.roll_back(saved)
        await env.store.pulse()
        await env.advance(LIMITS.recovery_s + 0.1)
        turn = claim(record, key="k")
        ownership = await own(env.store, turn)
        assert ownership.fence.epoch > lost.fence.epoch
        with pytest.raises(Fenced):
            await env.store.repair(running_snapshot(lost_turn, lost, ids(7)))
        with pytest.raises(Fenced):
            await checkpoint(env.store, lost_turn, lost, 0, ids(7))
        forged = dataclasses.replace(lost, fence=Fence(lost.fence.epoch, turn.nonce))
        with pytest.raises(Fenced):
            await checkpoint(env.store, turn, forged, 0, ids(7))


def rebase_of(record: Conversation, **changes: Any) -> Rebase:
    given = Rebase(
        *(record.conversation_id, record.tenant, record.head, OTHER_MODEL),
        sink_tokens=3,
        window_tokens=5,
        replay_windows=2,
    )
    return dataclasses.replace(given, **changes)


class RebaseContract:
    """Another model for an old conversation. Subclasses give the fixture `env`."""

    async def test_turn_hash_and_transcript_stay_and_token_ids_go(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation(metadata={"a": "b"}))
        await run_turn(env.store, record, key="first")
        done, idle = await take_turn(env.store, record, key="last")
        transcript = await env.store.transcript(ANN, record.conversation_id)
        system = await env.store.system_messages(ANN, record.conversation_id)
        rebased = await env.store.rebase(rebase_of(done))
        assert await env.store.rebase(rebase_of(done)) == rebased
        assert await env.store.get(ANN, record.conversation_id) == rebased
        wanted = dataclasses.replace(
            *(done,),
            fingerprint=OTHER_MODEL,
            sink_tokens=3,
            window_tokens=5,
            token_count=0,
            owner="",
            epoch=rebased.epoch,
        )
        assert rebased == wanted
        assert rebased.epoch > done.epoch
        assert await env.store.transcript(ANN, record.conversation_id) == transcript
        assert await env.store.system_messages(ANN, record.conversation_id) == system
        with pytest.raises(Fenced):
            await env.store.repair(idle)
        known = await env.store.begin(claim(record, key="last", fingerprint=OTHER_MODEL))
        assert isinstance(known, CommittedTurn)
        assert (known.turn, known.reply_ids.tolist()) == (2, [7, 8, 9])
        with pytest.raises(ModelChanged):
            await env.store.begin(claim(record, key="k"))

        everything: list[int] = []
        for number in range(4):
            turn = claim(
                record, fingerprint=OTHER_MODEL, key=f"{number}", input_ids=ids(*range(number + 4))
            )
            ownership = await own(env.store, turn)
            assert ownership.replay.sink_ids.tolist() == everything[:3]
            assert ownership.replay.recent_ids.tolist() == everything[3:][-10:]
            after = await env.store.commit(commit_of(turn, ownership))
            everything += [*range(number + 4), 7, 8, 9]
            known = await env.store.begin(again(turn))
            assert isinstance(known, CommittedTurn)
            assert known.reply_ids.tolist() == [7, 8, 9]
        assert (after.turn, after.token_count) == (6, len(everything))

    async def test_only_an_idle_conversation_as_it_is_now(self, env: StoreEnv) -> None:
        record = await env.store.create(new_conversation())
        done = await run_turn(env.store, record)
        with pytest.raises(TurnConflict):
            await env.store.rebase(rebase_of(record))
        with pytest.raises(NotFound):
            await env.store.rebase(rebase_of(done, tenant=BOB))
        turn = claim(record, key="k")
        ownership = await own(env.store, turn)
        with pytest.raises(Conflict):
            await env.store.rebase(rebase_of(done))
        await env.advance(LEASE_S + 1)
        await env.store.rebase(rebase_of(done))
        for late in (
            env.store.commit(commit_of(turn, ownership)),
            checkpoint(env.store, turn, ownership, 0, ids(7)),
            env.store.repair(running_snapshot(turn, ownership, ids(7))),
        ):
            with pytest.raises(Fenced):
                await late
        assert not (await env.store.get(ANN, record.conversation_id)).running
