"""Plans for a 0.5B and an 8B model, built by TensorRT-RTX without a GPU: build time and size.

    python -m benchmarks.tensorrt_plans            # minutes; writes results/tensorrt_plans-DATE.json
    python -m benchmarks.tensorrt_plans --busy     # says in the result that the machine was shared
    python -m benchmarks.tensorrt_plans --pack     # also packs the library with xz (minutes)

Of each model only its shape is used: a plan holds no weights. Build times are those of this machine, on which
nothing is timed or run: TensorRT-RTX compiles kernels where a plan runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import lzma
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx

from benchmarks import report
from benchmarks.gpu.shapes import LLAMA_3_8B, QWEN2_5_0_5B
from engine_build.engine_names import GRAPH_FILE
from engine_build.graph import graph_of_inputs
from engine_build.plan import PLAN_FILE, build_plan
from engine_build.plan_profiles import plan_profiles
from engine_build.spec import EngineSpec, WeightFormat, kv_dtype_for
from engine_build.tensorrt_library import load_tensorrt

CAPACITY, MAX_CHUNK = 1024, 512

MODELS = {"Qwen2.5-0.5B": QWEN2_5_0_5B, "Llama-3-8B": LLAMA_3_8B}

CASES: tuple[tuple[str, WeightFormat], ...] = (
    ("Qwen2.5-0.5B", "bfloat16"),
    ("Llama-3-8B", "bfloat16"),
    ("Llama-3-8B", "int8"),
)


def measure(model: str, weight_format: WeightFormat) -> dict[str, Any]:
    """Build one plan, from the model's shape to the file."""
    kv_dtype = kv_dtype_for(weight_format)
    spec = EngineSpec(MODELS[model], CAPACITY, MAX_CHUNK, weight_format, kv_dtype, "tensorrt-rtx")
    with tempfile.TemporaryDirectory() as folder:
        graph, plan = Path(folder) / GRAPH_FILE, Path(folder) / PLAN_FILE
        onnx.save_model(graph_of_inputs(spec), graph)
        started = time.perf_counter()
        build_plan(spec, graph, plan, lambda fraction: None)
        return {
            "model": model,
            "weight_format": weight_format,
            "graph_bytes": graph.stat().st_size,
            "plan_bytes": plan.stat().st_size,
            "build_s": round(time.perf_counter() - started, 1),
            "num_profiles": len(plan_profiles(spec)),
        }


def library_sizes(pack: bool) -> dict[str, int]:
    """Bytes of the library's shared objects as installed and, if asked for, packed with xz."""
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    if found is None or found.origin is None:
        return {}
    files = sorted(Path(found.origin).parent.glob("*.so*"))
    sizes = {"installed_bytes": sum(file.stat().st_size for file in files)}
    if pack:
        sizes["xz_bytes"] = sum(_packed(file) for file in files)
    return sizes


def _packed(file: Path) -> int:
    packer, total = lzma.LZMACompressor(preset=6), 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            total += len(packer.compress(block))
    return total + len(packer.flush())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--busy", action="store_true", help="the machine is shared: say so")
    parser.add_argument("--pack", action="store_true", help="pack the library with xz")
    arguments = parser.parse_args()
    trt = load_tensorrt("tensorrt-rtx")
    plans = []
    for model, weight_format in CASES:
        plans.append(measure(model, weight_format))
        print(plans[-1], flush=True)
    result = {
        "library": f"tensorrt_rtx {trt.__version__}",
        "library_size": library_sizes(arguments.pack),
        "gpu": "none",
        "machine_was_shared": arguments.busy,
        "capacity": CAPACITY,
        "max_chunk": MAX_CHUNK,
        "plans": plans,
    }
    print(report.save("tensorrt_plans", result))
    header = ["model", "weights", "graph KB", "plan MB", "built in s"]
    rows = [
        [
            str(plan["model"]),
            str(plan["weight_format"]),
            f"{plan['graph_bytes'] / 1e3:.0f}",
            f"{plan['plan_bytes'] / 1e6:.1f}",
            f"{plan['build_s']:.0f}",
        ]
        for plan in plans
    ]
    print(report.table([header, *rows]))


if __name__ == "__main__":
    main()
