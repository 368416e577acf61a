"""Every engine passes the contract; `pytest --engine NAME` selects one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.protocol import Engine
from tests.engine_contract import ENGINES, EngineContract


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = metafunc.config.getoption("--engine") or list(ENGINES)
    metafunc.parametrize("engine", chosen, indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = ENGINES[request.param]()
    yield made
    made.close()


class TestEngine(EngineContract):
    """The suite of engine_contract.py."""
