"""A turn that outlives its replicas: the items of one turn, whoever comes to run it.

    call -> items ... -> TurnDone
      ^        |
      +- pause + the replica is lost, hands the turn over, or nobody can take it yet

A call that breaks off is made again for the same turn, with the tokens seen so far. `steal` says that the
owner was seen dead, or gave the turn up: it is then taken over at once, not when its lease ends. An owner
that lives after all is fenced by the store, so a wrong guess costs a replay and nothing else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, Protocol

from deployments.errors import ErrorInfo, ServiceError
from deployments.turn_call import (
    FollowCall,
    TurnAccepted,
    TurnCall,
    TurnDone,
    TurnItem,
    TurnRefused,
    TurnTokens,
)

log = logging.getLogger(__name__)

Loss = Literal["dead", "silent", "unreachable", "given_up", "refused"]
"""Died; hangs; may be alive behind a bad network; kept the turn for another; said no."""

_WAITED_OUT = frozenset({"overloaded", "not_ready", "conversation_busy", "store_recovering"})


class EngineClient(Protocol):
    """The replicas, as the ingress sees them."""

    def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        """TurnAccepted, TurnTokens..., TurnDone; or TurnRefused at any point, which is then the last.

        Closing or cancelling the generator leaves the turn: `on_disconnect` says what becomes of it.
        Raises ServiceError (replica_lost, overloaded, not_ready) when no replica can be had or the one
        at work is gone; ReplicaUnreachable when it may still be at work.
        """
        ...

    def follow(self, call: FollowCall) -> AsyncGenerator[TurnItem, None]:
        """The items of a running turn from its beginning. Raises as `turn`."""
        ...


def replica_lost_info() -> ErrorInfo:
    """Whoever loses sight of a replica cannot know how its turn ended."""
    message = (
        "The replica went away during the turn; read the conversation to see what is committed."
    )
    return ErrorInfo("replica_lost", message)


class ReplicaUnreachable(ServiceError):
    """The connection to the replica is gone; the replica itself may be alive."""

    def __init__(self) -> None:
        super().__init__(replica_lost_info())

    def __reduce__(self) -> tuple[type[ReplicaUnreachable], tuple[()]]:
        return ReplicaUnreachable, ()


class ReplicaHangs(ServiceError):
    """The replica has let its lease run out: it lives, and does nothing."""

    def __init__(self) -> None:
        super().__init__(replica_lost_info())

    def __reduce__(self) -> tuple[type[ReplicaHangs], tuple[()]]:
        return ReplicaHangs, ()


@dataclass(frozen=True, slots=True)
class FailoverPolicy:
    """How long a turn is tried. Counts start anew with every new token; times in seconds.

    A turn that no replica has accepted yet is tried `first_tries` times. After a replica has become
    unreachable, whoever is asked next must come up with something new within `silence_s`.
    """

    first_tries: int = 3
    max_tries: int = 12
    give_up_s: float = 120.0
    first_pause_s: float = 0.05
    max_pause_s: float = 2.0
    silence_s: float = 1.0


class FailoverTurns:
    """Calls the replicas for turns. `on_failover` is told the code of every loss that is retried."""

    def __init__(
        self,
        engine: EngineClient,
        policy: FailoverPolicy | None = None,
        on_failover: Callable[[str], None] = lambda code: None,
    ) -> None:
        self._engine = engine
        self._policy = policy or FailoverPolicy()
        self._on_failover = on_failover

    async def turn(self, call: TurnCall) -> AsyncGenerator[TurnItem, None]:
        """TurnAccepted once, TurnTokens with no token missing or repeated, TurnDone.

        Raises ServiceError for a turn that ends otherwise.
        """
        attempts = _Attempts(call, self._policy, asyncio.get_running_loop().time)
        while True:
            try:
                async with aclosing(self._engine.turn(attempts.call())) as items:
                    async for item in _unless_silent(items, attempts):
                        if isinstance(item, TurnRefused):
                            raise _Broken(item.error, _loss_of(item))
                        shown = attempts.take(item)
                        if shown is not None:
                            yield shown
                        if isinstance(item, TurnDone):
                            return
                raise _Broken(replica_lost_info(), "dead")
            except _Broken as broken:
                pause_s = attempts.pause_s(broken.info, broken.loss)
            except ReplicaUnreachable as error:
                pause_s = attempts.pause_s(error.info, "unreachable")
            except ReplicaHangs as error:
                pause_s = attempts.pause_s(error.info, "silent")
            except ServiceError as error:
                lost = error.info.code == "replica_lost"
                pause_s = attempts.pause_s(error.info, "dead" if lost else "refused")
            self._on_failover(attempts.last_code)
            await asyncio.sleep(pause_s)


def _loss_of(refused: TurnRefused) -> Loss:
    if not refused.resumable:
        return "refused"
    return "dead" if refused.fatal else "given_up"


async def _unless_silent(
    items: AsyncGenerator[TurnItem, None], attempts: _Attempts
) -> AsyncGenerator[TurnItem, None]:
    """Raises ReplicaUnreachable when nothing comes in time."""
    while True:
        try:
            async with asyncio.timeout(attempts.patience_s):
                item = await anext(items)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ReplicaUnreachable from None
        yield item


class _Broken(Exception):
    def __init__(self, info: ErrorInfo, loss: Loss) -> None:
        super().__init__(info.code)
        self.info = info
        self.loss = loss


class _Attempts:
    """The calls of one turn: what has been seen, and whether to call again. Pure but for the clock."""

    def __init__(self, call: TurnCall, policy: FailoverPolicy, clock: Callable[[], float]) -> None:
        self._call = call
        self._policy = policy
        self._clock = clock
        self._deadline_s = clock() + call.timeout_s
        self._progress_s = clock()
        self._shown = list(call.shown_ids)
        self._created_s = call.created_s
        self._turn: int | None = None
        self._replica = ""
        self._avoid = call.avoid
        self._steal = call.steal
        self._blameless = call.blameless
        self._tries = 0
        self._unreachable = 0
        self.last_code = ""

    @property
    def patience_s(self) -> float | None:
        """How long the next item may take."""
        doubtful = self._unreachable > 0 and not self._steal
        return self._policy.silence_s if doubtful else None

    def call(self) -> TurnCall:
        """The next one to make."""
        self._tries += 1
        return dataclasses.replace(
            self._call,
            steal=self._steal,
            blameless=self._steal and self._blameless,
            shown_ids=tuple(self._shown),
            created_s=self._created_s,
            avoid=self._avoid,
            timeout_s=max(0.0, self._deadline_s - self._clock()),
        )

    def take(self, item: TurnAccepted | TurnTokens | TurnDone) -> TurnItem | None:
        """What of `item` is new. Raises ServiceError when it contradicts what was seen."""
        if isinstance(item, TurnTokens):
            return self._tokens(item)
        if self._turn not in (None, item.turn):
            raise ServiceError(_contradiction("is another turn"))
        first = self._turn is None
        self._turn = item.turn
        if isinstance(item, TurnDone):
            return item
        self._replica = item.replica
        # Who resumes a turn that was joined dates the reply as it was first dated.
        self._created_s = item.created_s or self._created_s
        if self._steal:
            self._steal, self._unreachable = False, 0
        return item if first else None

    def pause_s(self, info: ErrorInfo, loss: Loss) -> float:
        """How long to wait before the next call. Raises ServiceError when there is to be none."""
        policy, begun = self._policy, self._turn is not None or self._steal
        worth_it = info.code in ("replica_lost", "store_recovering") or loss == "given_up"
        if not worth_it and not (begun and info.code in _WAITED_OUT):
            raise ServiceError(info)
        tried = self._tries >= (policy.max_tries if begun else policy.first_tries)
        patient = begun or info.code == "store_recovering"
        now_s = self._clock()
        pause_s = min(policy.first_pause_s * 2.0 ** (self._tries - 2), policy.max_pause_s)
        if info.code == "store_recovering":
            pause_s = min(info.retry_after_s or policy.max_pause_s, policy.max_pause_s)
            tried = self._tries >= policy.max_tries
        elif loss in ("dead", "silent") and self._tries == 1:
            pause_s = 0.0
        late = now_s + pause_s >= min(self._deadline_s, self._progress_s + policy.give_up_s)
        if tried or (patient and late):
            raise ServiceError(info)
        self.last_code = info.code
        self._note(info.code, loss)
        log.warning("turn of %s is called again: %s", self._call.conversation_id, info.code)
        return pause_s

    def _note(self, code: str, loss: Loss) -> None:
        """Where not to go next, and whether the owner's claim is void."""
        # A second witness: another replica knows of a running turn, and cannot say what it does.
        cannot_join = self._unreachable > 0 and code == "conversation_busy"
        if loss == "unreachable" or cannot_join:
            self._unreachable += 1
        silent = loss in ("dead", "silent") or self._unreachable > 1
        # Who has seen it dead once, since somebody last took the turn, holds the turn responsible.
        blamed = loss == "dead" or (self._steal and not self._blameless)
        self._steal = self._steal or silent or loss == "given_up"
        self._blameless = not blamed
        if loss != "unreachable" or silent:
            self._avoid = self._replica or (self._call.owner_hint if silent else "")

    def _tokens(self, item: TurnTokens) -> TurnTokens | None:
        known = len(self._shown) - item.k
        if known < 0:
            raise ServiceError(_contradiction("lost tokens"))
        if tuple(self._shown[item.k : item.k + len(item.token_ids)]) != item.token_ids[:known]:
            raise ServiceError(_contradiction("sent other tokens than before"))
        fresh = item.token_ids[known:]
        if not fresh:
            return None
        self._shown.extend(fresh)
        self._tries, self._progress_s = 1, self._clock()
        self._unreachable = 0
        return TurnTokens(item.k + known, fresh, item.logprobs[known:])


def _contradiction(what: str) -> ErrorInfo:
    return ErrorInfo("internal_error", f"The replica {what}.")
