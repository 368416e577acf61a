"""Fixtures that several test files share. Everything heavy is built once per machine and kept.

Builds are imported where they are used: most test files need none.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.valkey_fixture import redis_url, valkey_server

__all__ = ["redis_url", "valkey_server"]

# No test asserts on time: the machine may be busy.
settings.register_profile("sinkserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sinkserve")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", action="append", help="only these engines of engine_contract.py")


HANGING_AFTER_S = 240.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that waits for ever is to fail, not to hold up all others."""
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = _bounded(item.obj)


def _bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def bounded(*args: Any, **fixtures: Any) -> None:
        async with asyncio.timeout(HANGING_AFTER_S):
            await test(*args, **fixtures)

    return bounded


@pytest.fixture(scope="session")
def cache_folder() -> Path:
    """A folder kept between runs: $SINKSERVE_TEST_CACHE, else .cache in the repository."""
    default = Path(__file__).resolve().parent.parent / ".cache"
    return Path(os.environ.get("SINKSERVE_TEST_CACHE") or default)


@pytest.fixture(scope="session")
def demo_gguf(cache_folder: Path) -> Path:
    """The demo model's GGUF file, fetched once behind a file lock."""
    from engine_build.demo import fetch_demo_model

    return fetch_demo_model(cache_folder)


@pytest.fixture(scope="session")
def demo_engine_dir(cache_folder: Path) -> Path:
    """The demo model's int8 CPU engine at capacity 512, built once behind a file lock."""
    from engine_build.demo import ensure_demo_engine

    return ensure_demo_engine(cache_folder)


@pytest.fixture(scope="session")
def tiny_engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 engine of the tiny random Llama, capacity 32, with its byte-level tokenizer."""
    from engine_build.build import BuildOptions, build_engine
    from tests.tiny_models import write_hf_folder

    folder = tmp_path_factory.mktemp("tiny")
    model = write_hf_folder(folder / "model", "llama")
    options = BuildOptions(capacity=32, max_chunk=16, weight_format="float32")
    return build_engine(model, folder / "engine", options)
