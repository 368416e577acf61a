"""Every engine with host slots passes their contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.open_engine import EngineOptions, open_engine
from engine.protocol import Engine, SlotCopy, StepPlan, num_host_slots
from engine.toy_engine import ToyEngine, ToyText, byte_spec
from engine_build.manifest import load_engine_spec
from tests.engine_contract import maker_of
from tests.engine_fixtures import make_engine
from tests.slot_copy_contract import CAPACITY, HOST_SLOTS, MAX_CHUNK, SLOTS, SlotCopyContract


def toy() -> Engine:
    spec = byte_spec(capacity=CAPACITY, max_chunk=MAX_CHUNK)
    return ToyEngine(spec, SLOTS, ToyText(words=()), host_slots=HOST_SLOTS)


def onnx_float32() -> Engine:
    return make_engine(capacity=CAPACITY, max_chunk=MAX_CHUNK, slots=SLOTS, host_slots=HOST_SLOTS)


def onnx_int8() -> Engine:
    return make_engine(
        capacity=CAPACITY,
        max_chunk=MAX_CHUNK,
        slots=SLOTS,
        weight_format="int8",
        host_slots=HOST_SLOTS,
    )


def cuda_interpreted() -> Engine:
    maker_of("cuda-interpreted")  # skips where it cannot run
    from engine.cuda_options import CudaOptions
    from tests.cuda_fixtures import cuda_spec, make_cuda_engine

    slot_bytes = cuda_spec(capacity=CAPACITY, max_chunk=MAX_CHUNK).slot_bytes
    return make_cuda_engine(
        capacity=CAPACITY,
        max_chunk=MAX_CHUNK,
        slots=SLOTS,
        options=CudaOptions(host_memory_bytes=HOST_SLOTS * slot_bytes),
    )


# To add an engine with host slots, add a maker; what is slow here runs with the slow tests.
MAKERS: tuple[Callable[[], Engine], ...] = (toy, onnx_float32, onnx_int8)
SLOW_MAKERS: tuple[Callable[[], Engine], ...] = (cuda_interpreted,)


@pytest.fixture(
    params=[*MAKERS, *(pytest.param(make, marks=pytest.mark.slow) for make in SLOW_MAKERS)],
    ids=lambda make: make.__name__,
)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made: Engine = request.param()
    yield made
    made.close()


class TestSlotCopies(SlotCopyContract):
    """The suite of slot_copy_contract.py."""


def test_an_engine_without_host_slots_refuses_copies() -> None:
    engine = ToyEngine(byte_spec(), 2)
    assert num_host_slots(engine) == 0
    with pytest.raises(ValueError, match=r"copies\[0\].host_slot: 0, there are 0"):
        engine.step(StepPlan((), (SlotCopy("save", 0, 0),)))


def test_host_slots_are_as_many_as_fit_the_budget(tiny_engine_dir: Path) -> None:
    slot_bytes = load_engine_spec(tiny_engine_dir, None).slot_bytes
    for budget, slots in ((0, 0), (slot_bytes - 1, 0), (3 * slot_bytes + 5, 3)):
        options = EngineOptions(2 * slot_bytes, host_memory_bytes=budget)
        assert num_host_slots(open_engine(tiny_engine_dir, options)) == slots
