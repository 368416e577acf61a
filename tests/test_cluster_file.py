"""The commands of the cluster files, run by a shell as Ray's launcher runs them: on fake nodes.

What `ray up` does with them on real ones is told in docs/cluster.md.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.app import build
from deployments.config import ConfigError
from tests.test_yaml import cloud_example

ROOT = Path(__file__).parent.parent
FAKE = """#!/bin/sh
echo "$(basename "$0") $* [$RAY_AUTH_MODE/$RAY_USAGE_STATS_ENABLED/$RAY_HEAD_IP] $PWD" >>"$HOME/called"
case "$0 $1 $2" in *python3.11\\ -m\\ venv*)
    mkdir -p "$3/bin"
    for tool in pip ray serve mpiexec; do cp "$0" "$3/bin/$tool"; done
esac
"""


FILES = {
    "local": (ROOT / "ray_cluster.yaml").read_text(),
    "cloud": cloud_example(),
    "gpu": (ROOT / "examples" / "ray_cluster_gpu.yaml").read_text(),
}


class Node:
    """A home, and a python3.11 that is no more than its name."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        tools = folder / "bin"
        tools.mkdir()
        (tools / "python3.11").write_text(FAKE)
        (tools / "python3.11").chmod(0o755)
        self._path = f"{tools}:/usr/bin:/bin"

    def run(self, command: str) -> str:
        """As Ray's SSHCommandRunner does. Returns what was called."""
        called = self.home / "called"
        called.write_text("")
        (self.home / ".bashrc").touch()
        line = f"source ~/.bashrc; export OMP_NUM_THREADS=1 && (export RAY_HEAD_IP=10.1.1.1; {command})"
        subprocess.run(
            ["bash", "--noprofile", "-c", line],
            env={"HOME": str(self.home), "PATH": self._path},
            cwd=self.home,
            check=True,
            capture_output=True,
            timeout=20,
        )
        return called.read_text()

    def set_up(self, config: dict[str, Any]) -> str:
        return "".join(self.run(command) for command in config["setup_commands"])


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.mark.parametrize("which", FILES)
def test_a_node_is_set_up_once_and_started_each_time(which: str, node: Node) -> None:
    config = yaml.safe_load(FILES[which])
    first, again = node.set_up(config), node.set_up(config)
    assert first.count(" -m venv ") == 1
    assert " -m venv " not in again
    assert "--editable" in again
    assert (node.home / ".bashrc").read_text().count("sinkserve-env") == 1
    head = "".join(node.run(command) for command in config["head_start_ray_commands"])
    stop, start = head.splitlines()
    assert stop.startswith("ray stop ")
    assert start.startswith("ray start --head --port=6380 ")
    assert "--dashboard-host=127.0.0.1 " in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml " in start
    assert "[token/0/" in start
    worker = "".join(node.run(command) for command in config["worker_start_ray_commands"])
    assert worker.splitlines()[1].startswith("ray start --address=10.1.1.1:6380 [token/0/10.1.1.1]")


@pytest.mark.parametrize("which", FILES)
def test_rays_own_commands_find_ray_and_the_token(which: str, node: Node) -> None:
    """`ray down` runs `ray stop` by name: without such a command it warns, and stops nothing."""
    node.set_up(yaml.safe_load(FILES[which]))
    assert node.run("ray stop").startswith("ray stop [token/")
    assert node.run("mpiexec -n 2").startswith("mpiexec")


@pytest.mark.parametrize("which", FILES)
def test_what_a_node_needs_is_what_it_is_given(which: str) -> None:
    """Nothing above the user's home, where it may not write; and every file that a command names."""
    config = yaml.safe_load(FILES[which])
    assert all(remote.startswith("~/") for remote in config["file_mounts"])
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for command in config["setup_commands"]:
        for named in re.findall(r"~/sinkserve/(\S+)", command):
            assert (ROOT / named).is_file()


def test_machines_that_one_owns_are_counted_by_the_autoscaler_that_can() -> None:
    """Version 2 takes the head for a worker that is gone: of two workers one was never started."""
    config = yaml.safe_load(FILES["local"])
    assert config["provider"]["type"] == "local"
    assert "RAY_enable_autoscaler_v2=0" in config["head_start_ray_commands"][1]


def test_the_embedded_redis_is_refused_on_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    def nodes() -> list[dict[str, Any]]:
        addresses = ["192.0.2.10", "192.0.2.11", "192.0.2.11", "192.0.2.12"]
        alive = [True, True, True, False]
        pairs = zip(addresses, alive, strict=True)
        return [{"NodeManagerAddress": one, "Alive": lives} for one, lives in pairs]

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", nodes)
    with pytest.raises(ConfigError, match="this cluster has 2"):
        build({"model": "toy"})
