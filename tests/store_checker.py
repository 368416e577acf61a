"""Random interleavings of replicas and clients against a store, checked by the simplest model of it.

Replicas crash (never end a turn), wake up late with stale fences, and lose replies (send a call twice);
turns are stolen; clocks move; ids are deleted and created again; the store restarts, also with what it
held a while ago, and owners repair it.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.conversation import (
    GENESIS,
    BeginTurn,
    BusyTurn,
    Checkpoint,
    CommittedTurn,
    Conversation,
    Message,
    NewConversation,
    Ownership,
    Rebase,
    TokenIds,
    TurnCommit,
    chain_head,
    history_hash,
)
from cluster.store import (
    AlreadyExists,
    Conflict,
    HistoryMatch,
    KeyReused,
    Quarantined,
    Recovering,
    StoreError,
    StoreLimits,
    TurnConflict,
)
from tests.store_contract import StoreEnv
from tests.store_model import LEASE_S, Life, Model, World, snapshot_of

TENANTS = ("ann", "bob")
REPLICAS = ("r0", "r1", "r2")
MODELS = ("model", "other")


class Violation(Exception):
    """The store did something that the protocol forbids."""


@dataclass(slots=True)
class Claim:
    """What a replica believes to hold, perhaps wrongly: its fence, what it is going to say, and the
    conversation as it was when the store answered it last."""

    turn: BeginTurn
    ownership: Ownership
    commit: TurnCommit
    record: Conversation
    life: Life
    begun: Life


class Checker:
    """Drives `env` by `seed`. `run` raises Violation at the first difference from the model."""

    def __init__(self, env: StoreEnv, seed: int, limits: StoreLimits) -> None:
        self._env = env
        self._store = env.store
        self._random = random.Random(seed)
        self._model = Model(limits)
        self._limits = limits
        self._ids = [f"conv_{seed % 2**64:016x}{n:016x}" for n in range(3)]
        self._genesis = f"{self._random.getrandbits(256):064x}"
        self._claims: list[Claim] = []
        self._epochs: dict[str, int] = {}
        self._saved: tuple[object, World] | None = None
        self.count = Counter[str]()

    async def run(self, steps: int) -> None:
        """Take `steps` random steps, then look at everything once more."""
        actions: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (12, self._create),
            (30, self._begin),
            (12, self._begin_again),
            (30, self._checkpoint),
            (40, self._commit),
            (6, self._abort),
            (6, self._renew),
            (12, self._advance),
            (1, self._delete),
            (2, self._rebase),
            (3, self._save),
            (2, self._restart),
            (3, self._roll_back),
            (10, self._repair),
            (6, self._look),
            (8, self._match),
        ]
        weights = [weight for weight, _ in actions]
        await self._env.advance(self._limits.recovery_s + 1.0)
        for _ in range(steps):
            [(_, action)] = self._random.choices(actions, weights)
            await action()
        for conversation_id in self._ids:
            await self._check_record(conversation_id)

    # --- beginning -------------------------------------------------------------------------------

    async def _create(self) -> None:
        identifier = self._random.choice(self._ids)
        life = self._model.world.lives.get(identifier)
        new = NewConversation(
            conversation_id=identifier,
            tenant=self._random.choice(TENANTS),
            fingerprint=MODELS[0],
            sink_tokens=self._random.choice((0, 3, 4)),
            window_tokens=5,
            replay_windows=2,
            history=self._genesis,
        )
        if life is not None and self._random.random() < 0.5:
            new = life.new
        fresh = life is not None and new == life.new and life.is_fresh()
        expected = None if life is None or fresh else AlreadyExists
        record = await self._expect(expected, lambda: self._store.create(new))
        if isinstance(record, Conversation) and life is None:
            number = self._random.getrandbits(64)
            born = Life(number, new, record.epoch, record.epoch)
            self._model.world.lives[identifier] = born
            self._model.world.deleted.discard(identifier)

    async def _begin(self) -> None:
        identifier = self._random.choice(self._ids)
        life = self._model.world.lives.get(identifier)
        key = self._random.choice(("", "", f"k{self._random.randrange(30)}"))
        if life and life.running and self._random.random() < 0.5:
            key = life.running.key
        elif life and life.keys and self._random.random() < 0.1:
            key = self._random.choice(list(life.keys)[-3:])
        model = life.new.fingerprint if life else MODELS[0]
        turn = BeginTurn(
            conversation_id=identifier,
            tenant=self._tenant(life),
            replica=self._random.choice(REPLICAS),
            input_ids=self._some_ids(),
            fingerprint=model if self._random.random() < 0.97 else self._random.choice(MODELS),
            lease_s=LEASE_S,
            expect_turn=self._perhaps(len(life.turns) if life else 0, self._random.randrange(4)),
            expect_head=self._perhaps(life.head() if life else GENESIS, GENESIS),
            nonce=f"{self._random.getrandbits(128):032x}",
            key=key,
            request_hash=self._request_hash(life, key),
            steal=self._random.random() < 0.5,
            blameless=self._random.random() < 0.3,
        )
        await self._try_begin(turn)

    async def _begin_again(self) -> None:
        """A delayed duplicate of a claim; then perhaps its first sender wakes up."""
        if self._claims:
            claim = self._random.choice(self._claims)
            await self._try_begin(claim.turn)
            if self._random.random() < 0.5:
                await self._try_commit(claim)

    async def _try_begin(self, turn: BeginTurn) -> None:
        life = self._model.life(turn.conversation_id, turn.tenant)
        expected = self._model.begin(turn)
        first = await self._outcome(lambda: self._store.begin(turn))
        if self._tells_a_result(life, turn, first):
            return
        self._same("begin", type(first), expected)
        if life is None:
            return
        if isinstance(first, BusyTurn) and life.running:
            found = first.owner, first.turn, first.output_ids.tolist()
            wanted = life.running.claim.replica, len(life.turns) + 1, life.running.output
            self._same("busy", found, wanted)
        if isinstance(first, Quarantined):
            self._model.given_up(life, turn)
        if isinstance(first, Ownership):
            await self._check_claim(turn, life, first)

    async def _check_claim(self, turn: BeginTurn, life: Life, found: Ownership) -> None:
        before = life.running
        if before is None or before.fence.nonce != turn.nonce:
            self.count["takeovers"] += before is not None
            if found.fence.epoch <= self._epochs.get(turn.conversation_id, 0):
                raise Violation(f"epoch {found.fence.epoch} was issued before")
            self._epochs[turn.conversation_id] = found.fence.epoch
        self._model.began(turn, found)
        if self._random.random() < 0.25:
            again = await self._outcome(lambda: self._store.begin(turn))
            self._same("repeated begin", type(again), Ownership)
            self._same("repeated fence", again.fence, found.fence)
        running = life.running
        if running is None:
            raise Violation("a claim without a turn")
        self._same("fence", found.fence, running.fence)
        self._same("input", found.input_ids.tolist(), running.input_ids.tolist())
        self._same("output", found.output_ids.tolist(), running.output)
        lost = running.attempts + running.lapses
        self._same("attempt", (found.attempt, found.resumed), (lost, running.resumed))
        replay = life.replay()
        self._same("sink ids", found.replay.sink_ids.tolist(), replay.sink_ids.tolist())
        self._same("recent ids", found.replay.recent_ids.tolist(), replay.recent_ids.tolist())
        self._same("tokens", found.replay.token_count, replay.token_count)
        self._check_view(life, found.conversation)
        commit = self._commit_of(found)
        begun = copy.deepcopy(life)
        claim = Claim(turn, found, commit, found.conversation, copy.deepcopy(life), begun)
        self._claims.append(claim)

    def _tells_a_result(self, life: Life | None, turn: BeginTurn, found: object) -> bool:
        """Whether `found` rightly tells what became of the turn of this key. Results may be forgotten,
        but not the newest."""
        key = turn.key or turn.nonce
        expected = self._model.begin(turn)
        before = life and (
            expected is Recovering
            or (life.running and life.running.fence.nonce == turn.nonce)
            or (life.ended and life.ended[0].nonce == turn.nonce)
        )
        if life is None or before:
            return False
        if key in life.keys:
            number, request_hash = life.keys[key]
            if isinstance(found, KeyReused):
                return request_hash != turn.request_hash
            if isinstance(found, CommittedTurn) and request_hash == turn.request_hash:
                wanted = number, life.head(number), life.turns[number - 1][1]
                self._same("result", (found.turn, found.head, found.reply_ids.tolist()), wanted)
                return True
            if life.sure == key:
                raise Violation("the newest result is forgotten")
        if key in life.poisoned:
            if isinstance(found, KeyReused):
                return life.poisoned[key] != turn.request_hash
            if isinstance(found, Quarantined) and life.poisoned[key] == turn.request_hash:
                return True
            if life.surely_poisoned == key:
                raise Violation("a quarantined turn runs again")
        return False

    # --- going on --------------------------------------------------------------------------------

    async def _checkpoint(self) -> None:
        """For one to three claims at once, as they stand one after the other."""
        batch: list[tuple[Claim, Checkpoint]] = []
        for _ in range(self._random.randrange(1, 4)):
            claim = self._some_claim()
            if claim is not None and all(claim.turn is not other.turn for other, _ in batch):
                batch.append((claim, self._tokens_of(claim)))
        answers = await self._store.checkpoint([one for _, one in batch])
        for (claim, one), answer in zip(batch, answers, strict=True):
            expected = self._model.checkpoint(one)
            self._same("checkpoint", type(answer) if answer else None, expected)
            if expected is None:
                self._model.checkpointed(one)
                own = claim.life.running
                stored = self._model.world.lives[one.conversation_id].running
                if own and stored:
                    own.output = list(stored.output)

    def _tokens_of(self, claim: Claim) -> Checkpoint:
        planned = claim.commit.output_ids
        known = len(claim.life.running.output) if claim.life.running else 0
        k = self._random.choice((known, known, known, known, max(0, known - 2), known + 1))
        token_ids = planned[k : k + self._random.randrange(0, 4)].copy()
        if len(token_ids) and self._random.random() < 0.03:
            token_ids[0] += 1
        fence = claim.ownership.fence
        return Checkpoint(
            claim.turn.conversation_id, claim.turn.tenant, fence, k, token_ids, LEASE_S
        )

    async def _commit(self) -> None:
        claim = self._some_claim()
        if claim is not None:
            await self._try_commit(claim)

    async def _try_commit(self, claim: Claim) -> None:
        commit = claim.commit
        expected = self._model.ending(commit.conversation_id, commit.tenant, commit.fence, "commit")
        life = self._model.world.lives.get(commit.conversation_id)
        self.count["commits"] += bool(life and life.running and life.running.fence == commit.fence)
        answer = await self._outcome(lambda: self._store.commit(commit))
        self._same("commit", type(answer) if isinstance(answer, StoreError) else None, expected)
        if expected is None and life is not None:
            self._model.committed(commit)
            again = await self._outcome(lambda: self._store.commit(commit))
            self._same("repeated commit", again, answer)
            self._check_view(life, answer)
            if not life.running:
                claim.record, claim.life = answer, copy.deepcopy(life)

    async def _abort(self) -> None:
        claim = self._some_claim()
        if claim is not None:
            turn, fence = claim.turn, claim.ownership.fence
            identifier = turn.conversation_id
            expected = self._model.ending(identifier, turn.tenant, fence, "abort")
            await self._expect(expected, lambda: self._store.abort(turn.tenant, identifier, fence))
            if expected is None:
                self._model.aborted(identifier, fence)

    async def _renew(self) -> None:
        claim = self._some_claim()
        if claim is not None:
            turn, fence = claim.turn, claim.ownership.fence
            identifier = turn.conversation_id
            expected = self._model.ending(identifier, turn.tenant, fence, "")
            await self._expect(
                expected, lambda: self._store.renew(turn.tenant, identifier, fence, LEASE_S)
            )
            running = self._model.world.lives[identifier].running if expected is None else None
            if running:
                running.lease_until_s = self._model.now_s + LEASE_S

    async def _advance(self) -> None:
        seconds = self._random.choice((10.0, 30.0, 40.0, 110.0))
        self._model.now_s += seconds
        await self._env.advance(seconds)

    async def _delete(self) -> None:
        identifier = self._random.choice(self._ids)
        tenant = self._tenant(self._model.world.lives.get(identifier))
        missing = self._model.life(identifier, tenant) is None
        expected = self._model.missing(identifier) if missing else None
        await self._expect(expected, lambda: self._store.delete(tenant, identifier), once=True)
        if not missing:
            del self._model.world.lives[identifier]
            self._model.world.deleted.add(identifier)

    async def _rebase(self) -> None:
        identifier = self._random.choice(self._ids)
        life = self._model.world.lives.get(identifier)
        if life is None:
            return
        head = life.head() if self._random.random() < 0.9 else GENESIS
        sizes = self._random.choice(((0, 4, 3), (3, 5, 2)))
        rebase = Rebase(identifier, life.new.tenant, head, self._random.choice(MODELS), *sizes)
        same = (life.new.fingerprint, life.new.sink_tokens, life.new.window_tokens)
        changes = (rebase.fingerprint, rebase.sink_tokens, rebase.window_tokens) != same
        expected: type[StoreError] | None = None
        if self._model.is_recovering():
            expected = Recovering
        elif head != life.head():
            expected = TurnConflict
        elif changes and self._model.is_live(life):
            expected = Conflict
        record = await self._expect(expected, lambda: self._store.rebase(rebase))
        if isinstance(record, Conversation):
            if changes:
                life.new = NewConversation(
                    *(identifier, life.new.tenant, rebase.fingerprint, *sizes),
                    history=life.new.history,
                )
                life.running, life.owner, life.rebased = None, "", len(life.turns)
                life.epoch = self._epochs[identifier] = record.epoch
                life.poisoned = {} if life.sure else life.poisoned
            self._check_view(life, record)

    # --- a store in trouble ----------------------------------------------------------------------

    async def _save(self) -> None:
        self._saved = await self._env.save(), self._model.world.saved()

    async def _restart(self) -> None:
        await self._env.restart()
        await self._wake()

    async def _roll_back(self) -> None:
        if self._saved is not None:
            kept, world = self._saved
            await self._env.roll_back(kept)
            await self._wake()
            self._model.world = world.saved()
            self.count["roll-backs"] += 1

    async def _wake(self) -> None:
        await self._store.pulse()
        self._model.recovered_s = self._model.now_s + self._limits.recovery_s

    async def _repair(self) -> None:
        claim = self._some_claim()
        if claim is None:
            return
        given, identifier = claim.life, claim.turn.conversation_id
        record = claim.record
        if self._random.random() < 0.2:
            # A repair that was on its way for long.
            given, record = claim.begun, claim.ownership.conversation
        if given.running is None and given.sure != (claim.turn.key or claim.turn.nonce):
            return
        known = self._model.world.lives.get(identifier)
        first = max(0, len(given.messages) - 2)
        if known is None or len(known.messages) < first or self._random.random() < 0.5:
            first = 0
        snapshot = snapshot_of(given, record, first)
        expected = self._model.repair(identifier, given)
        self.count["repairs"] += expected is None and (known is None or known.rank() < given.rank())
        await self._expect(expected, lambda: self._store.repair(snapshot))
        if expected is None:
            self._model.repaired(identifier, given, first)

    # --- looking ---------------------------------------------------------------------------------

    async def _look(self) -> None:
        await self._check_record(self._random.choice(self._ids))

    async def _match(self) -> None:
        index = self._model.world.index
        if not index or self._model.is_recovering():
            return
        tenant, history = self._random.choice(list(index))
        identifier, number, turn = index[tenant, history]
        life = self._model.life(identifier, tenant)
        same = life is not None and life.number == number and len(life.turns) == turn
        same = same and life is not None and life.history() == history
        expected = HistoryMatch(identifier, turn) if same else None
        found = await self._store.match_history(tenant, history)
        # The entry of the commit before the last is there too, unless the record was repaired since.
        is_older = life is not None and life.number == number and len(life.turns) == turn + 1
        is_older = is_older and life is not None and life.histories[turn - 1] == history
        if not (is_older and found == HistoryMatch(identifier, turn)):
            self._same("match", found, expected)
        stranger = TENANTS[1 - TENANTS.index(tenant)]
        if (stranger, history) not in index:
            self._same("match", await self._store.match_history(stranger, history), None)

    async def _check_record(self, identifier: str) -> None:
        tenant = self._tenant(self._model.world.lives.get(identifier))
        life = self._model.life(identifier, tenant)
        expected = self._model.missing(identifier) if life is None else None
        if self._model.is_recovering() and life is not None:
            expected = Recovering
        record = await self._expect(expected, lambda: self._store.get(tenant, identifier))
        if isinstance(record, Conversation) and life is not None:
            self._check_view(life, record)
            first, messages = await self._store.transcript(tenant, identifier, 10_000)
            self._same("transcript", (first, list(messages)), (0, life.messages))

    def _check_view(self, life: Life, record: Conversation) -> None:
        live = life.running if self._model.is_live(life) else None
        self._same("turn", record.turn, len(life.turns))
        self._same("token_count", record.token_count, len(life.tokens()))
        self._same("hash chain", record.head, life.head())
        self._same("history", record.history, life.history())
        self._same("model", record.fingerprint, life.new.fingerprint)
        self._same("running", record.running, live is not None)
        self._same("owner", record.owner, live.claim.replica if live else life.owner)
        self._same("epoch", record.epoch, life.epoch)

    async def _expect(
        self,
        error: type[StoreError] | None,
        call: Callable[[], Awaitable[Any]],
        once: bool = False,
    ) -> Any:
        """Call, sometimes twice (the first reply was lost); both answers must be as the model says."""
        answer = await self._outcome(call)
        self._same("outcome", type(answer) if isinstance(answer, StoreError) else None, error)
        if not once and self._random.random() < 0.25:
            again = await self._outcome(call)
            kind = type(again) if isinstance(again, StoreError) else None
            self._same("outcome of a repetition", kind, error)
            if isinstance(answer, Conversation):
                self._same("repeated answer", again, answer)
        return answer

    @staticmethod
    async def _outcome(call: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await call()
        except StoreError as error:
            return error

    def _same(self, what: str, found: object, expected: object) -> None:
        if found != expected:
            raise Violation(f"{what}: {found!r} instead of {expected!r}")

    # --- choices ---------------------------------------------------------------------------------

    def _commit_of(self, ownership: Ownership) -> TurnCommit:
        record = ownership.conversation
        output_ids = np.concatenate([ownership.output_ids, self._some_ids()])
        messages = (
            Message("user", str(self._random.randrange(2))),
            Message("assistant", str(self._random.randrange(2))),
        )
        history = record.history
        for message in messages:
            history = history_hash(history, message.role, message.content)
        return TurnCommit(
            conversation_id=record.conversation_id,
            tenant=record.tenant,
            fence=ownership.fence,
            output_ids=output_ids,
            head=chain_head(record.head, ownership.input_ids, output_ids),
            history=history,
            messages=messages,
        )

    def _some_claim(self) -> Claim | None:
        """Mostly a recent claim; sometimes one that woke up late."""
        if not self._claims:
            return None
        recent = self._claims[-3:] if self._random.random() < 0.8 else self._claims
        return self._random.choice(recent)

    def _some_ids(self) -> TokenIds:
        length = self._random.choice((0, 1, 2, 3, 7, 20))
        return np.array([self._random.randrange(1000) for _ in range(length)], dtype=np.int32)

    def _request_hash(self, life: Life | None, key: str) -> str:
        if self._random.random() < 0.1:
            return "another"
        known = life.keys.get(key) if life and key else None
        if life and life.running and life.running.key == key:
            return life.running.request_hash
        return known[1] if known else f"of {key}"

    def _tenant(self, life: Life | None) -> str:
        owner = life.new.tenant if life else TENANTS[0]
        return owner if self._random.random() < 0.95 else self._random.choice(TENANTS)

    def _perhaps(self, right: Any, other: Any) -> Any:
        return self._random.choice((None, None, None, right, right, right, right, right, other))
