"""Which engine a configuration means: found or built, then described and started.

Every process that needs one (driver, replicas, ingress) calls `locate_engine`; the first on a machine
builds the demo engine and compiles the CPU kernels, the others wait for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.gpus import gpu_names, gpus_here
from deployments.config import TOY_MODEL, ConfigError, ServiceConfig
from deployments.text import ChatCodec
from engine.cuda_options import INTERPRETER, interpreted
from engine.kernels.compile import KernelError, kernel_library
from engine.open_engine import EngineOptions, open_engine
from engine.protocol import Engine, Row, StepPlan
from engine.toy_engine import ToyEngine, ToyText, byte_spec
from engine.verify_report import NotVerified, Verified, check_verified
from engine.window import SinkWindow
from engine_build.build import BuildOptions, no_progress
from engine_build.demo import DemoModelError, ensure_demo_engine
from engine_build.files import sinkserve_home
from engine_build.manifest import ManifestError, load_engine_spec, load_manifest
from engine_build.spec import EngineSpec, SpecError

_UNUSABLE = (ManifestError, SpecError, DemoModelError, KernelError, NotVerified, OSError)

TOY_STEP_S = 0.002
TOY_REPLY_TOKENS = 60
MAX_TOY_SLOTS = 1024


@dataclass(frozen=True, slots=True)
class EngineFiles:
    """An engine that can be started. `folder` is None for the toy, which has no files.

    `fingerprint` stands for everything that gives a conversation's token ids their meaning.
    """

    spec: EngineSpec
    fingerprint: str
    codec: ChatCodec
    folder: Path | None


def locate_engine(
    config: ServiceConfig, progress: Callable[[str, float], None] = no_progress
) -> EngineFiles:
    """Raises ConfigError with what to do when there is no such engine and none can be built."""
    if config.model == TOY_MODEL:
        spec = byte_spec(config.capacity, config.max_chunk)
        return EngineFiles(spec, spec.fingerprint, ChatCodec.for_toy(), None)
    try:
        folder = Path(config.model)
        if not config.is_engine_directory:
            options = BuildOptions(
                capacity=config.capacity,
                max_chunk=config.max_chunk,
                weight_format=config.weight_format,
            )
            folder = ensure_demo_engine(sinkserve_home(), options, progress)
        spec = load_engine_spec(folder, config.capacity_override)
        check_verified(folder, spec)
        if spec.target == "cpu":
            kernel_library(sinkserve_home(), progress)
        fingerprint = load_manifest(folder).fingerprint(spec)
        return EngineFiles(spec, fingerprint, ChatCodec.load(folder), folder)
    except _UNUSABLE as error:
        raise ConfigError([f"model: {error}"]) from error


def computes_here(spec: EngineSpec) -> tuple[str, ...]:
    """Names of what would compute for this engine in this process: the machine's GPUs, or the interpreter.

    What was verified on one of them says nothing of the other.
    """
    return (INTERPRETER,) if interpreted(spec.target) else gpu_names(gpus_here())


def gpus_of_replica(config: ServiceConfig, spec: EngineSpec) -> float:
    """What a replica asks Ray for: see `ServiceConfig.gpus_for`; the interpreter needs none."""
    gpus = config.gpus_for(spec)
    return 0.0 if interpreted(spec.target) else gpus


def warm_up(engine: Engine) -> None:
    """Run a chunk and a decode step, so that no conversation's first turn pays for first-time costs.

    Leaves tokens in kv_slot 0 that no plan ever refers to.
    """
    spec = engine.spec
    window = SinkWindow(1, spec.capacity - 1, spec.slot_tokens - 1)
    chunk = np.zeros(spec.max_chunk, dtype=np.int32)
    engine.step(StepPlan((Row(0, 0, chunk, window, logits="last"),)))
    engine.step(StepPlan((Row(0, spec.max_chunk, chunk[:1], window, logits="last"),)))


def start_engine(config: ServiceConfig, files: EngineFiles, threads: int) -> Engine:
    """The engine in this process. `threads` are those of all its ranks.

    Raises ConfigError when the memory budget holds no kv_slot, when this machine cannot run the engine, or
    for an engine for GPUs that was not verified on a machine like this one.
    """
    if files.folder is None:
        slots = config.cpu_budget_bytes // files.spec.slot_bytes
        if not slots:
            need = files.spec.slot_bytes
            raise ConfigError([f"memory_budget_bytes: below one kv_slot. Use at least {need}"])
        return ToyEngine(
            files.spec,
            max_resident=min(slots, MAX_TOY_SLOTS),
            text=dataclasses.replace(ToyText(), stop_period=TOY_REPLY_TOKENS),
            step_delay_s=TOY_STEP_S,
            host_slots=min(config.host_memory_bytes // files.spec.slot_bytes, MAX_TOY_SLOTS),
        )
    spec = files.spec
    try:
        if spec.target != "cpu":
            now = Verified.of(files.folder, spec, computes_here(spec))
            check_verified(files.folder, spec, now)
        return open_engine(
            files.folder,
            EngineOptions(
                memory_budget_bytes=config.memory_budget_bytes,
                threads=threads,
                capacity=spec.capacity,
                max_running=config.max_running,
                host_memory_bytes=config.host_memory_bytes,
                step_timeout_s=config.step_timeout_s,
            ),
        )
    except (SpecError, ManifestError, KernelError, NotVerified) as error:
        raise ConfigError([str(error)]) from error
