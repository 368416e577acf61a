"""Every engine passes the contract; `pytest --engine NAME` selects one."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from engine.protocol import Engine
from tests.engine_contract import (
    CAPACITY,
    ENGINES,
    MAX_CHUNK,
    SLOTS,
    Candidate,
    EngineContract,
    MakeEngine,
    chosen_engines,
    elsewhere,
    maker_of,
)
from tests.exactness_contract import ExactnessContract


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    asked = metafunc.config.getoption("--engine")
    if "engine" in metafunc.fixturenames:
        metafunc.parametrize("engine", chosen_engines(asked, exact=False), indirect=True)
    if "make" in metafunc.fixturenames:
        metafunc.parametrize("make", chosen_engines(asked, exact=True), indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = maker_of(request.param)(capacity=CAPACITY, max_chunk=MAX_CHUNK, slots=SLOTS)
    yield made
    made.close()


@functools.cache
def kept_engines(name: str) -> MakeEngine:
    """Engines of one kind, each made once: the contract leaves every kv_slot to who comes next."""
    return functools.cache(maker_of(name))


@pytest.fixture
def make(request: pytest.FixtureRequest) -> MakeEngine:
    return kept_engines(request.param)


class TestEngine(EngineContract):
    """The suite of engine_contract.py."""


class TestExactness(ExactnessContract):
    """The suite of exactness_contract.py."""


def names(asked: list[str] | None, exact: bool = False) -> list[str]:
    return [parameter.values[0] for parameter in chosen_engines(asked, exact=exact)]


def test_an_engine_is_chosen_by_its_name_or_the_part_before_the_dash() -> None:
    assert names(None) == list(ENGINES)
    assert {"cpu-float32", "cpu-int8"} == set(names(["cpu"]))
    assert names(["toy", "cpu-int8"]) == ["toy", "cpu-int8"]
    assert names(["cpu"], exact=True) == ["cpu-float32"]
    with pytest.raises(pytest.UsageError, match="gpu: none of toy, cpu-float32"):
        chosen_engines(["gpu"], exact=False)


def test_an_engine_whose_library_is_missing_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lacking = Candidate(elsewhere("tests.no_such_fixtures", "make"), needs=("no_such_library",))
    monkeypatch.setitem(ENGINES, "lacking", lacking)
    with pytest.raises(pytest.skip.Exception, match="lacking needs no_such_library"):
        maker_of("lacking")
