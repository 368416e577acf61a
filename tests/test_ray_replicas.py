"""`RayReplicas` on a fake handle: what Ray's errors become, and that no turn is left running."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RequestCancelledError,
)

from cluster.conversation import GENESIS
from deployments.errors import ErrorInfo, ServiceError
from deployments.serve_ingress import RayReplicas
from deployments.turn_call import TurnAccepted, TurnCall, TurnItem, TurnRefused
from engine.sampling import SamplingParams

ACCEPTED = TurnAccepted(1, "a", "none")
REFUSED = TurnRefused(ErrorInfo("overloaded", "full"))
CALL = TurnCall(
    tenant="t",
    conversation_id="conv",
    input_ids=np.zeros(1, np.int32),
    messages=(),
    history=GENESIS,
    sampling=SamplingParams(),
    max_tokens=1,
)


class Handle:
    """Stands for a DeploymentHandle, its method `turn` and the response of one call."""

    def __init__(self, items: list[TurnItem], error: Exception | None = None) -> None:
        self.items = items
        self.error = error
        self.options_given: dict[str, Any] = {}
        self.cancelled = False

    @property
    def turn(self) -> Handle:
        return self

    def options(self, **options: Any) -> Handle:
        self.options_given |= options
        return self

    def remote(self, call: TurnCall) -> Handle:
        return self

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[TurnItem]:
        for item in self.items:
            yield item
        if self.error is not None:
            raise self.error


def replicas(handle: Any) -> RayReplicas:
    return RayReplicas(handle)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ActorDiedError(), "replica_lost"),
        (ActorUnavailableError("slow network", b"x" * 16), "replica_lost"),
        (RayActorError(), "replica_lost"),
        (RequestCancelledError("req"), "replica_lost"),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), "overloaded"),
        (DeploymentUnavailableError(DeploymentID("SinkReplica")), "not_ready"),
        (RayError("odd"), "internal_error"),
    ],
)
async def test_rays_errors_are_the_tables(error: Exception, code: str) -> None:
    handle = Handle([ACCEPTED], error)
    with pytest.raises(ServiceError) as refusal:
        async for _ in replicas(handle).turn(CALL):
            pass
    assert refusal.value.info.code == code
    # A dead actor has nothing to cancel; one out of sight goes on, for whoever asks again.
    assert handle.cancelled is not isinstance(error, RayActorError)


@pytest.mark.parametrize("error", [ActorDiedError(), ActorUnavailableError("gone", b"x" * 16)])
async def test_a_lost_replica_may_have_committed_and_nothing_else_is_said(error: Exception) -> None:
    with pytest.raises(ServiceError) as refusal:
        async for _ in replicas(Handle([ACCEPTED], error)).turn(CALL):
            pass
    assert "read the conversation" in refusal.value.info.message
    assert "nothing" not in refusal.value.info.message


async def test_a_turn_that_is_dropped_is_cancelled_and_one_that_is_over_is_not() -> None:
    dropped, over = Handle([ACCEPTED, ACCEPTED]), Handle([ACCEPTED, REFUSED])
    for handle, wanted in ((dropped, 1), (over, 2)):
        async with aclosing(replicas(handle).turn(CALL)) as items:
            for _ in range(wanted):
                await anext(items)
    assert (dropped.cancelled, over.cancelled) == (True, False)


async def test_the_conversation_travels_as_rays_session() -> None:
    handle = Handle([REFUSED])
    assert [item async for item in replicas(handle).turn(CALL)] == [REFUSED]
    assert handle.options_given == {"stream": True, "session_id": "conv"}
