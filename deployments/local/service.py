"""The whole service on one machine: weights, store, Ray, replicas and HTTP, in one foreground process.

start()  clean up after a killed run -> preflight -> engine -> store -> Ray -> Serve -> healthy
stop()   the same, backwards: running turns end first, and no process is left

StartError      the service cannot start; says what to do
StopRequested   SIGINT or SIGTERM came while it was starting
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import secrets
import shutil
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from cluster import embedded, preflight
from deployments.config import EMBEDDED, ConfigError, ServiceConfig
from deployments.local.client import ApiClient, ApiError
from deployments.local.home import (
    Home,
    ProcessMark,
    ServiceState,
    descendants,
    end_processes,
    this_process,
)
from deployments.local.progress import Step, Steps

APPLICATION = "sinkserve"
HEALTHY_WITHIN_S = 180.0
OBJECT_STORE_BYTES = 80 << 20  # close to Ray's minimum: tokens and text are all that passes
RAY_BYTES = 700 << 20  # head, proxy, controller and ingress, measured
REPLICA_BYTES = 400 << 20  # its process and the demo model's weights, measured
WATCH_EVERY_S = 5.0
"""Half a default lease: a turn's commit is sent again until a dead store is back."""

logger = logging.getLogger(__name__)


class StartError(Exception):
    """The service cannot start. The message ends with what to do."""


class StopRequested(BaseException):
    """A signal asked a starting service to stop."""


class LocalService:
    """One service, started and stopped by the process that holds its home."""

    def __init__(self, home: Home, config: ServiceConfig, steps: Steps) -> None:
        self._home = home
        self._config = config
        self._steps = steps
        self._undo = contextlib.ExitStack()
        self._stop = threading.Event()
        self._starting = True
        self._stopping = False
        self._seen: set[ProcessMark] = set()
        self._store_data: Path | None = None
        self._gpus_of_replica = 0.0
        self._state = ServiceState(
            process=this_process(),
            phase="starting",
            url=f"http://{_reachable(config.host)}:{config.port}",
            redis_url=config.redis_url,
            ray_address="",
            started_s=time.time(),
        )

    @property
    def state(self) -> ServiceState:
        return self._state

    @property
    def config(self) -> ServiceConfig:
        """As started: with the engine's directory and the store's address filled in."""
        return self._config

    def start(self) -> None:
        """Returns when a turn can be served. Raises StartError or StopRequested; call `stop` after."""
        self._take_signals()
        self._clean_up()
        self._set_environment()
        self._note("starting")
        with self._steps.step("Checking this machine") as step:
            self._check_machine(step)
        with self._steps.step("Preparing the model") as step:
            self._prepare_engine(step)
        with self._steps.step("Starting the conversation store") as step:
            self._start_store(step)
        with self._steps.step("Starting Ray") as step:
            self._start_ray(step)
        with self._steps.step(f"Starting {self._config.max_replicas} replicas") as step:
            self._start_serve()
            self._await_health()
        self._note("ready")
        self._starting = False

    def wait(self) -> None:
        """Returns when SIGINT or SIGTERM asks the service to stop."""
        while not self._stop.wait(WATCH_EVERY_S):
            self._note("ready")
            self._keep_store()

    def stop(self) -> None:
        """End everything that `start` began, also when it did not finish. Idempotent."""
        self._stopping = True
        self._note("stopping")
        try:
            self._undo.close()
        finally:
            end_processes(self._seen | set(descendants()))
            self._home.clear_state()

    def _take_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stopping:
            end_processes(self._seen | set(descendants()), grace_s=1.0)
            os._exit(128 + number)
        self._stop.set()
        if self._starting:
            self._starting = False
            raise StopRequested

    def _note(self, phase: Any) -> None:
        """Write down who we are and who our processes are, for `status`, `down` and a later clean-up."""
        self._seen = {mark for mark in self._seen if mark.find()} | set(descendants())
        processes = tuple(sorted(self._seen, key=lambda mark: mark.pid))
        self._state = dataclasses.replace(self._state, phase=phase, processes=processes)
        self._home.write_state(self._state)

    def _clean_up(self) -> None:
        """End what a killed run left behind; we hold the home, so nobody needs it."""
        left = self._home.read_state()
        if left is not None and end_processes(left.processes):
            with self._steps.step("Cleaned up after a run that was killed"):
                pass
        sessions = sorted(self._home.ray_dir.glob("session_2*"))
        for folder in sessions[:-1]:
            shutil.rmtree(folder, ignore_errors=True)

    def _check_machine(self, step: Step) -> None:
        config = self._config
        checks = preflight.examine(machine_plan(self._home, config, ports=True))
        problems = [f"{one.name}: {one.detail}. {one.advice}" for one in checks if not one.ok]
        if problems:
            raise StartError("\n".join(problems))
        step.note = "; ".join(
            f"{one.name}: {one.detail}. {one.advice}" for one in checks if one.verdict == "warn"
        )

    def _prepare_engine(self, step: Step) -> None:
        from deployments.engine_files import gpus_of_replica, locate_engine

        try:
            files = locate_engine(self._config, step.update)
            self._gpus_of_replica = gpus_of_replica(self._config, files.spec)
        except ConfigError as error:
            raise StartError(str(error)) from error
        step.note = f"{self._config.model_name}, window of {files.spec.capacity} tokens"

    def _start_store(self, step: Step) -> None:
        if self._config.redis_url != EMBEDDED:
            step.note = "external"
            return
        data = Path(self._config.data_dir or self._home.data)
        self._undo.callback(embedded.stop, data)
        try:
            url = embedded.ensure_running(data)
        except embedded.EmbeddedError as error:
            raise StartError(str(error)) from error
        self._store_data = data
        self._config = self._config.model_copy(update={"redis_url": url})
        step.note = relative(data)

    def _keep_store(self) -> None:
        """Start the embedded store again if it has died; it comes back under its old address."""
        data = self._store_data
        if data is None or embedded.running_url(data) is not None:
            return
        try:
            with self._steps.step("The conversation store had died; starting it again"):
                embedded.ensure_running(data)
        except embedded.EmbeddedError as error:
            logger.warning("not yet: %s", error)

    def _start_ray(self, step: Step) -> None:
        import ray

        needed = self._config.max_replicas * self._config.cpus_per_replica
        needed += self._config.ingress_replicas + 1
        self._home.ray_dir.mkdir(mode=0o700, exist_ok=True)
        self._undo.callback(ray.shutdown)
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(needed)),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _temp_dir=str(self._home.ray_dir),
        )
        self._take_signals()  # Ray has put its own SIGTERM handler in place
        address = ray.get_runtime_context().gcs_address
        self._state = dataclasses.replace(self._state, ray_address=address)
        self._note("starting")
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = resources.get("GPU", 0.0)
        if problem := gpu_problem(self._config, self._gpus_of_replica, gpus):
            raise StartError(problem)

    def _set_environment(self) -> None:
        """For this process and, through Ray, for every replica."""
        # Ray listens on every interface; only processes that know the token may speak to it.
        if not self._home.ray_token.exists():
            self._home.ray_token.touch(mode=0o600)
            self._home.ray_token.write_text(secrets.token_hex(32))
        os.environ |= {
            "SINKSERVE_HOME": str(self._home.root),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._home.ray_token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_SERVE_LOG_TO_STDERR": "0",
            "TRANSFORMERS_VERBOSITY": "error",  # it would ask for torch, which nobody needs here
        }
        os.environ.pop("RAY_ADDRESS", None)

    def _start_serve(self) -> None:
        from ray import serve

        from deployments.app import build

        serve_log = logging.getLogger("ray.serve")
        serve_log.setLevel(logging.ERROR)
        # Waits for running turns. Not `serve.shutdown`: it kills its own caller's task, noisily.
        self._undo.callback(serve.delete, APPLICATION)
        application = build(self._config.model_dump(mode="json", exclude_unset=True))
        try:
            serve.start(http_options={"host": self._config.host, "port": self._config.port})
            serve.run(application, name=APPLICATION, route_prefix="/")
        except (RuntimeError, ray_errors()) as error:
            raise StartError(
                f"the replicas did not start: {error}\n"
                f"Their logs: {self._home.ray_dir}/session_latest/logs/serve"
            ) from error
        self._note("starting")

    def _await_health(self) -> None:
        deadline = time.monotonic() + HEALTHY_WITHIN_S
        with ApiClient(self._state.url, timeout_s=10.0) as client:
            problem: object = "no answer"
            while time.monotonic() < deadline:
                try:
                    well, health = client.health()
                    if well:
                        return
                    problem = health.get("error", {}).get("message", problem)
                except ApiError as error:
                    problem = error
                time.sleep(0.2)
        raise StartError(
            f"{self._state.url}/healthz is not well after {HEALTHY_WITHIN_S:.0f} s: {problem}. "
            f"Logs: {self._home.ray_dir}/session_latest/logs/serve"
        )


