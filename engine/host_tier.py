"""Which evicted conversations are kept in host memory, and in which host slot. Pure, as residency.py.

A conversation that loses its kv_slot is copied to a host slot; when it comes back under the same head it
is copied into whatever kv_slot it gets, instead of being replayed. It is in one place at a time.

    kv_slot --evicted: save--> host slot --same head and window: restore--> kv_slot
                                   +--- another head, or the room is needed: forgotten, oldest first
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.window import SinkWindow


@dataclass(frozen=True, slots=True)
class SlotContent:
    """What a clean slot holds: the first `length` tokens of the conversation whose hash is `head`.

    `window_start` as in `engine.protocol.Row`.
    """

    head: str
    window: SinkWindow
    length: int
    window_start: int


class HostTier:
    """Host slots are 0 .. `num_slots` - 1; with none, nothing is ever kept."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        # Oldest first.
        self._kept: dict[str, tuple[int, SlotContent]] = {}

    @property
    def num_used(self) -> int:
        return len(self._kept)

    def __contains__(self, conversation_id: str) -> bool:
        return conversation_id in self._kept

    def save(self, conversation_id: str, content: SlotContent, keep: str) -> int | None:
        """The host slot to copy to, that of the conversation saved longest ago if none is free.

        None if there is none but that of `keep`, a conversation about to be restored.
        """
        if self._free:
            host_slot = self._free.pop()
        else:
            oldest = next((name for name in self._kept if name != keep), None)
            if oldest is None:
                return None
            host_slot, _ = self._kept.pop(oldest)
        self._kept[conversation_id] = (host_slot, content)
        return host_slot

    def take(
        self, conversation_id: str, head: str, window: SinkWindow
    ) -> tuple[int, SlotContent] | None:
        """Host slot and content to copy back, if they are valid for `head`. Kept no more either way:
        the next copy into that host slot comes after the one out of it."""
        kept = self._kept.pop(conversation_id, None)
        if kept is None:
            return None
        self._free.append(kept[0])
        valid = kept[1].head == head and kept[1].window == window
        return kept if valid else None

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every host slot is either free or kept once."""
        held = [host_slot for host_slot, _ in self._kept.values()]
        if sorted(held + self._free) != list(range(self._num_slots)):
            raise RuntimeError("a host slot is lost or held twice")
        if any(content.length < 1 for _, content in self._kept.values()):
            raise RuntimeError("an empty slot was kept")
