"""Does TensorRT-RTX run on compute capability 9.0 (H100, H200), which its documentation does not list?

    python -m benchmarks.gpu.tensorrt_sm90          # prints JSON

Builds a small plan (one matrix product, float16) each way that the library offers, asks it of each plan
whether it is valid here, and where it opens runs it and compares with torch. What the library says is
recorded word for word. Works on any GPU, and says what it can without one.

`probe` does that in a process of its own, so that a crash in the library is an answer like any other.
Where the library is not installed it is looked for in `SINKSERVE_TENSORRT_RTX`, a folder of unpacked wheels.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

FOLDER = "SINKSERVE_TENSORRT_RTX"
ROWS, WIDTH, OUT = 8, 256, 512
_STARTED = "benchmarks.gpu.tensorrt_sm90"


def probe(timeout_s: float = 120.0) -> dict[str, Any]:
    """What TensorRT-RTX says and does on this machine's first GPU: {"library", "gpu", "plans", "runs"}.

    "plans" has one entry for each way to build; "runs" names those whose result was right. A process
    that ended otherwise adds "ended", its last words, to what it had found. Never raises.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", _STARTED],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        out, ended = done.stdout, f"exit status {done.returncode}: {done.stderr[-1000:]}"
        failed = done.returncode != 0
    except subprocess.TimeoutExpired as error:
        out, ended, failed = _text(error.stdout), f"no end after {timeout_s:g} s", True
    lines = [line for line in out.splitlines() if line.startswith("{")]
    answer: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return {**answer, "ended": ended} if failed else answer


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


class _Log:
    """Makes the library's logger and keeps what it says."""

    def __init__(self, trt: Any) -> None:
        said: list[str] = []

        class Messages(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    said.append(text)

        self.logger = Messages()
        self._said = said

    def take(self) -> list[str]:
        """What was said since the last call."""
        taken, self._said[:] = list(self._said), []
        return taken


def _build(trt: Any, log: _Log, capability: Any) -> tuple[bytes | None, list[str]]:
    """x [1..8, 256] times the transpose of w [512, 256], for one capability or the library's choice."""
    builder = trt.Builder(log.logger)
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
    if capability is not None:
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(capability, 0):
            return None, log.take()
    plan = builder.build_serialized_network(network, config)
    return (None if plan is None else bytes(plan)), log.take()


def _run(trt: Any, engine: Any) -> dict[str, Any]:
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


def _try(trt: Any, log: _Log, way: str, capability: Any, gpu: dict[str, Any]) -> dict[str, Any]:
    """One way to build, and what becomes of its plan."""
    entry: dict[str, Any] = {"built_for": way, "plan_bytes": None}
    try:
        plan, said = _build(trt, log, capability)
        if plan is None:
            return {**entry, "said": said}
        entry["plan_bytes"] = len(plan)
        runtime = trt.Runtime(log.logger)
        validity, diagnostics = runtime.get_engine_validity(plan)
        entry["valid"] = str(validity)
        reasons = trt.EngineInvalidityDiagnostics.__members__
        entry["diagnostics"] = [n for n, bit in reasons.items() if int(diagnostics) & int(bit)]
        engine = runtime.deserialize_cuda_engine(plan)
        entry["opens"] = engine is not None
        if engine is not None and gpu["name"] is not None:
            entry.update(_run(trt, engine))
    except Exception as error:
        entry["raised"] = f"{type(error).__name__}: {error}"
    return {**entry, "said": log.take()}


def main() -> None:
    """Prints what was found so far after each step: the last line counts."""
    answer: dict[str, Any] = {"library": None, "gpu": _gpu(), "plans": [], "runs": []}
    if os.environ.get(FOLDER):
        sys.path.insert(0, os.environ[FOLDER])
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        print(json.dumps({**answer, "why": str(error)}), flush=True)
        return
    names = trt.ComputeCapability.__members__
    answer["library"] = {
        "version": trt.__version__,
        "names": [name for name in names if name.startswith("SM")],
    }
    log = _Log(trt)
    ways: dict[str, Any] = {
        "9.0, asked for by number": trt.ComputeCapability(90),
        "the library's choice": None,
        "the GPU that is here": names["CURRENT"],
        **{name: names[name] for name in answer["library"]["names"]},
    }
    for way, capability in ways.items():
        entry = _try(trt, log, way, capability, answer["gpu"])
        answer["plans"].append(entry)
        if entry.get("right"):
            answer["runs"].append(way)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
