"""How a turn ends that is not committed, and what becomes of its claim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.store import Fenced, NotFound, StoreError
from deployments.errors import ErrorInfo, ServiceError
from deployments.store_errors import store_error_info
from deployments.turn_call import TurnRefused

Claim = Literal["give up", "keep", "lost"]


@dataclass(frozen=True, slots=True)
class Ending:
    """`claim`: give it up, as if the turn had never begun; keep it in the store, for another replica to
    go on with the turn; or it is lost, because another owner exists or the conversation is gone. `fatal`:
    the engine died, perhaps of this turn."""

    error: ErrorInfo
    claim: Claim = "give up"
    fatal: bool = False

    def refusal(self) -> TurnRefused:
        """What readers are told."""
        return TurnRefused(self.error, self.claim == "keep", self.fatal)


class TurnStopped(Exception):
    """The turn ends here, in this way."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.error.code)
        self.ending = ending


CANCELLED = Ending(ErrorInfo("replica_lost", "The turn was cancelled: nobody was reading it."))
TIMED_OUT = Ending(ErrorInfo("timeout", "The turn took too long and was cancelled."))
INTERNAL = Ending(ErrorInfo("internal_error", "The replica failed; its log says why."))
FAILED = Ending(ErrorInfo("turn_failed", "The engine failed; nothing of the turn was committed."))
ENGINE_DEAD = Ending(ErrorInfo("replica_lost", "The replica's engine died."), "keep", fatal=True)
HANDED_OVER = Ending(ErrorInfo("replica_lost", "The replica is stopping."), "keep")


def refused(code: str, message: str, claim: Claim = "give up") -> TurnStopped:
    """A turn that is refused with an error of the table."""
    return TurnStopped(Ending(ErrorInfo(code, message), claim))


def ending_of(error: BaseException) -> Ending:
    """How a turn ends to which this happened."""
    match error:
        case TurnStopped():
            return error.ending
        case ServiceError():
            return Ending(error.info)
        case _:
            return INTERNAL


def lost_claim(error: StoreError, conversation_id: str) -> Ending:
    """How a turn ends whose owner got this answer from the store."""
    gone = isinstance(error, Fenced | NotFound)
    return Ending(store_error_info(error, conversation_id), "lost" if gone else "keep")
