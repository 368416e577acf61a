"""Which conversation lives in which kv_slot. Pure: names and counts, no cache and no clock.

    free ---acquire---> dirty ---settle---> clean ---acquire by its own conversation---> dirty
      ^                   |                   |
      +----- discard -----+                   +---acquire by another: evicted, oldest use first

A dirty slot belongs to a turn that runs or waits for its commit: it is never evicted. A clean slot is
valid for the one head (hash of the conversation) under which it was settled. With a host tier an evicted
conversation is kept in host memory: a lease then says what to copy, in order, before the slot is used.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from engine.host_tier import HostTier, SlotContent
from engine.protocol import SlotCopy
from engine.window import SinkWindow


@dataclass(frozen=True, slots=True)
class Lease:
    """A slot for a turn. `resident_length` tokens in it are valid; None means none are (cold).

    `evicted` is the conversation that lost the slot, if one did. They are there once `copies` are made.
    """

    kv_slot: int
    resident_length: int | None
    window_start: int
    evicted: str | None = None
    copies: tuple[SlotCopy, ...] = ()


@dataclass(frozen=True, slots=True)
class Resident:
    """A clean slot's content: `length` tokens of the conversation whose hash is `head`."""

    conversation_id: str
    head: str
    length: int


@dataclass(slots=True)
class _Slot:
    kv_slot: int
    window: SinkWindow
    head: str
    length: int
    window_start: int
    base_length: int = 0
    """Committed tokens of the conversation, before the turn."""
    must_reach: int = 0
    """A bounded replay is worth nothing before this length."""


