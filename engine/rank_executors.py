"""Which executor one tensor-parallel rank runs, by the target of the engine.

An executor is an `Engine` that runs the same plans on every rank: it takes its rank's part of the weights,
and rank 0 alone returns tokens and logits. What it computes with is imported when it is opened.
"""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engine.collective import Collective
from engine.protocol import Engine, EngineDead, num_host_slots
from engine_build.manifest import SPEC
from engine_build.spec import EngineSpec, SpecError


@dataclasses.dataclass(frozen=True, slots=True)
class RankOptions:
    """What every rank of an engine is told: values of JSON only.

    `memory_budget_bytes` is for the kv_slots of this rank, None: what is free. `threads` are this rank's,
    where a CPU computes. `capacity` replaces that of spec.json. `max_running`: see `EngineOptions`.
    `host_memory_bytes` is this rank's too: its host slots hold its part of a kv_slot each. `step_s` is the
    longest that a rank on a GPU waits for the end of a step.
    """

    engine_dir: str
    memory_budget_bytes: int | None
    threads: int = 1
    capacity: int | None = None
    max_running: int = 16
    host_memory_bytes: int = 0
    step_s: float = 120.0


@dataclasses.dataclass(frozen=True, slots=True)
class SlotCounts:
    """kv_slots and host slots of one rank, or of all."""

    max_resident: int
    host_slots: int = 0

    def to_json(self) -> str:
        """What a rank reports once it has started; `agreed` reads it."""
        return json.dumps(dataclasses.asdict(self))


def slot_counts(executor: Engine) -> SlotCounts:
    """Those of this rank."""
    return SlotCounts(executor.max_resident, num_host_slots(executor))


def failed_start(trace: str) -> str:
    """What a rank that could not start reports in its place."""
    return json.dumps({"failed": trace[-2000:]})


def agreed(reports: Sequence[str]) -> SlotCounts:
    """What every rank has: one decision, rank 0's. Raises EngineDead for a rank that could not start."""
    found = [json.loads(report) for report in reports]
    for rank, report in enumerate(found):
        if "failed" in report:
            raise EngineDead(f"rank {rank} could not start:\n{report['failed']}")
    return SlotCounts(
        min(int(report["max_resident"]) for report in found),
        min(int(report["host_slots"]) for report in found),
    )


def returns_early(spec: EngineSpec) -> bool:
    """Whether a rank other than 0 ends its step when all is launched on its GPU, where the ranks wait for
    each other. Those on CPUs wait in `Collective`."""
    return spec.target != "cpu"


OpenExecutor = Callable[[RankOptions, Collective], Engine]


def open_executor(options: RankOptions, collective: Collective) -> Engine:
    """This rank's executor. Every rank calls it at the same time, so it may use `collective`."""
    spec = EngineSpec.from_json((Path(options.engine_dir) / SPEC).read_text(encoding="utf-8"))
    if spec.target not in _EXECUTORS:
        raise SpecError(
            "tp_size",
            f"this release runs {spec.target} engines on one rank",
            f"Build for one of: {', '.join(_EXECUTORS)}, or without --tp",
        )
    return _EXECUTORS[spec.target](options, collective)


def _open_cpu(options: RankOptions, collective: Collective) -> Engine:
    from engine.onnx_engine import OnnxEngine

    return OnnxEngine(
        Path(options.engine_dir),
        memory_budget_bytes=options.memory_budget_bytes or 0,
        threads=options.threads,
        capacity=options.capacity,
        collective=collective,
        host_memory_bytes=options.host_memory_bytes,
    )


def _open_cuda(options: RankOptions, collective: Collective) -> Engine:
    from engine.cuda_engine import CudaEngine
    from engine.cuda_options import CudaOptions, TensorParallel, interpreted

    port = b""
    if collective.rank == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1]).encode()
    address = f"tcp://127.0.0.1:{collective.broadcast(port).decode()}"
    return CudaEngine(
        Path(options.engine_dir),
        memory_budget_bytes=options.memory_budget_bytes,
        device="cpu" if interpreted("cuda") else f"cuda:{collective.rank}",
        capacity=options.capacity,
        options=CudaOptions(
            max_running=options.max_running,
            host_memory_bytes=options.host_memory_bytes,
            tensor_parallel=TensorParallel(
                collective.rank, collective.size, address, step_s=options.step_s
            ),
        ),
    )


def _open_tensorrt(options: RankOptions, collective: Collective) -> Engine:
    from engine.tensorrt_engine import RuntimeOptions, TensorRtEngine

    runtime = RuntimeOptions(
        options.memory_budget_bytes, options.max_running, collective, options.step_s
    )
    return TensorRtEngine(Path(options.engine_dir), runtime, capacity=options.capacity)


# Another target is added with a function like the one above and one line here.
_EXECUTORS: Mapping[str, OpenExecutor] = {
    "cpu": _open_cpu,
    "cuda": _open_cuda,
    "tensorrt": _open_tensorrt,
    "tensorrt-rtx": _open_tensorrt,
}
