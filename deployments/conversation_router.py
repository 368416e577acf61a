"""Ray Serve's `RequestRouter` over `cluster.placement`: every turn goes to its conversation's owner.

Written against Ray 2.60, whose base class queues pending requests by their internal request id. That
id is inherited from the parent request, so concurrent calls made by one request share it and all but
one would be dropped and hang; `FIFOMixin` cures that by handing replicas to any pending request, which
breaks affinity. So `_choose_replica_for_request` is overridden whole, as in Ray's own
`ray/serve/experimental/capacity_queue_router.py`: no queue, each request finds its own replica.

The router runs on a loop of its own in every process that holds a handle, and this module must be
importable by the controller.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.placement import Overloaded, OwnerTable, Placed, Placement, ReplicaView
from deployments.errors import ErrorInfo, ServiceError
from deployments.failover import replica_lost_info
from deployments.turn_call import FollowCall, TurnCall


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """`request_router_kwargs`. Seconds to wait for room and for a first replica; conversations
    remembered; the age at which a replica's statistics surely show what was sent to it."""

    max_wait_s: float = 5.0
    no_replica_wait_s: float = 60.0
    table_size: int = 100_000
    stats_lag_s: float = 2.0


class ConversationRouter(RequestRouter):
    """Owner first; a new conversation goes to the emptiest replica; a full owner is waited for.

    Raises ServiceError: `overloaded` when the wait is over, `not_ready` when no replica lives.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Called once by Ray. Raises TypeError for an unknown key."""
        options = RouterOptions(**kwargs)
        self._placement = Placement(options.max_wait_s)
        self._no_replica_wait_s = options.no_replica_wait_s
        self._table = OwnerTable(options.table_size, options.stats_lag_s)

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """One replica for this request, whatever other requests share its id.

        A retry means that the replica refused or did not answer, so it starts with a pause.
        """
        if is_retry:
            await self._pause(pending_request)
        while True:
            await self._some_replica(pending_request)
            replica = self._decide(pending_request)
            if replica is not None:
                self._record_queue_wait_time(pending_request)
                return replica
            await self._pause(pending_request)
            await self._probe_queue_lens([r for r in self._replicas_list if self._is_full(r)], 0)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One replica, or none for now. Ray calls this only for `handle.choose_replica()`."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        replica = self._decide(pending_request)
        return [] if replica is None else [[replica]]

    def _decide(self, pending_request: PendingRequest) -> RunningReplica | None:
        """Ask the policy. None means wait; raises ServiceError `overloaded`."""
        call = _turn_call(pending_request)
        if isinstance(call, FollowCall):
            return self._owner_alone(call)
        conversation_id = call.conversation_id if call else pending_request.metadata.session_id
        key = conversation_id or pending_request.metadata.internal_request_id
        now_s = self._event_loop.time()
        # The record was read for this very request: fresher than what this process last chose.
        owners = [call.owner_hint if call else "", self._table.owner(key)]
        by_name = {r.replica_id.unique_id: r for r in self._replicas_list}
        views = self._views(now_s)
        waited_s = self._waited_s(pending_request)
        avoid = call.avoid if call else ""
        decision = self._placement.decide(key, owners, views, waited_s, avoid)
        if isinstance(decision, Placed):
            if conversation_id:
                self._table.record(conversation_id, decision, now_s)
            return by_name[decision.replica]
        if isinstance(decision, Overloaded):
            raise ServiceError(
                ErrorInfo("overloaded", "Every turn this conversation's replica can take is in use")
            )
        return None

    def _owner_alone(self, call: FollowCall) -> RunningReplica:
        """Nobody else has the turn. Raises ServiceError `replica_lost`."""
        for replica in self._replicas_list:
            if replica.replica_id.unique_id == call.owner_hint:
                return replica
        raise ServiceError(replica_lost_info())

    def _views(self, now_s: float) -> list[ReplicaView]:
        known = [int(r.routing_stats.get("free_slots", 0)) for r in self._replicas_list]
        # A replica that has just started has no statistics yet, and surely free slots.
        most_free = max([1, *known])
        return [self._view(r, most_free, now_s) for r in self._replicas_list]

    def _view(self, replica: RunningReplica, default_free_slots: int, now_s: float) -> ReplicaView:
        stats: dict[str, Any] = replica.routing_stats
        name = replica.replica_id.unique_id
        free_slots = int(stats.get("free_slots", default_free_slots))
        # What was just sent there is counted as waiting, lest all that comes at once goes to one.
        sent = self._table.recently_taken(name, now_s)
        return ReplicaView(
            replica=name,
            free_slots=max(0, free_slots - sent),
            clean_slots=int(stats.get("clean_slots", 0)),
            running=int(stats.get("running", 0)),
            waiting=int(stats.get("waiting", 0)) + sent,
            full=self._is_full(replica),
            draining=bool(stats.get("draining", False)),
        )

    def _is_full(self, replica: RunningReplica) -> bool:
        queue_len = self.replica_queue_len_cache.get(replica.replica_id)
        return queue_len is not None and queue_len >= replica.max_ongoing_requests

    async def _some_replica(self, pending_request: PendingRequest) -> None:
        """Return once a replica lives. Raises ServiceError `not_ready` after `no_replica_wait_s`."""
        while not self._replicas_list:
            left_s = self._no_replica_wait_s - self._waited_s(pending_request)
            self._replicas_updated_event.clear()
            try:
                await asyncio.wait_for(self._replicas_updated_event.wait(), max(left_s, 0.0))
            except TimeoutError:
                info = ErrorInfo("not_ready", "No replica is running; try again later")
                raise ServiceError(info) from None

    async def _pause(self, pending_request: PendingRequest) -> None:
        """Exponential backoff without state: half of what the request has waited already."""
        half_s = self._waited_s(pending_request) / 2
        await asyncio.sleep(min(max(half_s, self.initial_backoff_s), self.max_backoff_s))

    def _waited_s(self, pending_request: PendingRequest) -> float:
        return max(0.0, float(self._get_curr_time_s()) - pending_request.created_at)


def _turn_call(pending_request: PendingRequest) -> TurnCall | FollowCall | None:
    values = (*pending_request.args, *pending_request.kwargs.values())
    return next((value for value in values if isinstance(value, (TurnCall, FollowCall))), None)
