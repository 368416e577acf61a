"""`sinkserve up` and `down`: configuration, background start, signals and what the user is told."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
import typer
import yaml
from rich.console import Console
from rich.markup import escape

from cluster import embedded
from deployments.config import ConfigError, ServiceConfig, load_config
from deployments.local.home import Home, HomeBusy, end_processes
from deployments.local.progress import Steps
from deployments.local.service import LocalService, StartError, StopRequested

STOP_WITHIN_S = 90.0


def read_config(file: Path | None, overrides: Mapping[str, Any]) -> ServiceConfig:
    """The file's fields (plain, or the args of a serve_config.yaml) under the command line's.

    Exits with every problem named.
    """
    fields: dict[str, Any] = {}
    try:
        if file is not None:
            fields = _fields_of(yaml.safe_load(file.read_text()))
        fields |= overrides
        model = fields.get("model")
        if isinstance(model, str) and model and Path(model).is_dir():
            fields["model"] = str(Path(model).absolute())  # replicas stand elsewhere
        return load_config(fields)
    except OSError as error:
        _refuse([f"{file}: {error.strerror}"])
    except yaml.YAMLError as error:
        _refuse([f"{file} is not YAML: {error}"])
    except ConfigError as error:
        _refuse(error.problems)


def run_foreground(home: Home, config: ServiceConfig, console: Console, behind: bool) -> int:
    """Run the service until a signal. Returns the exit status."""
    try:
        with home.locked():
            return _serve(LocalService(home, config, Steps(console)), console, behind)
    except HomeBusy:
        return _already_up(home, console)


def run_detached(home: Home, console: Console, arguments: Sequence[str]) -> int:
    """Run the same command in the background, showing its log until it serves."""
    if home.is_running():
        return _already_up(home, console)
    home.log_file.parent.mkdir(parents=True, exist_ok=True)
    rest = [argument for argument in arguments if argument not in ("--detach", "-d")]
    command = [sys.executable, "-m", "deployments.cli", *rest, "--behind"]
    with home.log_file.open("w") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"},
        )
    with home.log_file.open(encoding="utf-8", errors="replace") as log:
        try:
            ready = _follow(home, child, log, console)
        except KeyboardInterrupt:
            child.send_signal(signal.SIGTERM)
            child.wait()
            console.print("stopped before it was up", style="dim")
            return 130
    if not ready:
        console.print(f"whole log: {home.log_file}", style="dim", soft_wrap=True)
        return child.returncode or 1
    return 0


def stop_running(home: Home, console: Console) -> int:
    """`sinkserve down`: ask `up` to stop, wait, then make sure that nothing is left."""
    state = home.read_state()
    marks = (*state.processes, state.process) if state else ()
    if not any(mark.find() for mark in marks) and embedded.running_url(home.data) is None:
        home.clear_state()
        console.print("the service is not up")
        return 0
    with Steps(console).step("Stopping"):
        process = state.process.find() if state else None
        if process is not None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(STOP_WITHIN_S)
        end_processes(marks)
        embedded.stop(home.data)
        home.clear_state()
    console.print(f"conversations stay in {home.data}", style="dim", soft_wrap=True)
    return 0


def _serve(service: LocalService, console: Console, behind: bool) -> int:
    code = 0
    try:
        service.start()
        console.print(_welcome(service, behind), soft_wrap=True)
        service.wait()
    except StopRequested:
        pass
    except StartError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        code = 1
    finally:
        with Steps(console).step("Stopping; conversations are kept"):
            service.stop()
    return code


def _welcome(service: LocalService, behind: bool) -> str:
    url, config = service.state.url, service.config
    model, here = config.model_name, Path(sys.executable).parent
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    python = (
        f"from openai import OpenAI; print(OpenAI(base_url='{url}/v1', api_key='-')"
        f".chat.completions.create(model='{model}', "
        "messages=[{'role': 'user', 'content': 'Hello'}]).choices[0].message.content)"
    )
    sinkserve = (
        "sinkserve"
        if shutil.which("sinkserve", path=_users_path(here))
        else str(_shorter(here / "sinkserve"))
    )
    end = f"{sinkserve} down  ends it" if behind else "Ctrl-C ends it"
    what = f"({escape(model)}, {config.max_replicas} replicas)"
    lines = (
        f"\n[bold green]SinkServe is up[/bold green]  [bold]{url}[/bold]  {what}\n",
        f"  {sinkserve} chat\n",
        escape(
            f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n"
        ),
        escape(f'  {_shorter(Path(sys.executable))} -c "{python}"\n'),
        f"[dim]{end}; conversations are kept and are there at the next start.[/dim]",
    )
    return "\n".join(lines)


def _users_path(scripts: Path) -> str:
    """PATH as the user's shell has it: `scripts/up` puts the environment's folder in front."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if folder != str(scripts))


def _shorter(path: Path) -> str:
    return min(str(path), os.path.relpath(path), key=len)


def _follow(home: Home, child: subprocess.Popen[bytes], log: Any, console: Console) -> bool:
    """Show the log as it grows until the service is ready; False if it ended before."""
    while True:
        ended = child.poll() is not None
        state = home.read_state()
        ready = state is not None and state.process.pid == child.pid and state.phase == "ready"
        if ready:
            time.sleep(0.2)  # its last lines are being written
        for line in log:
            console.print(escape(line.rstrip("\n")), soft_wrap=True)
        if ended or ready:
            return ready and not ended
        time.sleep(0.1)


def _already_up(home: Home, console: Console) -> int:
    state = home.read_state()
    if state is None or state.phase == "starting":
        console.print("it is already starting; see: sinkserve status")
    elif state.phase == "stopping":
        console.print("it is just stopping; try again in a moment")
        return 1
    else:
        console.print(
            f"already up at [bold]{state.url}[/bold] (process {state.process.pid})\n"
            "  sinkserve chat · sinkserve status · sinkserve down"
        )
    return 0


def _fields_of(document: Any) -> dict[str, Any]:
    """The configuration in a YAML document: the document itself, or its first application's args."""
    match document:
        case None:
            return {}
        case {"applications": [{"args": dict(fields)}, *_]}:
            pass
        case dict(fields) if "applications" not in document:
            pass
        case _:
            raise ConfigError(["the file must hold `field: value` lines. See serve_config.yaml"])
    return {str(name): value for name, value in fields.items()}


def _refuse(problems: Sequence[str]) -> NoReturn:
    errors = Console(stderr=True, highlight=False)
    for problem in problems:
        errors.print(f"[red]error:[/red] {escape(problem)}", soft_wrap=True)
    raise typer.Exit(2)
