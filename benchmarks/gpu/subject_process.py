"""The process that holds one of our engines: `python -m benchmarks.gpu.subject_process`, driven by run.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.age import measure_age
from benchmarks.gpu.attention_sweep import measure_attention
from benchmarks.gpu.correctness import Checks
from benchmarks.gpu.decode import measure_decode
from benchmarks.gpu.device import card_state, describe_device
from benchmarks.gpu.driving import decode_plans, step_seconds
from benchmarks.gpu.kernel_profile import measure_profile
from benchmarks.gpu.limits import measure_limits
from benchmarks.gpu.overheads import measure_overheads
from benchmarks.gpu.prefill import measure_prefill
from benchmarks.gpu.process import Handler, breaks_cuda, serve
from benchmarks.gpu.random_weights import random_tensors
from benchmarks.gpu.reference import FloatReference
from benchmarks.gpu.restore import measure_restore
from benchmarks.gpu.roofline import Limits
from benchmarks.gpu.shapes import FULL, MODELS, QUICK, TINY_GRID, Grid, Point, cut_shape, spec_for
from benchmarks.gpu.subject import Subject
from benchmarks.gpu.tasks import NEED_LIMITS
from benchmarks.gpu.tensorrt_subject import TensorRtSubjects
from benchmarks.gpu.tune import measure_variant
from engine.cuda_options import CudaOptions
from engine.protocol import EngineDead
from engine_build.spec import Target

Section = Callable[..., dict[str, Any]]


class SubjectProcess:
    """What the child answers. Parameters are those of `benchmarks/gpu/tasks.py`.

    `tensorrt` constructs the engines, if it is the TensorRT engine that is measured.
    """

    def __init__(
        self, device: str, size: str, out: Path, tensorrt: TensorRtSubjects | None = None
    ) -> None:
        self._device, self._tiny, self._out = device, size == "tiny", out
        self._grid: Grid = {"full": FULL, "quick": QUICK, "tiny": TINY_GRID}[size]
        self._described = describe_device(device)
        self._tensorrt = tensorrt
        self._target: Target = "cuda" if tensorrt is None else "tensorrt-rtx"
        construct = None if tensorrt is None else tensorrt.construct
        self._subject = Subject(device, int(self._described["memory_bytes"]), construct)
        self._sections: dict[str, Section] = {
            "limits": self._limits,
            "correctness": self._correctness,
            "variant": self._variant,
            "decode": self._decode,
            "prefill": self._prefill,
            "age": self._age,
            "restore": self._restore,
            "overheads": self._overheads,
            "attention": self._attention,
            "profile": self._profile,
        }

    def device(self) -> dict[str, Any]:
        return self._described

    def measure(
        self, section: str, model: str, parameters: dict[str, Any], given: dict[str, Any]
    ) -> dict[str, Any]:
        """One section. `given`: "limits" of the card, "options" of the CUDA engine and "capabilities" of
        TensorRT's plans, as far as measured.

        The options and the state of the card before and after are part of the result, and of a TensorRT
        engine the plan that was open last.
        """
        limits = given.get("limits")
        self._use(given)
        before = card_state()
        extra = {"limits": Limits(**limits)} if limits and section in NEED_LIMITS else {}
        try:
            found = self._sections[section](model, **parameters, **extra)
        except Exception:
            # What broke may be the engine that is open.
            self._subject.close()
            raise
        card = {"before": before, "after": card_state()}
        return {**self._how(), **found, "card": card}

    def _how(self) -> dict[str, Any]:
        if self._tensorrt is None:
            return {"overlap": self._subject.options.overlap}
        return {"plan": dict(self._tensorrt.described)}

    def _use(self, given: dict[str, Any]) -> None:
        if self._tensorrt is None:
            self._subject.options = CudaOptions(**given.get("options", {}))
        else:
            self._tensorrt.capabilities = tuple(given["capabilities"])

    def rounds(
        self, model: str, capacity: int, steps: int, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Seconds of `steps` greedy decode steps at batch 1, for a comparison."""
        self._use(given)
        point = self._point(model, capacity, self._grid.weight_format)
        engine = self._subject.open(point.spec, 1)
        return {
            "seconds": step_seconds(engine, decode_plans(point.spec, 1, steps)),
            **point.described(),
        }

    def _point(self, model: str, capacity: int, weight_format: Any) -> Point:
        return Point(model, capacity, self._grid.max_chunk, weight_format, self._target)

    def _limits(self, model: str) -> dict[str, Any]:
        shapes = {name: MODELS[name] for name in self._grid.models}
        return {"models": model, **measure_limits(self._device, shapes, self._tiny)}

    def _correctness(self, model: str, capacity: int, chunk: int, format: Any) -> dict[str, Any]:
        torch.set_float32_matmul_precision("highest")
        shape = cut_shape(MODELS[model])
        spec = spec_for(shape, capacity, chunk, format, self._target)
        dtype = {"float32": torch.float32, "float16": torch.float16}.get(format, torch.bfloat16)
        tensors = random_tensors(shape, self._device, dtype)
        engine = self._subject.open_with(spec, 4, tensors)
        checks = Checks(engine, FloatReference(shape, tensors), self._device)
        described = {
            "model": model,
            "capacity": capacity,
            "max_chunk": chunk,
            "target": self._target,
        }
        return {
            **described,
            "weight_format": format,
            "layers": shape.num_layers,
            "checks": checks.run(self._grid.effort.draws),
        }

    def _variant(
        self, model: str, capacity: int, format: Any, tune: bool, overlap: bool | None = None
    ) -> dict[str, Any]:
        """`overlap` None: as the variants measured before had it best."""
        point, batches = self._point(model, capacity, format), self._grid.batches[:3]
        early = self._subject.options.overlap if overlap is None else overlap
        options = CudaOptions(tune=tune, overlap=early)
        return measure_variant(self._subject, point, batches, self._grid.effort, options)

    def _decode(self, model: str, capacity: int, format: Any, limits: Limits) -> dict[str, Any]:
        point = self._point(model, capacity, format)
        return measure_decode(self._subject, point, self._grid.batches, limits, self._grid.effort)

    def _prefill(self, model: str, capacity: int, format: Any, limits: Limits) -> dict[str, Any]:
        point = self._point(model, capacity, format)
        return measure_prefill(self._subject, point, limits, self._grid.effort)

    def _age(self, model: str, capacity: int, format: Any) -> dict[str, Any]:
        point = self._point(model, capacity, format)
        return measure_age(self._subject, point, self._grid.ages, self._grid.effort)

    def _restore(self, model: str, capacity: int, format: Any) -> dict[str, Any]:
        point = self._point(model, capacity, format)
        return measure_restore(self._subject, point, self._grid.replay_windows, self._grid.effort)

    def _overheads(self, model: str, capacity: int, format: Any) -> dict[str, Any]:
        point = self._point(model, capacity, format)
        batches = self._grid.batches[:3]
        return measure_overheads(self._subject, point, batches, self._grid.effort)

    def _attention(self, model: str, capacity: int, format: Any, limits: Limits) -> dict[str, Any]:
        self._subject.close()
        point, given = self._point(model, capacity, format), (limits, self._grid.effort)
        memory = self._subject.memory_bytes
        return measure_attention(point, self._grid.batches[:3], self._device, memory, given)

    def _profile(self, model: str, capacity: int, format: Any) -> dict[str, Any]:
        point = self._point(model, capacity, format)
        return measure_profile(self._subject, point, self._grid.batches[:3], self._out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--engine", choices=["cuda", "tensorrt"], default="cuda")
    parser.add_argument("--size", choices=["full", "quick", "tiny"], default="full")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    tensorrt = TensorRtSubjects() if options.engine == "tensorrt" else None
    process = SubjectProcess(options.device, options.size, options.out, tensorrt)
    handlers: dict[str, Handler] = {
        "device": process.device,
        "measure": process.measure,
        "rounds": process.rounds,
    }
    serve(handlers, lambda error: breaks_cuda(error) or isinstance(error, EngineDead))


if __name__ == "__main__":
    main()
