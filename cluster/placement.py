"""Which replica runs a turn: the whole policy, as pure functions of ids and counts.

    owner alive, has room    -> the owner
    owner alive, full        -> wait for it, at most `max_wait_s`; never a second copy elsewhere
    owner gone, or none yet  -> the replica with most free kv_slots; once all are used, of those with an
                                idle slot the one with least to do
    just seen dead           -> as if gone, unless no other replica is left

Placement gives affinity only. Exclusivity is the store's (`begin` and its fence).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Reason = Literal["owner", "new", "owner_lost"]


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A living replica as a router sees it.

    `free_slots` kv_slots hold no conversation, `clean_slots` one that no turn uses: it can be evicted.
    `running` and `waiting` count turns. `full`: it would reject a request now. `draining`: it finishes
    its turns and is to get no further ones.
    """

    replica: str
    free_slots: int = 0
    clean_slots: int = 0
    running: int = 0
    waiting: int = 0
    full: bool = False
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Placed:
    """Send the turn to `replica`."""

    replica: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing may take the turn yet; `owner` is the replica waited for ("" for any)."""

    owner: str


@dataclass(frozen=True, slots=True)
class Overloaded:
    """The wait is over: refuse the turn."""

    owner: str


Decision = Placed | Wait | Overloaded


@dataclass(frozen=True, slots=True)
class Placement:
    """The policy. A turn waits at most `max_wait_s` seconds for its owner, or for any replica with room."""

    max_wait_s: float = 5.0

    def decide(
        self,
        conversation_id: str,
        owners: Iterable[str],
        replicas: Iterable[ReplicaView],
        waited_s: float,
        avoid: str = "",
    ) -> Decision:
        """Where the turn goes. `owners` are the owners known, most trusted first ("" is skipped);
        `replicas` are those alive, each once; a replica that is not among them is dead. `avoid` was
        seen dead by the caller ("" for none)."""
        alive = {view.replica: view for view in replicas if not view.draining}
        if len(alive) > 1:
            alive.pop(avoid, None)
        known = [owner for owner in owners if owner]
        owner = next((owner for owner in known if owner in alive), "")
        if owner and not alive[owner].full:
            return Placed(owner, "owner")
        if not owner:
            chosen = _emptiest(conversation_id, alive.values())
            if chosen is not None:
                return Placed(chosen, "owner_lost" if known else "new")
        return Overloaded(owner) if waited_s >= self.max_wait_s else Wait(owner)


def _emptiest(conversation_id: str, replicas: Iterable[ReplicaView]) -> str | None:
    """A slot to be had at all, most free slots, fewest turns, most clean slots (the one to be evicted
    is then idle for longest), then rendezvous hash (Thaler and Ravishankar, 1996)."""
    with_room = [view for view in replicas if not view.full]
    if not with_room:
        return None
    best = max(
        with_room,
        key=lambda view: (
            view.free_slots + view.clean_slots > 0,
            view.free_slots,
            -(view.running + view.waiting),
            view.clean_slots,
            _weight(conversation_id, view.replica),
        ),
    )
    return best.replica


def _weight(conversation_id: str, replica: str) -> bytes:
    return hashlib.sha256(f"{len(replica)}:{replica}{conversation_id}".encode()).digest()


class OwnerTable:
    """Owners this router has chosen: at most `max_entries` conversations, least recently used out first.

    It bridges the gap until the choice shows elsewhere: in the record (the owner) and in the replicas'
    statistics (the slot taken), which lag by up to `lag_s` seconds.
    """

    def __init__(self, max_entries: int = 100_000, lag_s: float = 2.0) -> None:
        if max_entries < 1:
            raise ValueError("an OwnerTable needs max_entries >= 1")
        self._max_entries = max_entries
        self._lag_s = lag_s
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._taken: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owners)

    def owner(self, conversation_id: str) -> str:
        """The owner chosen last, "" if unknown."""
        return self._owners.get(conversation_id, "")

    def record(self, conversation_id: str, placed: Placed, now_s: float) -> None:
        """Remember a choice made at `now_s` (any monotonic clock)."""
        self._owners[conversation_id] = placed.replica
        self._owners.move_to_end(conversation_id)
        if len(self._owners) > self._max_entries:
            self._owners.popitem(last=False)
        if placed.reason != "owner":
            self._taken[conversation_id] = (placed.replica, now_s)
            self._taken.move_to_end(conversation_id)

    def recently_taken(self, replica: str, now_s: float) -> int:
        """Slots given away by this router that the statistics of `replica` may not show yet."""
        while self._taken and next(iter(self._taken.values()))[1] <= now_s - self._lag_s:
            self._taken.popitem(last=False)
        return sum(1 for taken, _ in self._taken.values() if taken == replica)
