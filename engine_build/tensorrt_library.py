"""TensorRT and TensorRT-RTX: the one file that imports either, and all in which building differs.

Both have the same API under two names. What differs:

    tensorrt      times kernels on the GPU it finds, and builds for that GPU alone
    tensorrt_rtx  needs no GPU: kernels are compiled where the plan runs, for a choice of compute
                  capabilities (by default those that it calls portable)
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_build.libraries import LIBRARIES, missing_library
from engine_build.spec import SpecError, Target

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
CURRENT = "current"
"""A compute capability: that of the GPU that is here, which must be there at the build."""

_LAYERS = ("add_kv_cache_update", "add_rotary_embedding")


def load_tensorrt(target: Target) -> Any:
    """The module for a target. Raises SpecError saying what to install where it is missing or too old."""
    module = MODULES[target]
    try:
        trt = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = missing_library(target, error)
        if missing is None:
            raise
        raise missing from error
    except (
        ImportError
    ) as error:  # the stub that stands for it where NVIDIA's index cannot be reached
        raise SpecError(
            "target", f"{module} cannot be loaded ({error})", _install(module)
        ) from error
    lacking = [name for name in _LAYERS if not hasattr(trt.INetworkDefinition, name)]
    if lacking:
        problem = f"{module} {trt.__version__} lacks {lacking[0]}"
        raise SpecError("target", problem, _install(module))
    return trt


def _install(module: str) -> str:
    return f"Install it: {LIBRARIES[module].install}"


@functools.cache
def messages(trt: Any) -> Any:
    """The logger of a library; `errors` holds what it said since the last `clear`.

    A process has one: the library keeps the first that it is given.
    """

    class Messages(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(text)

        def clear(self) -> None:
            self.errors = []

        def last(self) -> str:
            """The newest errors in one line."""
            return (
                "; ".join(" ".join(text.split()) for text in self.errors[-3:]) or "no reason given"
            )

    return Messages()


def open_builder(trt: Any, target: Target) -> Any:
    """A builder. Raises SpecError where TensorRT finds no GPU to time kernels on."""
    log = messages(trt)
    log.clear()
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # what its bindings make of a null pointer
        raise SpecError(
            "target",
            f"{target} cannot start here ({log.last()})",
            "Build on a machine with the GPU that is to serve, or use tensorrt-rtx",
        ) from error
    return builder


def choose_capabilities(trt: Any, target: Target, config: Any, wanted: Sequence[str]) -> None:
    """Build for GPUs of these compute capabilities ("8.9", or "current" for the GPU that is here); none:
    the library's own choice.

    One that the library has no name for is asked for by its number. Raises SpecError in the library's words,
    naming those that it knows, when it refuses one.
    """
    if not wanted:
        return
    if target != "tensorrt-rtx":
        raise SpecError(
            "compute_capabilities",
            f"{target} builds for the GPU it finds",
            "Leave them out, or use tensorrt-rtx",
        )
    known = known_capabilities(trt)
    log = messages(trt)
    log.clear()
    config.num_compute_capabilities = len(wanted)
    for number, capability in enumerate(wanted):
        value = _capability(trt, known, capability)
        if value is None or not config.set_compute_capability(value, number):
            reason = (
                f"{target} {trt.__version__} does not build for compute capability {capability}"
            )
            raise SpecError(
                "compute_capabilities",
                f"{reason} ({log.last()})" if value is not None else reason,
                f"Use of {', '.join(known)}, or {CURRENT}",
            )


def _capability(trt: Any, known: Mapping[str, Any], capability: str) -> Any:
    """The library's value for "8.9", "9.0", "current"; None for what is no number."""
    if capability == CURRENT:
        return trt.ComputeCapability.CURRENT
    if capability in known:
        return known[capability]
    major, _, minor = capability.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        return None
    return trt.ComputeCapability(10 * int(major) + int(minor))


def known_capabilities(trt: Any) -> dict[str, Any]:
    """The compute capabilities that the library has a name for, "7.5" first."""
    members = trt.ComputeCapability.__members__
    numbers = {int(name[2:]): value for name, value in members.items() if name.startswith("SM")}
    return {f"{number // 10}.{number % 10}": numbers[number] for number in sorted(numbers)}


class OpenPlan:
    """A plan ready to run on this machine's GPU.

    `captures` says that contexts replay CUDA graphs by themselves (TensorRT-RTX, which knows when its
    kernels are final); TensorRT's are captured by who runs them. `kernel_cache` is a file where
    TensorRT-RTX keeps the kernels that it compiles at the first run.
    """

    def __init__(self, target: Target, plan: bytes, kernel_cache: Path) -> None:
        """Raises SpecError with the library's own words where the plan cannot run."""
        self._trt = trt = load_tensorrt(target)
        log = messages(trt)
        log.clear()
        self._runtime = trt.Runtime(log)  # must outlive the engine
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise SpecError(
                "target",
                f"{target} {trt.__version__} cannot run this plan here ({log.last()})",
                "Build it again with this release and for this GPU, or use --target cuda",
            )
        self.captures = target == "tensorrt-rtx"
        self._kernel_cache = kernel_cache
        self._compiled: Any = None

    def said(self) -> str:
        """The library's newest errors, in one line."""
        words: str = messages(self._trt).last()
        return words

    def context(self, profile: int, stream: int) -> Any:
        """An execution context for one profile, without memory of its own: see `set_device_memory`.

        `stream` is a CUDA stream's handle. Raises SpecError where none can be made.
        """
        trt = self._trt
        log = messages(trt)
        log.clear()
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.captures:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            config.set_runtime_cache(self._kernels(config))
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise SpecError(
                "target",
                f"{trt.__name__} makes no context for profile {profile} ({log.last()})",
                "Free GPU memory, or build the plan again",
            )
        return context

    def close(self) -> None:
        """Keep the kernels that were compiled for the next start; idempotent."""
        if self._compiled is not None:
            partial = self._kernel_cache.with_suffix(".partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(memoryview(self._compiled.serialize()))
            partial.replace(self._kernel_cache)
        self._compiled = None

    def _kernels(self, config: Any) -> Any:
        """One cache for all contexts. What another release left is of no use and is compiled again."""
        if self._compiled is None:
            self._compiled = config.create_runtime_cache()
            if self._kernel_cache.is_file():
                self._compiled.deserialize(self._kernel_cache.read_bytes())
        return self._compiled
