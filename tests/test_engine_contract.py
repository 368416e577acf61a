"""Every engine passes the contract; `pytest --engine NAME` selects one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.protocol import Engine
from tests.engine_contract import ENGINES, EngineContract

SLOW = {"test_chunking_does_not_matter", "test_slots_do_not_see_one_another"}
"""For the engine whose kernels are interpreted."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = metafunc.config.getoption("--engine") or list(ENGINES)
    slow = [pytest.mark.slow] if metafunc.function.__name__ in SLOW else []
    engines = [pytest.param(name, marks=slow if name == "cuda" else []) for name in chosen]
    metafunc.parametrize("engine", engines, indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = ENGINES[request.param]()
    yield made
    made.close()


class TestEngine(EngineContract):
    """The suite of engine_contract.py."""
