"""Which engine a configuration means, and starting it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.config import ConfigError, load_config
from deployments.engine_files import locate_engine, start_engine, warm_up

TOY = {"model": "toy", "capacity": 32, "max_chunk": 8}


def test_the_toy_needs_no_files() -> None:
    files = locate_engine(load_config(TOY))
    config = load_config({**TOY, "memory_budget_bytes": 5 * files.spec.slot_bytes})
    assert (files.folder, files.spec.capacity) == (None, 32)
    engine = start_engine(config, files, threads=1)
    assert engine.max_resident == 5
    warm_up(engine)
    engine.close()


def test_another_window_is_another_fingerprint() -> None:
    narrow, wide = (locate_engine(load_config({**TOY, "capacity": c})) for c in (32, 64))
    assert narrow.fingerprint != wide.fingerprint


def test_an_engine_directory_is_started_with_its_own_capacity_or_another(
    tiny_engine_dir: Path,
) -> None:
    fields = {"model": str(tiny_engine_dir), "memory_budget_bytes": 1 << 22}
    for capacity, changes in ((32, {}), (16, {"capacity": 16})):
        config = load_config({**fields, **changes})
        files = locate_engine(config)
        engine = start_engine(config, files, threads=1)
        assert files.spec.capacity == engine.spec.capacity == capacity
        warm_up(engine)
        engine.close()


def test_a_folder_that_is_no_engine_is_refused_with_a_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: .*sinkserve build"):
        locate_engine(load_config({"model": str(tmp_path)}))


@pytest.mark.parametrize("model", ["toy", "tiny"])
def test_a_budget_below_one_slot_is_refused(model: str, tiny_engine_dir: Path) -> None:
    name = "toy" if model == "toy" else str(tiny_engine_dir)
    capacity = {"capacity": 4096} if model == "toy" else {}
    config = load_config({"model": name, **capacity, "memory_budget_bytes": 1024})
    files = locate_engine(config)
    with pytest.raises(ConfigError, match="memory_budget_bytes"):
        start_engine(config, files, threads=1)
