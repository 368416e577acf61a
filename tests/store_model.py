"""The simplest model of the store: it keeps every token and every turn for ever, and recomputes hashes
and replay ids from the whole log. What it says of one operation is what `tests.store_checker` expects."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.conversation import (
    GENESIS,
    BeginTurn,
    BusyTurn,
    Checkpoint,
    Conversation,
    Fence,
    Message,
    NewConversation,
    Ownership,
    RememberedTurn,
    ReplayLog,
    RunningSnapshot,
    Snapshot,
    TokenIds,
    TurnCommit,
    chain_head,
)
from cluster.memory_record import NO_IDS
from cluster.store import (
    Conflict,
    Fenced,
    KeyReused,
    ModelChanged,
    NotFound,
    Quarantined,
    Recovering,
    RolledBack,
    StoreError,
    StoreLimits,
    TurnConflict,
)

# Large beside the time a busy machine takes for the steps within a lease.
LEASE_S = 100.0

Outcome = type[StoreError] | type[Ownership] | type[BusyTurn]


@dataclass(slots=True)
class Running:
    """A turn between begin and its end."""

    claim: BeginTurn
    key: str
    request_hash: str
    input_ids: TokenIds
    output: list[int]
    fence: Fence
    lease_until_s: float
    attempts: int = 0
    lapses: int = 0
    resumed: bool = False


@dataclass(slots=True)
class Life:
    """One life of a conversation id, remembered whole. `sure` is a key whose result must be known."""

    number: int
    new: NewConversation
    epoch: int
    first_epoch: int
    turns: list[tuple[list[int], list[int]]] = field(default_factory=list)
    histories: list[str] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    keys: dict[str, tuple[int, str]] = field(default_factory=dict)
    sure: str = ""
    poisoned: dict[str, str] = field(default_factory=dict)
    surely_poisoned: str = ""
    owner: str = ""
    running: Running | None = None
    lost: Running | None = None
    ended: tuple[Fence, Literal["commit", "abort"]] | None = None
    rebased: int = 0

    def tokens(self) -> list[int]:
        """Since the last rebase."""
        return [i for turn in self.turns[self.rebased :] for part in turn for i in part]

    def head(self, turn: int | None = None) -> str:
        head = GENESIS
        for input_ids, output_ids in self.turns[:turn]:
            head = chain_head(head, _array(input_ids), _array(output_ids))
        return head

    def history(self) -> str:
        return self.histories[-1] if self.histories else self.new.history

    def replay(self) -> ReplayLog:
        tokens, sinks = self.tokens(), self.new.sink_tokens
        recent = tokens[sinks:][-self.new.recent_tokens :]
        return ReplayLog(_array(tokens[:sinks]), _array(recent), len(tokens))

    def is_fresh(self) -> bool:
        return self.epoch == self.first_epoch

    def rank(self) -> tuple[int, int, float]:
        tokens = len(self.running.output) if self.running else float("inf")
        return self.epoch, len(self.turns), tokens


def _array(values: list[int]) -> TokenIds:
    ids: TokenIds = NO_IDS.copy()
    ids.resize(len(values), refcheck=False)
    ids[:] = values
    return ids


@dataclass(slots=True)
class World:
    """What the store should hold. `deleted` maps ids to the epochs they had."""

    lives: dict[str, Life] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    index: dict[tuple[str, str], tuple[str, int, int]] = field(default_factory=dict)

    def saved(self) -> World:
        """A copy to come back to."""
        return copy.deepcopy(self)


class Model:
    """Says what each operation must answer, and what it changes."""

    def __init__(self, limits: StoreLimits) -> None:
        self.world = World()
        self.now_s = 0.0
        self.recovered_s = 0.0
        self._limits = limits

    # --- what is expected ------------------------------------------------------------------------

    def life(self, identifier: str, tenant: str) -> Life | None:
        """What a call of this tenant reaches."""
        life = self.world.lives.get(identifier)
        return life if life and life.new.tenant == tenant else None

    def is_recovering(self) -> bool:
        return self.now_s < self.recovered_s

    def missing(self, identifier: str) -> type[StoreError]:
        """For clients."""
        gone = identifier in self.world.deleted
        return Recovering if self.is_recovering() and not gone else NotFound

    def lost(self, identifier: str) -> type[StoreError]:
        """For owners."""
        return NotFound if identifier in self.world.deleted else RolledBack

    def is_live(self, life: Life) -> bool:
        return life.running is not None and self.now_s < life.running.lease_until_s

    def begin(self, turn: BeginTurn) -> Outcome:
        """What `begin` answers unless it tells of an earlier result."""
        life = self.life(turn.conversation_id, turn.tenant)
        if life is None:
            return self.missing(turn.conversation_id)
        if self.is_recovering():
            return Recovering
        running = life.running
        if running and running.fence.nonce == turn.nonce:
            return Ownership
        if life.ended and life.ended[0].nonce == turn.nonce:
            return Fenced
        other_model = turn.fingerprint != life.new.fingerprint
        if running and running.key == (turn.key or turn.nonce):
            if running.request_hash != turn.request_hash:
                return KeyReused
            if self.is_live(life) and not turn.steal:
                return BusyTurn
            if other_model:
                return ModelChanged
            return Quarantined if self._is_too_much(running, turn) else Ownership
        return ModelChanged if other_model else self._start(life, turn)

    def _start(self, life: Life, turn: BeginTurn) -> Outcome:
        if turn.expect_turn not in (None, len(life.turns)):
            return TurnConflict
        if turn.expect_head not in (None, life.head()):
            return TurnConflict
        if self.is_live(life):
            return Conflict
        lost = life.lost if life.lost and life.lost.key == (turn.key or turn.nonce) else None
        return Quarantined if lost and self._is_too_much(lost, turn) else Ownership

    def _is_too_much(self, bereft: Running, turn: BeginTurn) -> bool:
        attempts, lapses = after_loss(bereft, turn)
        return attempts >= self._limits.max_attempts or lapses >= self._limits.max_lapses

    def standing(self, life: Life, fence: Fence) -> str:
        if life.running and life.running.fence == fence:
            return "running"
        if life.ended and life.ended[0] == fence:
            return life.ended[1]
        return "unknown" if fence.epoch > life.epoch else "fenced"

    def ending(self, identifier: str, tenant: str, fence: Fence, repeats: str) -> StoreRefusal:
        """What a write under a fence answers; `repeats` is how it may have ended the turn before."""
        life = self.life(identifier, tenant)
        if life is None:
            return self.lost(identifier)
        standing = self.standing(life, fence)
        if standing == "unknown":
            return RolledBack
        return None if standing in ("running", repeats) else Fenced

    def checkpoint(self, one: Checkpoint) -> StoreRefusal:
        refusal = self.ending(one.conversation_id, one.tenant, one.fence, "")
        life = self.life(one.conversation_id, one.tenant)
        if refusal or life is None or life.running is None:
            return refusal
        stored = life.running.output
        if one.k > len(stored):
            return RolledBack
        agrees = all(x == y for x, y in zip(stored[one.k :], one.token_ids.tolist(), strict=False))
        return None if agrees else Fenced

    def repair(self, identifier: str, given: Life) -> StoreRefusal:
        if identifier in self.world.deleted:
            return NotFound
        known = self.world.lives.get(identifier)
        if known and known.new.tenant != given.new.tenant:
            return NotFound
        return Fenced if known and known.rank() > given.rank() else None

    # --- what it changes -------------------------------------------------------------------------

    def began(self, turn: BeginTurn, found: Ownership) -> None:
        life = self.world.lives[turn.conversation_id]
        until_s, before = self.now_s + LEASE_S, life.running
        life.epoch = found.fence.epoch
        if before and before.fence.nonce == turn.nonce:
            before.lease_until_s = until_s
        elif before and before.key == (turn.key or turn.nonce):
            life.running = replace(
                before,
                claim=turn,
                fence=found.fence,
                lease_until_s=until_s,
                resumed=True,
            )
            life.running.attempts, life.running.lapses = after_loss(before, turn)
        else:
            key = turn.key or turn.nonce
            life.running = Running(
                *(turn, key, turn.request_hash, turn.input_ids, []),
                *(found.fence, until_s),
            )
            if life.lost and life.lost.key == key:
                life.running.attempts, life.running.lapses = after_loss(life.lost, turn)
                life.lost = None
            life.lost = before or life.lost

    def given_up(self, life: Life, turn: BeginTurn) -> None:
        key = turn.key or turn.nonce
        life.poisoned[key] = turn.request_hash
        life.surely_poisoned, life.sure = key, ""
        if life.running and life.running.key == key:
            life.ended, life.running = (life.running.fence, "abort"), None
        else:
            life.lost, life.running = life.running, None

    def checkpointed(self, one: Checkpoint) -> None:
        running = self.world.lives[one.conversation_id].running
        if running is None:
            return
        fresh = one.token_ids.tolist()[len(running.output) - one.k :]
        running.output += fresh
        if fresh:
            running.attempts = running.lapses = 0
        if running.lease_until_s - self.now_s < 0.75 * LEASE_S:
            running.lease_until_s = self.now_s + LEASE_S

    def committed(self, commit: TurnCommit) -> None:
        life = self.world.lives[commit.conversation_id]
        running = life.running
        if running and running.fence == commit.fence:
            life.turns.append((running.input_ids.tolist(), commit.output_ids.tolist()))
            life.histories.append(commit.history)
            life.messages += commit.messages
            life.keys[running.key] = len(life.turns), running.request_hash
            life.sure, life.surely_poisoned = running.key, ""
            life.owner = running.claim.replica
            life.running, life.ended = None, (commit.fence, "commit")
        self.indexed(life)

    def aborted(self, identifier: str, fence: Fence) -> None:
        life = self.world.lives[identifier]
        if life.running and life.running.fence == fence:
            life.running, life.ended = None, (fence, "abort")

    def indexed(self, life: Life) -> None:
        if life.turns:
            entry = life.new.conversation_id, life.number, len(life.turns)
            self.world.index[life.new.tenant, life.history()] = entry

    def repaired(self, identifier: str, given: Life, first_message: int) -> None:
        known = self.world.lives.get(identifier)
        if known and known.rank() >= given.rank():
            self.indexed(known)
            return
        life = copy.deepcopy(given)
        if known:
            for key, (turn, request_hash) in known.keys.items():
                if known.turns[:turn] == life.turns[:turn]:
                    life.keys.setdefault(key, (turn, request_hash))
            life.poisoned, life.lost = dict(known.poisoned), known.lost
            life.messages[:first_message] = known.messages[:first_message]
        if life.running:
            # It names no results: what the store has lost of them stays lost.
            sure = known.sure if known else ""
            turn = known.keys[sure][0] if known and sure else 0
            fits = known is not None and known.turns == life.turns
            life.sure = sure if fits and turn == len(life.turns) else ""
            life.owner = known.owner if known else life.running.claim.replica
            life.running.lease_until_s = self.now_s + LEASE_S
            life.running.attempts = life.running.lapses = 0
            life.running.resumed = False
        life.ended, life.first_epoch, life.surely_poisoned = None, -1, ""
        self.world.lives[identifier] = life
        self.indexed(life)


StoreRefusal = type[StoreError] | None


def after_loss(bereft: Running, turn: BeginTurn) -> tuple[int, int]:
    """Its owners seen dead, and otherwise gone, once `turn` has found it without one."""
    is_dead = turn.steal and not turn.blameless
    return bereft.attempts + is_dead, bereft.lapses + (not is_dead)


def snapshot_of(life: Life, record: Conversation, first_message: int) -> Snapshot:
    """What the owner of `life` knows; `record` is what it was answered last."""
    running: RunningSnapshot | None = None
    results: tuple[RememberedTurn, ...] = ()
    if life.running:
        own = life.running
        running = RunningSnapshot(
            *(own.fence.nonce, own.key, own.request_hash, own.input_ids, _array(own.output)),
            LEASE_S,
        )
    else:
        turn, request_hash = life.keys[life.sure]
        reply = life.turns[-1][1]
        results = (
            RememberedTurn(
                *(life.sure, request_hash, turn, life.head()),
                *(len(life.tokens()) - len(reply), _array(reply), {}),
            ),
        )
    return Snapshot(
        conversation=record,
        replay=life.replay(),
        replay_windows=life.new.replay_windows,
        messages=tuple(life.messages[first_message:]),
        first_message=first_message,
        running=running,
        results=results,
    )
