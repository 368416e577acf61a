"""The scripts, as far as they can be tried without installing anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["scripts/up", "scripts/test", "scripts/check", "scripts/lock", ".ci/run"]
NEEDED_TOOLS = ["bash", "dirname", "cat", "mkdir", "flock", "rm"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_executable_and_parse(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The scripts and what they read, without an environment."""
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """A PATH with a shell and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in NEEDED_TOOLS:
        found = shutil.which(tool)
        if found is not None:
            (folder / tool).symlink_to(found)
    return str(folder)


def test_without_python_the_scripts_say_what_to_install(clone: Path, bare_path: str) -> None:
    environment = {"PATH": bare_path}
    result = subprocess.run(
        ["bash", "scripts/up"],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert result.returncode == 1
    assert "Python 3.11, 3.12 or 3.13 is needed" in result.stderr
    assert not (clone / ".venv").exists()


def prepare(clone: Path, which: str) -> subprocess.CompletedProcess[str]:
    """Run `prepare` of _env.sh with a pip that only notes how it was called."""
    binaries = clone / ".venv" / "bin"
    binaries.mkdir(parents=True, exist_ok=True)
    python, command = binaries / "python", binaries / "sinkserve"
    python.write_text(
        "#!/bin/sh\n"
        f'if [ "$2" = pip ]; then echo "$*" >> "{clone}/pip_calls"; exit ${{FAIL_PIP:-0}}; fi\n'
        f'exec "{shutil.which("python3")}" "$@"\n'
    )
    command.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    command.chmod(0o755)
    return subprocess.run(
        ["bash", "-c", f'ROOT="{clone}"; . scripts/_env.sh; prepare {which}'],
        cwd=clone,
        capture_output=True,
        text=True,
        check=False,
    )


def num_pip_calls(clone: Path) -> int:
    calls = clone / "pip_calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def test_an_environment_is_installed_once_and_again_when_the_pins_change(clone: Path) -> None:
    for _ in range(2):
        assert prepare(clone, "default").returncode == 0
        assert num_pip_calls(clone) == 2  # the pins, and this project itself
    with (clone / "requirements" / "default.txt").open("a") as pins:
        pins.write("# changed\n")
    assert prepare(clone, "default").returncode == 0
    assert num_pip_calls(clone) == 4


def test_an_environment_for_dev_serves_default_too(clone: Path) -> None:
    assert prepare(clone, "dev").returncode == 0
    assert prepare(clone, "default").returncode == 0
    assert num_pip_calls(clone) == 2


def test_a_failed_installation_is_explained_and_not_stamped(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL_PIP", "1")
    result = prepare(clone, "default")
    assert result.returncode == 1
    assert "the installation failed" in result.stderr
    assert not (clone / ".venv" / ".installed-default").exists()


def pins_of(name: str) -> dict[str, set[str]]:
    """Package -> versions (one per platform marker), of a requirements file."""
    pins: dict[str, set[str]] = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;]+)", line)
        if match:
            pins.setdefault(match[1].lower().replace("_", "-"), set()).add(match[2])
    return pins


def test_every_dependency_is_pinned_to_the_same_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    default, dev = pins_of("default"), pins_of("dev")
    assert default.items() <= dev.items()
    for pins, lines in (
        (default, project["dependencies"]),
        (dev, project["optional-dependencies"]["dev"]),
    ):
        for line in lines:
            name, version = re.split(r"(?:\[.*\])?==", line)
            assert pins[name.lower().replace("_", "-")] == {version}, line


def test_every_pin_has_a_hash_and_none_an_address() -> None:
    for name in ("default", "dev"):
        text = (ROOT / "requirements" / f"{name}.txt").read_text()
        entries = re.split(r"\n(?=[A-Za-z])", text)[1:]
        assert entries
        assert all("--hash=sha256:" in entry for entry in entries)
        assert "://" not in text


def test_large_gpu_packages_stay_out_of_the_default_installation() -> None:
    assert not {"torch", "tensorrt", "tensorrt-llm"} & set(pins_of("default"))