class Residency:
    """Slots are 0 .. `num_slots` - 1, host slots 0 .. `num_host_slots` - 1. Methods that name a
    conversation raise KeyError if it has no dirty slot, unless they say otherwise.

    `num_evicted` conversations lost their slot so far, `num_host_hits` came back from host memory.
    """

    def __init__(self, num_slots: int, num_host_slots: int = 0) -> None:
        if num_slots < 1:
            raise ValueError("num_slots must be at least 1")
        self._num_slots = num_slots
        self._num_host_slots = num_host_slots
        self._host = HostTier(num_host_slots)
        self.num_evicted = 0
        self.num_host_hits = 0
        self._free = list(range(num_slots - 1, -1, -1))
        self._dirty: dict[str, _Slot] = {}
        # Oldest use first: a settled slot is inserted at the end.
        self._clean: dict[str, _Slot] = {}

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_clean(self) -> int:
        return len(self._clean)

    @property
    def num_dirty(self) -> int:
        return len(self._dirty)

    @property
    def num_host_slots(self) -> int:
        return self._num_host_slots

    @property
    def num_host_used(self) -> int:
        return self._host.num_used

    def is_dirty(self, conversation_id: str) -> bool:
        return conversation_id in self._dirty

    def residents(self, limit: int) -> tuple[Resident, ...]:
        """The clean slots, latest use first, at most `limit`."""
        latest = list(self._clean.items())[::-1][:limit]
        return tuple(Resident(name, slot.head, slot.length) for name, slot in latest)

    def acquire(
        self,
        conversation_id: str,
        head: str,
        window: SinkWindow,
        expected: Container[str] = (),
    ) -> Lease | None:
        """A dirty slot for a turn that starts from `head`: its own one, a free one, or the clean one
        used longest ago, if possible of a conversation that is not `expected` back soon.

        None while all others are dirty. Raises KeyError if the conversation has a dirty slot.
        """
        if conversation_id in self._dirty:
            raise KeyError(f"{conversation_id} has a dirty slot")
        own = self._clean.pop(conversation_id, None)
        if own is not None:
            valid = own.head == head and own.window == window
            if not valid:
                own = _Slot(own.kv_slot, window, head, 0, 0)
            self._dirty[conversation_id] = own
            return Lease(own.kv_slot, own.length if valid else None, own.window_start)
        evicted: str | None = None
        copies: tuple[SlotCopy, ...] = ()
        if self._free:
            kv_slot = self._free.pop()
        elif self._clean:
            oldest = next(iter(self._clean))
            evicted = next((name for name in self._clean if name not in expected), oldest)
            loser = self._clean.pop(evicted)
            kv_slot = loser.kv_slot
            self.num_evicted += 1
            content = SlotContent(loser.head, loser.window, loser.length, loser.window_start)
            # Before what is kept of the new owner is given up: it must not be overwritten.
            host_slot = self._host.save(evicted, content, keep=conversation_id)
            if host_slot is not None:
                copies = (SlotCopy("save", kv_slot, host_slot),)
        else:
            return None
        kept = self._host.take(conversation_id, head, window)
        if kept is None:
            self._dirty[conversation_id] = _Slot(kv_slot, window, head, 0, 0)
            return Lease(kv_slot, None, 0, evicted, copies)
        self.num_host_hits += 1
        host_slot, content = kept
        copies = (*copies, SlotCopy("restore", kv_slot, host_slot))
        slot = _Slot(kv_slot, window, head, content.length, content.window_start)
        self._dirty[conversation_id] = slot
        return Lease(kv_slot, slot.length, slot.window_start, evicted, copies)

    def begin(self, conversation_id: str, start: int, window_start: int, base_length: int) -> int:
        """A turn of a conversation of `base_length` committed tokens prefills from `start` on.

        Returns the oldest window token_index present, for `Row.window_start`: the slot's own where
        the prefill goes on after resident tokens, else the given one.
        """
        slot = self._dirty[conversation_id]
        slot.base_length = base_length
        if 0 < start == slot.length:
            slot.must_reach = 0
        else:
            slot.length, slot.window_start = 0, window_start
            slot.must_reach = base_length if window_start > 0 else 0
        return slot.window_start

    def grow(self, conversation_id: str, length: int) -> None:
        """The slot now holds the conversation's first `length` tokens."""
        self._dirty[conversation_id].length = length

    def settle(self, conversation_id: str, head: str, length: int) -> bool:
        """The turn is committed under `head`; at most the first `length` cached tokens are part of it.

        The slot becomes clean and the last to be evicted. False if the surplus tokens cannot be
        rewound exactly: the slot is free then and the next turn restores.
        """
        slot = self._dirty.pop(conversation_id)
        length = min(length, slot.length)
        if length < 1 or not slot.window.can_rewind(slot.length, length):
            self._free.append(slot.kv_slot)
            return False
        slot.head, slot.length = head, length
        self._clean[conversation_id] = slot
        return True

    def discard(self, conversation_id: str) -> bool:
        """The turn never was. Keeps the slot clean under its old head if it can be rewound exactly
        to the committed tokens, else frees it and returns False."""
        slot = self._dirty[conversation_id]
        if slot.length < slot.must_reach:
            return self.drop(conversation_id)
        return self.settle(conversation_id, slot.head, slot.base_length)

    def drop(self, conversation_id: str) -> bool:
        """Free a dirty slot whatever it holds. Returns False: nothing is kept."""
        self._free.append(self._dirty.pop(conversation_id).kv_slot)
        return False

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every slot is exactly one of free, dirty, clean."""
        held = [slot.kv_slot for slot in (*self._dirty.values(), *self._clean.values())]
        if sorted(held + self._free) != list(range(self._num_slots)):
            raise RuntimeError("a kv_slot is lost or held twice")
        if self._dirty.keys() & self._clean.keys():
            raise RuntimeError("a conversation has two slots")
        if any(slot.length < 1 for slot in self._clean.values()):
            raise RuntimeError("a clean slot is empty")
        self._host.check_integrity()
        if any(name in self._host for name in (*self._dirty, *self._clean)):
            raise RuntimeError("a conversation is both resident and in host memory")
