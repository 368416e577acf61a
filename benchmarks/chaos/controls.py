"""The same faults with a safeguard switched off: if the checker has nothing to say, it has no power."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos import faults
from benchmarks.chaos.app import Switch
from benchmarks.chaos.stage import Fault


@dataclass(frozen=True, slots=True)
class Control:
    """`fault` with `off` in the service, or a client that is less careful."""

    fault: Fault
    off: tuple[Switch, ...] = ()
    without: str = ""
    client_sends_key: bool = True
    keeps_gcs: bool = True
    fields: dict[str, Any] = field(default_factory=dict)


def controls() -> dict[str, Control]:
    """By the name of the fault. Where a fault is the same to a client as another, that one's counts."""
    return {
        "replica": Control(faults.ReplicaKills(1), ("failover",), "failover in the ingress"),
        "rank": Control(
            faults.RankKill(),
            ("failover",),
            "failover in the ingress",
            fields={"has_ranks": True},
        ),
        "split_brain": Control(
            faults.ReplicaStop(),
            ("fence",),
            "the fence in the old owner",
            # Nor may it give up because an answer of the store came late.
            fields={"store_hold_s": 60.0, "lease_s": 1.0},
        ),
        "node": Control(faults.NodeKill(), ("failover",), "failover in the ingress"),
        "controller": Control(faults.ControllerKill(), ("failover",), "failover in the ingress"),
        "redeploy": Control(
            faults.Redeploy(), ("drain", "failover"), "time to end turns, and failover"
        ),
        "poison": Control(faults.Poison(), ("quarantine",), "the limit on takeovers"),
        "proxy": Control(
            faults.FrontKill("proxy"), (), "the client's Idempotency-Key", client_sends_key=False
        ),
        "ingress": Control(
            faults.FrontKill("ingress"), (), "the client's Idempotency-Key", client_sends_key=False
        ),
        "store_restart": Control(
            faults.StoreRollback("store_restart", is_empty=True),
            ("repair",),
            "the append-only file and repair from the owners' memory",
        ),
        "store_rollback": Control(
            faults.StoreRollback(), ("repair",), "repair from the owners' memory"
        ),
        "head": Control(faults.HeadKill(within_s=25.0), (), "GCS fault tolerance", keeps_gcs=False),
    }
