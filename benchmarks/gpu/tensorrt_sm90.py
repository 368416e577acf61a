"""Does TensorRT-RTX run on compute capability 9.0 (H100, H200), which its documentation does not list?

    python -m benchmarks.gpu.tensorrt_sm90          # prints JSON

Builds a small plan (one matrix product, float16) each way that the library offers, asks it of each plan
whether it is valid here, and where it opens runs it and compares with torch. What the library says is
recorded word for word. Works on any GPU, and says what it can without one.

The library runs in a process of its own, which is started again after a crash or a hang: that way is then
answered by the process's last words, and the others are still tried.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.carried import ensure_library
from benchmarks.gpu.process import WorkerFailed, WorkerProcess, breaks_cuda, serve

ROWS, WIDTH, OUT = 8, 256, 512
START_S, WAY_S = 90.0, 45.0
_STARTED = "benchmarks.gpu.tensorrt_sm90"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to build a plan: compute capabilities as `PlanOptions` has them, and further settings."""

    name: str
    capabilities: tuple[str, ...] = ()
    compatibility: str = ""
    version_compatible: bool = False

    @property
    def plain(self) -> bool:
        """Whether `engine_build.plan` can build so: the engine can then be measured."""
        return not self.compatibility and not self.version_compatible


def ways(named: Sequence[str]) -> list[Way]:
    """Every way there is, those that an engine would rather take first. `named`: "8.9", ..."""
    return [
        Way("for the GPU that is here", ("current",)),
        Way("9.0, asked for by number", ("9.0",)),
        Way("the library's choice"),
        Way("all that have names since 8.0", tuple(n for n in named if float(n) >= 8.0)),
        *(Way(f"{name} alone", (name,)) for name in named),
        Way("hardware compatible, 8.0 and up", (), "AMPERE_PLUS"),
        Way("hardware compatible, same capability", (), "SAME_COMPUTE_CAPABILITY"),
        Way("hardware compatible, for 8.0", ("8.0",), "AMPERE_PLUS"),
        Way("version compatible", (), "", version_compatible=True),
    ]


def probe(timeout_s: float, log: Path) -> dict[str, Any]:
    """What TensorRT-RTX says and does on this machine's first GPU: {"library", "gpu", "plans", "runs",
    "capabilities"}.

    "plans" has one entry for each way to build; "runs" names those whose result was right, and "capabilities"
    is what an engine's plan is to be built for, None if nothing runs. Raises WorkerFailed where the library
    cannot be loaded.
    """
    end = time.monotonic() + timeout_s
    child: WorkerProcess | None = None
    try:
        child = WorkerProcess(_STARTED, ["--serve"], log)
        answer: dict[str, Any] = {**child.call("library", min(START_S, timeout_s))}
        answer |= {"plans": [], "runs": [], "capabilities": None}
        for way in ways(answer["library"]["names"]):
            entry: dict[str, Any] = {"way": way.name, "capabilities": list(way.capabilities)}
            left = end - time.monotonic()
            if left < 1.0:
                answer["plans"].append({**entry, "ended": "no time left to try it"})
                continue
            if not child.alive:
                child.kill()
                child = WorkerProcess(_STARTED, ["--serve"], log)
            try:
                entry |= child.call("attempt", min(WAY_S, left), way=dataclasses.asdict(way))
            except WorkerFailed as failure:
                entry["ended"] = str(failure)
            answer["plans"].append(entry)
            if entry.get("right"):
                answer["runs"].append(way.name)
                if answer["capabilities"] is None and way.plain:
                    answer["capabilities"] = list(way.capabilities)
        return answer
    finally:
        if child is not None:
            child.kill()


