"""The decoder's graph as a TensorRT plan.

The plan holds structure and kernels; weights are its inputs and stay in their own file, so that one plan
serves all ranks. Only 4-bit matrices are in it, and then there is one for each rank. TensorRT-RTX plans are
built on any machine, TensorRT's on one with the GPU that is to serve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_build.plan_inputs import holds_weights
from engine_build.plan_profiles import input_shapes, plan_profiles
from engine_build.shard import rank_folder
from engine_build.spec import EngineSpec, SpecError, Target
from engine_build.tensorrt_library import (
    choose_capabilities,
    load_tensorrt,
    messages,
    open_builder,
)

PLAN_FILE = "decoder.plan"
PLAN_TARGETS: tuple[Target, ...] = ("tensorrt", "tensorrt-rtx")
"""Targets that run a plan: a graph of theirs is built further, and fits one capacity."""


def plan_file(spec: EngineSpec, engine_dir: Path, rank: int) -> Path:
    """The plan that a rank runs."""
    own = holds_weights(spec)
    return (rank_folder(engine_dir, rank, spec.tp_size) if own else engine_dir) / PLAN_FILE


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """`compute_capabilities` such as ("8.9", "12.0"): GPUs that a TensorRT-RTX plan is for, its own choice
    if empty. `timing_cache` is a file of measured kernels that builds of one GPU share."""

    compute_capabilities: tuple[str, ...] = ()
    timing_cache: Path | None = None


DEFAULT_PLAN_OPTIONS = PlanOptions()


def check_library(target: Target) -> None:
    """Raises SpecError where a plan for this target cannot be built, before anything is."""
    open_builder(load_tensorrt(target), target)


def build_plan(
    spec: EngineSpec,
    graph: Path,
    out: Path,
    progress: Callable[[float], None],
    options: PlanOptions = DEFAULT_PLAN_OPTIONS,
) -> None:
    """Build the plan of `graph` for the shapes of `plan_profiles` and write it to `out`.

    Raises SpecError when the library is missing, refuses the graph, an option or a compute capability,
    or cannot build here.
    """
    trt = load_tensorrt(spec.target)
    builder = open_builder(trt, spec.target)
    log = messages(trt)
    log.clear()
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):  # beside it are the weights that it holds
        reasons = [parser.get_error(n).desc() for n in range(parser.num_errors)]
        raise SpecError(
            "target",
            f"{spec.target} {trt.__version__} does not accept {graph.name} ({'; '.join(reasons)})",
            "Use another release of it",
        )
    config = builder.create_builder_config()
    if spec.weight_format == "float32":
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 is asked for where every bit counts
    for profile in plan_profiles(spec):
        shapes = [input_shapes(spec, size) for size in (profile.least, profile.usual, profile.most)]
        ranges = builder.create_optimization_profile()
        for name in shapes[0]:
            ranges.set_shape(name, *(shape[name] for shape in shapes))
        config.add_optimization_profile(ranges)
    choose_capabilities(trt, spec.target, config, options.compute_capabilities)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    if options.timing_cache is not None:
        known = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=True)
    progress(0.0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SpecError(
            "target",
            f"{spec.target} {trt.__version__} built no plan ({log.last()})",
            "Free memory, lower max_chunk, or use another release of it",
        )
    if options.timing_cache is not None:
        partial = options.timing_cache.with_suffix(".partial")
        partial.write_bytes(memoryview(config.get_timing_cache().serialize()))
        partial.replace(options.timing_cache)
    out.write_bytes(memoryview(plan))
    progress(1.0)


def _monitor(trt: Any, progress: Callable[[float], None]) -> Any:
    """A progress monitor that reports one growing fraction of nested phases of unknown length."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: list[tuple[str, int, int]] = []
            self._highest = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases.append((phase_name, 0, max(num_steps, 1)))

        def phase_finish(self, phase_name: str) -> None:
            self._phases = [phase for phase in self._phases if phase[0] != phase_name]

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._phases = [
                (name, step + 1 if name == phase_name else done, steps)
                for name, done, steps in self._phases
            ]
            fraction, share = 0.0, 1.0
            for _, done, steps in self._phases:
                fraction += share * min(done, steps) / steps
                share /= steps
            self._highest = max(self._highest, min(fraction, 0.99))
            progress(self._highest)
            return True

    return Monitor()
