"""Records as the turns of this process left them, so that the next turn need not read the store first.

A guess, never an authority: whoever uses one asks the replica for a turn on top of exactly that record, and
`begin` in the store refuses it when the conversation has moved on.
"""

from __future__ import annotations

from collections import OrderedDict

from cluster.conversation import Conversation

MAX_RECORDS = 4096


class RecentRecords:
    """The `max_records` used last, by name and by the hash of their history."""

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        self._max_records = max_records
        self._by_name: OrderedDict[tuple[str, str], Conversation] = OrderedDict()
        self._by_history: dict[tuple[str, str], tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def keep(self, record: Conversation) -> None:
        """It was just committed."""
        name = (record.tenant, record.conversation_id)
        self._drop(name)
        self._by_name[name] = record
        self._by_history[record.tenant, record.history] = name
        if len(self._by_name) > self._max_records:
            self._drop(next(iter(self._by_name)))

    def take(self, tenant: str, conversation_id: str) -> Conversation | None:
        """It is handed out once: a turn is about to move it on."""
        return self._drop((tenant, conversation_id))

    def take_history(self, tenant: str, history: str) -> Conversation | None:
        """The latest conversation with exactly this transcript."""
        name = self._by_history.get((tenant, history))
        return None if name is None else self._drop(name)

    def _drop(self, name: tuple[str, str]) -> Conversation | None:
        record = self._by_name.pop(name, None)
        if record is not None and self._by_history.get((record.tenant, record.history)) == name:
            del self._by_history[record.tenant, record.history]
        return record