class _Prober:
    """The child: loads the library when it is first asked, and keeps what it says."""

    def __init__(self) -> None:
        self._trt: Any = None
        self._logger: Any = None
        self._said: list[str] = []

    def _load(self) -> str:
        """Returns where the library comes from. Raises NotCarried."""
        origin = ensure_library()
        if self._trt is not None:
            return origin
        import tensorrt_rtx as trt

        said = self._said

        class Messages(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR, trt.ILogger.WARNING):
                    said.append(text)

        self._trt, self._logger = trt, Messages()
        return origin

    def library(self) -> dict[str, Any]:
        origin = self._load()
        members = self._trt.ComputeCapability.__members__
        numbers = sorted(int(name[2:]) for name in members if name.startswith("SM"))
        return {
            "library": {
                "version": self._trt.__version__,
                "from": origin,
                "names": [f"{number // 10}.{number % 10}" for number in numbers],
            },
            "gpu": _gpu(),
        }

    def attempt(self, way: dict[str, Any]) -> dict[str, Any]:
        """Build one way, and what becomes of the plan; never raises."""
        given = Way(**{**way, "capabilities": tuple(way["capabilities"])})
        entry: dict[str, Any] = {"plan_bytes": None}
        self._load()
        self._take()
        try:
            plan = self._build(given)
            if plan is not None:
                entry["plan_bytes"] = len(plan)
                self._open(plan, entry)
        except Exception as error:
            entry["raised"] = f"{type(error).__name__}: {error}"
        return {**entry, "said": self._take()}

    def _build(self, way: Way) -> bytes | None:
        """x [1..8, 256] times the transpose of w [512, 256]."""
        trt = self._trt
        builder = trt.Builder(self._logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        x = network.add_input("x", trt.float16, (-1, WIDTH))
        w = network.add_input("w", trt.float16, (OUT, WIDTH))
        kinds = trt.MatrixOperation
        product = network.add_matrix_multiply(x, kinds.NONE, w, kinds.TRANSPOSE).get_output(0)
        product.name = "y"
        network.mark_output(product)
        config = builder.create_builder_config()
        ranges = builder.create_optimization_profile()
        ranges.set_shape("x", (1, WIDTH), (ROWS, WIDTH), (ROWS, WIDTH))
        config.add_optimization_profile(ranges)
        config.num_compute_capabilities = len(way.capabilities)
        for number, name in enumerate(way.capabilities):
            if not config.set_compute_capability(self._capability(name), number):
                return None
        if way.compatibility:
            level = trt.HardwareCompatibilityLevel.__members__[way.compatibility]
            config.hardware_compatibility_level = level
        if way.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
            config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)  # which the wheel does not have
        plan = builder.build_serialized_network(network, config)
        return None if plan is None else bytes(plan)

    def _capability(self, name: str) -> Any:
        if name == "current":
            return self._trt.ComputeCapability.CURRENT
        return self._trt.ComputeCapability(round(10 * float(name)))

    def _open(self, plan: bytes, entry: dict[str, Any]) -> None:
        trt = self._trt
        runtime = trt.Runtime(self._logger)
        validity, diagnostics = runtime.get_engine_validity(plan)
        entry["valid"] = str(validity)
        reasons = trt.EngineInvalidityDiagnostics.__members__
        entry["diagnostics"] = [n for n, bit in reasons.items() if int(diagnostics) & int(bit)]
        engine = runtime.deserialize_cuda_engine(plan)
        entry["opens"] = engine is not None
        if engine is not None and _gpu()["name"] is not None:
            entry.update(_run(engine))

    def _take(self) -> list[str]:
        """What was said since the last call."""
        taken, self._said[:] = list(self._said), []
        return taken


def _run(engine: Any) -> dict[str, Any]:
    """Run an open plan; the largest difference from torch's float32 product."""
    import torch

    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH, device="cuda").half()
    w = torch.randn(OUT, WIDTH, device="cuda").half()
    y = torch.full((ROWS, OUT), float("nan"), device="cuda", dtype=torch.float16)
    context = engine.create_execution_context()
    if context is None:
        return {"ran": False}
    context.set_input_shape("x", (ROWS, WIDTH))
    for name, tensor in (("x", x), ("w", w), ("y", y)):
        context.set_tensor_address(name, tensor.data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    enqueued = bool(context.execute_async_v3(stream.cuda_stream))
    stream.synchronize()
    wanted = x.float() @ w.float().T
    error = float((y.float() - wanted).abs().max())
    right = error <= 0.02 * float(wanted.abs().max())
    finite = error if math.isfinite(error) else None
    return {"ran": enqueued, "largest_error": finite, "right": right}


def _gpu() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {"name": None, "why": "torch is not installed"}
    if not torch.cuda.is_available():
        return {"name": None, "why": "torch finds no GPU"}
    major, minor = torch.cuda.get_device_capability(0)
    return {"name": torch.cuda.get_device_name(0), "compute_capability": f"{major}.{minor}"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", action="store_true", help="be the process with the library")
    if parser.parse_args().serve:
        prober = _Prober()
        serve({"library": prober.library, "attempt": prober.attempt}, breaks_cuda)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            print(json.dumps(probe(300.0, Path(folder) / "log"), indent=2))
        except WorkerFailed as failure:
            print(failure, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
