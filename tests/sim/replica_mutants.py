"""Replicas with one deliberate fault each. The simulation must notice all but the equivalents.

Not listed because nobody could notice them, and why:

    resumes with the input of the call, not the stored one    the request's hash says they are equal
    gives a slot the new hash before the commit is answered   the hash names the slot's very contents
    never renews a lease                                      leases are liveness; the fence is safety
    draws a new nonce to repeat a lost `begin`                takes over its own turn, at the cost of an epoch
    takes a slot whose hash is older for what it is           it is a prefix: restore appends what is missing
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cluster.conversation import (
    Checkpoint,
    CommittedTurn,
    Conversation,
    Ownership,
    Snapshot,
    TokenIds,
    TurnCommit,
)
from cluster.store import Fenced, RolledBack, StoreError
from deployments.turn_call import TurnCall, TurnDone, TurnRefused
from tests.sim.mutants import Mutant
from tests.sim.replica import Running, SimReplica, done
from tests.sim.toy import ToySlot, toy_token

NOTHING: TokenIds = np.zeros(0, np.int32)


class ShowsBeforeStored(SimReplica):
    """Checkpoint after show."""

    def _sample(self, running: Running) -> None:
        super()._sample(running)
        running.tell()

    def _visible(self, running: Running) -> list[int]:
        return running.sampled


class ShowsWhatWasRefused(SimReplica):
    """A checkpoint that got no good answer is taken for stored."""

    async def _take(
        self, running: Running, checkpoint: Checkpoint, answer: StoreError | None
    ) -> None:
        await super()._take(running, checkpoint, None if isinstance(answer, Fenced) else answer)


class AcceptsStaleSlot(SimReplica):
    """A slot is taken for the conversation's whatever its hash."""

    def _is_valid(self, slot: ToySlot, record: Conversation) -> bool:
        return 0 < slot.length <= record.token_count


class TakesSlotForCurrent(SimReplica):
    """A slot is taken for the conversation's, up to its last token, whatever its hash."""

    def _is_valid(self, slot: ToySlot, record: Conversation) -> bool:
        slot.length = record.token_count
        return slot.length > 0


class KeepsDirtySlot(SimReplica):
    """The slot of a turn that was lost stays resident, with its tokens in it."""

    def _lose(self, running: Running, error: StoreError) -> None:
        super()._lose(running, error)
        running.slot.length = running.ownership.conversation.token_count
        self._slots[running.call.conversation_id] = running.slot


class BelievesVoidReply(SimReplica):
    """The answer to a commit is believed although the turn was put back as running meanwhile."""

    def _is_void(self, running: Running, repairs: int) -> bool:
        return False


class ForgetsStoredOutput(SimReplica):
    """A resumed turn starts again from its first token."""

    async def _start(self, call: TurnCall, ownership: Ownership) -> Running | TurnRefused:
        return await super()._start(
            replace(call, shown_ids=()), replace(ownership, output_ids=NOTHING)
        )


class NewSeedAtTakeover(SimReplica):
    """Whoever resumes a turn draws with numbers of its own."""

    def _draw(self, running: Running) -> int:
        k, seed = len(running.sampled), running.call.sampling.seed + running.ownership.resumed
        return toy_token(running.slot, seed, running.turn, k, self._host.salt)


class NeverRepairs(SimReplica):
    """A restart of the store is nobody's business."""

    async def _repair_all(self) -> None:
        """Nothing."""

    async def _repair_turn(self, running: Running) -> None:
        raise Fenced(running.call.conversation_id)


class RepairsRunningOnly(SimReplica):
    """What is committed is forgotten: the store has it, does it not?"""

    def _keep(self, running: Running, commit: TurnCommit, record: Conversation) -> None:
        """Nothing."""


class RepairsWithoutOutput(SimReplica):
    """A running turn is put back as it began, without its tokens."""

    def _snapshot(self, running: Running) -> Snapshot:
        snapshot = super()._snapshot(running)
        if snapshot.running is None:
            return snapshot
        return replace(snapshot, running=replace(snapshot.running, output_ids=NOTHING))


class RepairsWithoutAdvance(SimReplica):
    """A committed conversation is put back without the replay ids of its last turn."""

    def _keep(self, running: Running, commit: TurnCommit, record: Conversation) -> None:
        super()._keep(running, commit, record)
        kept = self._kept[record.conversation_id]
        stale = replace(kept, replay=running.ownership.replay)
        self._kept[record.conversation_id] = stale


class JoinsAnyTurn(SimReplica):
    """A call joins whatever turn of the conversation runs, not the one of its key."""

    def _is_same_turn(self, running: Running, call: TurnCall) -> bool:
        return True


class JoinsWithoutLooking(SimReplica):
    """A call joins the turn of its key without comparing the requests."""

    def _is_same_turn(self, running: Running, call: TurnCall) -> bool:
        return running.call.key == call.key


class ResumesAgainstTheClient(SimReplica):
    """What the client has seen, and the store has lost, is drawn again."""

    def _known_output(self, stored: list[int], shown: list[int]) -> list[int]:
        return stored


class AcknowledgesBeforeCommit(SimReplica):
    """The client is told that its turn is final while the commit is on its way."""

    async def _commit(self, running: Running) -> None:
        reply = [token for token in running.sampled if token != 1]
        early = self._commit_of(running, np.array([*reply, 1], np.int32), len(reply))
        running.end = _told(running, early.head, reply)
        running.tell()
        await super()._commit(running)


class TakesRolledBackForLost(SimReplica):
    """RolledBack is read as Fenced: the turn is given up instead of put back."""

    async def _mend(self, running: Running, error: StoreError) -> bool:
        if isinstance(error, RolledBack):
            error = Fenced(running.call.conversation_id)
        return await super()._mend(running, error)


def _told(running: Running, head: str, reply: list[int]) -> TurnDone:
    return done(CommittedTurn(running.turn, head, np.array(reply, np.int32), {}))


REPLICA_MUTANTS: dict[str, Mutant] = {
    "shows before it stores": Mutant(("crash", "pause"), ShowsBeforeStored),
    "shows what was refused": Mutant(("pause",), ShowsWhatWasRefused),
    "accepts a stale slot": Mutant(("storm",), AcceptsStaleSlot, noisy=False, start=50),
    "takes a slot for current": Mutant(("calm", "pause"), TakesSlotForCurrent, noisy=False),
    "keeps a dirty slot": Mutant(("pause", "calm"), KeepsDirtySlot, noisy=False),
    "believes a reply across a roll-back": Mutant(("rollback",), BelievesVoidReply),
    "forgets the stored output": Mutant(("crash",), ForgetsStoredOutput, noisy=True),
    "draws a new seed at takeover": Mutant(("crash",), NewSeedAtTakeover, noisy=False),
    "never repairs": Mutant(("rollback",), NeverRepairs),
    "repairs running turns only": Mutant(("rollback",), RepairsRunningOnly),
    "repairs without the output": Mutant(("rollback",), RepairsWithoutOutput),
    "repairs old replay ids": Mutant(("rollback",), RepairsWithoutAdvance),
    "joins any turn": Mutant(("calm",), JoinsAnyTurn),
    "joins without comparing requests": Mutant(("calm",), JoinsWithoutLooking),
    "resumes against the client": Mutant(("storm",), ResumesAgainstTheClient, noisy=True),
    "acknowledges before the commit": Mutant(("crash", "pause"), AcknowledgesBeforeCommit),
    "gives up what was rolled back": Mutant(("rollback",), TakesRolledBackForLost),
}