def machine_plan(home: Home, config: ServiceConfig, ports: bool) -> preflight.Plan:
    """What this configuration needs of a machine; `ports` asks for them to be free."""
    per_replica = REPLICA_BYTES + config.cpu_budget_bytes
    return preflight.Plan(
        home=home.root,
        replicas=config.max_replicas,
        memory_bytes=RAY_BYTES + config.max_replicas * per_replica,
        ports=((config.host, config.port),) if ports else (),
        redis_url=None if config.redis_url == EMBEDDED else config.redis_url,
        weights=Path(config.model) if config.is_engine_directory else None,
    )


def gpu_problem(config: ServiceConfig, each: float, gpus: float) -> str:
    """Why replicas of `each` GPUs would wait for ever where Ray has `gpus`; "" if they would not."""
    scaling = config.autoscaling
    replicas = config.replicas if scaling is None else scaling.min_replicas
    if each == 0:
        return ""
    room = int(gpus // each) if each >= 1 else int(gpus) * int(1 / each + 1e-9)
    if replicas <= room:
        return ""
    setting = "replicas" if scaling is None else "autoscaling.min_replicas"
    problem = f"{setting}: {replicas} of {each:g} GPU each, but Ray finds {gpus:g} on this machine"
    fix = f"Use {room} at most" if room else "See `sinkserve doctor`, or build for --target cpu"
    return f"{problem}. {fix}"


def ray_errors() -> type[Exception]:
    """The base of Ray's own exceptions."""
    from ray.exceptions import RayError

    return RayError


def _reachable(host: str) -> str:
    """The host to connect to for a service that listens on `host`."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{shown}]" if ":" in shown else shown


def relative(path: Path) -> str:
    """The shorter way to write a path: absolute, or from where the user stands."""
    return min(str(path), os.path.relpath(path), key=len)
