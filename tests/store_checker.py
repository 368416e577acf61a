"""Random interleavings of replicas and clients against a store, checked by the simplest model of it.

The model keeps every token and every turn for ever, so that it needs no cleverness: hashes and replay
ids are recomputed from the whole log. Replicas crash (never end a turn), wake up late with stale
fences, and lose replies (send a call twice); clocks move; ids are deleted and created again.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cluster.conversation import (
    GENESIS,
    BeginTurn,
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
)
from cluster.store import (
    AlreadyExists,
    Conflict,
    Fenced,
    HistoryMatch,
    ModelChanged,
    NotFound,
    RolledBack,
    StoreError,
    TurnConflict,
)
from tests.store_contract import StoreEnv

LEASE_S = 10.0
TENANTS = ("ann", "bob")
REPLICAS = ("r0", "r1", "r2")
MODEL = "model"


class Violation(Exception):
    """The store did something that the protocol forbids."""


@dataclass(slots=True)
class Life:
    """One life of a conversation id, remembered whole."""

    new: NewConversation
    turns: list[tuple[TokenIds, TokenIds]] = field(default_factory=list)
    histories: list[str] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    keys: dict[str, int] = field(default_factory=dict)
    owner: str = ""
    running: BeginTurn | None = None
    fence: Fence | None = None
    lease_until_s: float = 0.0
    ended: tuple[Fence, Literal["commit", "abort"]] | None = None

    def has_begun(self) -> bool:
        return bool(self.turns or self.running or self.ended)

    def tokens(self) -> list[int]:
        return [int(i) for turn in self.turns for part in turn for i in part]

    def head(self, turn: int | None = None) -> str:
        head = GENESIS
        for input_ids, output_ids in self.turns[:turn]:
            head = chain_head(head, input_ids, output_ids)
        return head

    def history(self) -> str:
        return self.histories[-1] if self.histories else self.new.history


@dataclass(slots=True)
class Claim:
    """What a replica believes to hold, perhaps wrongly."""

    turn: BeginTurn
    ownership: Ownership
    commit: TurnCommit


class Checker:
    """Drives `env` by `seed`. `run` raises Violation at the first difference from the model."""

    def __init__(self, env: StoreEnv, seed: int) -> None:
        self._env = env
        self._store = env.store
        self._random = random.Random(seed)
        self._now_s = 0.0
        self._ids = [f"conv_{seed % 2**64:016x}{n:016x}" for n in range(3)]
        self._genesis = f"{self._random.getrandbits(256):064x}"
        self._lives: dict[str, Life] = {}
        self._claims: list[Claim] = []
        self._epochs: dict[str, int] = {}
        self._index: dict[tuple[str, str], tuple[Life, int]] = {}
        self.commits = 0
        self.takeovers = 0

    async def run(self, steps: int) -> None:
        """Take `steps` random steps, then look at everything once more."""
        actions: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (12, self._create),
            (30, self._begin),
            (8, self._begin_again),
            (40, self._commit),
            (6, self._abort),
            (6, self._renew),
            (12, self._advance),
            (1, self._delete),
            (6, self._look),
            (8, self._match),
        ]
        weights = [weight for weight, _ in actions]
        for _ in range(steps):
            [(_, action)] = self._random.choices(actions, weights)
            await action()
        for conversation_id in self._ids:
            await self._check_record(conversation_id)

    # --- steps -----------------------------------------------------------------------------------

    async def _create(self) -> None:
        identifier = self._random.choice(self._ids)
        life = self._lives.get(identifier)
        new = NewConversation(
            conversation_id=identifier,
            tenant=self._random.choice(TENANTS),
            fingerprint=MODEL,
            sink_tokens=self._random.choice((0, 3, 4)),
            window_tokens=5,
            replay_windows=2,
            history=self._genesis,
        )
        if life is not None and self._random.random() < 0.5:
            new = life.new
        fresh = life is not None and new == life.new and not life.has_begun()
        expected = None if life is None or fresh else AlreadyExists
        if await self._expect(expected, lambda: self._store.create(new)) and life is None:
            self._lives[identifier] = Life(new)

    async def _begin(self) -> None:
        identifier = self._random.choice(self._ids)
        life = self._lives.get(identifier)
        turn = BeginTurn(
            conversation_id=identifier,
            tenant=self._tenant(life),
            replica=self._random.choice(REPLICAS),
            input_ids=self._some_ids(),
            fingerprint=MODEL if self._random.random() < 0.97 else "other",
            lease_s=LEASE_S,
            expect_turn=self._perhaps(len(life.turns) if life else 0, self._random.randrange(4)),
            expect_head=self._perhaps(life.head() if life else GENESIS, GENESIS),
            nonce=f"{self._random.getrandbits(128):032x}",
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
        life = self._lives.get(turn.conversation_id)
        expected = self._begin_error(life, turn)
        known = self._committed_as(life, turn)
        first = await self._outcome(lambda: self._store.begin(turn))
        if isinstance(first, CommittedTurn):
            self._check_committed(life, known, first)
            return
        if life and known == len(life.turns):
            raise Violation("the newest result was forgotten")
        ownership = await self._expect(expected, lambda: self._store.begin(turn), first=first)
        if not isinstance(ownership, Ownership) or life is None:
            return
        if life.running is None or life.running.nonce != turn.nonce:
            self.takeovers += life.running is not None
            self._check_epoch(turn.conversation_id, ownership.fence.epoch)
            life.running, life.fence = turn, ownership.fence
        life.lease_until_s = self._now_s + LEASE_S
        self._same("fence", ownership.fence, life.fence)
        self._check_replay(life, ownership)
        self._check_view(life, ownership.conversation)
        self._claims.append(Claim(turn, ownership, self._commit_of(turn, ownership)))

    def _committed_as(self, life: Life | None, turn: BeginTurn) -> int | None:
        """Which turn of `life` was committed under this key, as long as that is what `begin` tells."""
        if life is None or life.new.tenant != turn.tenant:
            return None
        if life.ended and life.ended[0].nonce == turn.nonce:
            return None
        return life.keys.get(turn.key or turn.nonce)

    def _check_committed(self, life: Life | None, known: int | None, found: CommittedTurn) -> None:
        if life is None or known is None:
            raise Violation("a turn that was never committed was answered")
        self._same("turn", found.turn, known)
        self._same("reply", found.reply_ids.tolist(), life.turns[known - 1][1].tolist())
        self._same("head", found.head, life.head(known))

    def _begin_error(self, life: Life | None, turn: BeginTurn) -> type[StoreError] | None:
        if life is None or life.new.tenant != turn.tenant:
            return NotFound
        if life.running and life.running.nonce == turn.nonce:
            return None
        if life.ended and life.ended[0].nonce == turn.nonce:
            return Fenced
        if turn.fingerprint != MODEL:
            return ModelChanged
        if turn.expect_turn not in (None, len(life.turns)):
            return TurnConflict
        if turn.expect_head not in (None, life.head()):
            return TurnConflict
        return Conflict if self._is_live(life) else None

    async def _commit(self) -> None:
        claim = self._some_claim()
        if claim is not None:
            await self._try_commit(claim)

    async def _try_commit(self, claim: Claim) -> None:
        commit = claim.commit
        life, standing = self._standing(claim)
        expected = self._ending_error(claim, standing, "commit")
        record = await self._expect(expected, lambda: self._store.commit(commit))
        if not isinstance(record, Conversation) or life is None:
            return
        if standing == "running":
            self.commits += 1
            life.turns.append((claim.turn.input_ids, commit.output_ids))
            life.histories.append(commit.history)
            life.keys[claim.turn.key or claim.turn.nonce] = len(life.turns)
            life.messages += commit.messages
            life.owner = claim.turn.replica
            life.running, life.ended = None, (commit.fence, "commit")
        self._index[commit.tenant, life.history()] = life, len(life.turns)
        self._check_view(life, record)

    async def _abort(self) -> None:
        claim = self._some_claim()
        if claim is None:
            return
        fence, turn = claim.ownership.fence, claim.turn
        life, standing = self._standing(claim)
        expected = self._ending_error(claim, standing, "abort")
        await self._expect(
            expected, lambda: self._store.abort(turn.tenant, turn.conversation_id, fence)
        )
        if life and standing == "running":
            life.running, life.ended = None, (fence, "abort")

    async def _renew(self) -> None:
        claim = self._some_claim()
        if claim is None:
            return
        fence, turn = claim.ownership.fence, claim.turn
        life, standing = self._standing(claim)
        expected = self._ending_error(claim, standing, None)
        await self._expect(
            expected, lambda: self._store.renew(turn.tenant, turn.conversation_id, fence, LEASE_S)
        )
        if life and standing == "running":
            life.lease_until_s = self._now_s + LEASE_S

    async def _advance(self) -> None:
        seconds = self._random.choice((1.0, 3.0, 4.0, 11.0))
        self._now_s += seconds
        await self._env.advance(seconds)

    async def _delete(self) -> None:
        identifier = self._random.choice(self._ids)
        life = self._lives.get(identifier)
        tenant = self._tenant(life)
        missing = life is None or life.new.tenant != tenant
        await self._expect(
            NotFound if missing else None,
            lambda: self._store.delete(tenant, identifier),
            repeated=NotFound,
        )
        if not missing:
            del self._lives[identifier]

    async def _look(self) -> None:
        await self._check_record(self._random.choice(self._ids))

    async def _match(self) -> None:
        if not self._index:
            return
        tenant, history = self._random.choice(list(self._index))
        life, turn = self._index[tenant, history]
        alive = self._lives.get(life.new.conversation_id) is life and len(life.turns) == turn
        expected = HistoryMatch(life.new.conversation_id, turn) if alive else None
        self._same("match", await self._store.match_history(tenant, history), expected)
        stranger = TENANTS[1 - TENANTS.index(tenant)]
        if (stranger, history) not in self._index:
            self._same("match", await self._store.match_history(stranger, history), None)

    # --- the model -------------------------------------------------------------------------------

    def _is_live(self, life: Life) -> bool:
        return life.running is not None and self._now_s < life.lease_until_s

    def _standing(self, claim: Claim) -> tuple[Life | None, str | None]:
        """The life that a claim's calls reach, and whether it runs, or how it was the last to end."""
        life = self._lives.get(claim.turn.conversation_id)
        if life is None or life.new.tenant != claim.turn.tenant:
            return None, None
        if life.running and life.fence == claim.ownership.fence:
            return life, "running"
        if life.ended and life.ended[0] == claim.ownership.fence:
            return life, life.ended[1]
        return life, None

    def _ending_error(
        self, claim: Claim, standing: str | None, repeats: str | None
    ) -> type[StoreError] | None:
        life = self._lives.get(claim.turn.conversation_id)
        if life is None:
            return NotFound
        if life.new.tenant != claim.turn.tenant:
            return RolledBack
        return None if standing is not None and standing in ("running", repeats) else Fenced

    def _commit_of(self, turn: BeginTurn, ownership: Ownership) -> TurnCommit:
        record = ownership.conversation
        output_ids = self._some_ids()
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
            head=chain_head(record.head, turn.input_ids, output_ids),
            history=history,
            messages=messages,
        )

    # --- checks ----------------------------------------------------------------------------------

    async def _expect(
        self,
        error: type[StoreError] | None,
        call: Callable[[], Awaitable[Any]],
        repeated: type[StoreError] | None = None,
        first: Any = None,
    ) -> Any:
        """Call, sometimes twice (the first reply was lost); both answers must be as the model says."""
        answer = await self._outcome(call) if first is None else first
        self._same("outcome", type(answer) if isinstance(answer, StoreError) else None, error)
        if self._random.random() < 0.25:
            again = await self._outcome(call)
            kind = type(again) if isinstance(again, StoreError) else None
            self._same("outcome of a repetition", kind, error or repeated)
            if isinstance(answer, Conversation | Ownership):
                self._same("repeated answer", _comparable(again), _comparable(answer))
        return None if isinstance(answer, StoreError) else answer or True

    @staticmethod
    async def _outcome(call: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await call()
        except StoreError as error:
            return error

    async def _check_record(self, conversation_id: str) -> None:
        life = self._lives.get(conversation_id)
        tenant = self._tenant(life)
        missing = life is None or life.new.tenant != tenant
        record = await self._expect(
            NotFound if missing else None, lambda: self._store.get(tenant, conversation_id)
        )
        if isinstance(record, Conversation) and life is not None:
            self._check_view(life, record)
            transcript = await self._store.transcript(tenant, conversation_id, 10_000)
            self._same("transcript", (transcript[0], list(transcript[1])), (0, life.messages))

    def _check_view(self, life: Life, record: Conversation) -> None:
        live = life.running if self._is_live(life) else None
        self._same("turn", record.turn, len(life.turns))
        self._same("token_count", record.token_count, len(life.tokens()))
        self._same("hash chain", record.head, life.head())
        self._same("history", record.history, life.history())
        self._same("running", record.running, live is not None)
        self._same("owner", record.owner, live.replica if live else life.owner)

    def _check_replay(self, life: Life, ownership: Ownership) -> None:
        tokens, sinks = life.tokens(), life.new.sink_tokens
        replay = ownership.replay
        self._same("replay length", replay.token_count, len(tokens))
        self._same("sink ids", replay.sink_ids.tolist(), tokens[:sinks])
        recent = tokens[sinks:][-life.new.recent_tokens :]
        self._same("recent ids", replay.recent_ids.tolist(), recent)

    def _check_epoch(self, conversation_id: str, epoch: int) -> None:
        if epoch <= self._epochs.get(conversation_id, 0):
            raise Violation(f"epoch {epoch} was issued before")
        self._epochs[conversation_id] = epoch

    def _same(self, what: str, found: object, expected: object) -> None:
        if found != expected:
            raise Violation(f"{what}: {found!r} instead of {expected!r}")

    # --- choices ---------------------------------------------------------------------------------

    def _some_claim(self) -> Claim | None:
        """Mostly a recent claim; sometimes one that woke up late."""
        if not self._claims:
            return None
        recent = self._claims[-3:] if self._random.random() < 0.8 else self._claims
        return self._random.choice(recent)

    def _some_ids(self) -> TokenIds:
        length = self._random.choice((0, 1, 2, 3, 7, 20))
        return np.array([self._random.randrange(1000) for _ in range(length)], dtype=np.int32)

    def _tenant(self, life: Life | None) -> str:
        owner = life.new.tenant if life else TENANTS[0]
        return owner if self._random.random() < 0.95 else self._random.choice(TENANTS)

    def _perhaps(self, right: Any, other: Any) -> Any:
        return self._random.choice((None, None, None, right, right, right, right, right, other))


def _comparable(answer: Any) -> Any:
    """Without arrays; those are compared with the log."""
    return (answer.fence, answer.conversation) if isinstance(answer, Ownership) else answer
