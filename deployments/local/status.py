"""`sinkserve status` and `doctor`."""

from __future__ import annotations

import datetime as dt
import re
import time
from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import embedded, preflight
from deployments.config import load_config
from deployments.local.accelerators import accelerators
from deployments.local.client import ApiClient, ApiError
from deployments.local.home import Home, ServiceState
from deployments.local.service import machine_plan

_SAMPLE = re.compile(r"(?P<name>[a-z_]+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)\Z")
_KIND = re.compile(r'kind="(\w+)"')


def show(home: Home, console: Console, url: str, api_key: str) -> int:
    """Print the state of the service at `url`, or of this machine's. Returns the exit status."""
    state = home.read_state() if not url and home.is_running() else None
    if not url and state is None:
        console.print("the service is not up; start it: sinkserve up")
        return 1
    if state is not None and state.phase != "ready":
        console.print(f"{state.phase} (process {state.process.pid}); see {home.log_file}")
        return 1
    address = url or (state.url if state else "")
    try:
        with ApiClient(address, api_key, timeout_s=10.0) as client:
            well, health = client.health()
            tokens = token_counts(client.text("/metrics"))
            model = client.model()
    except ApiError as error:
        console.print(f"[red]not well[/red]  {escape(str(error))} ({escape(error.code)})")
        return 1
    word = "[green]well[/green]" if well else "[red]not well[/red]"
    console.print(f"{word}  [bold]{address}[/bold]  {escape(model)}")
    if not well:
        console.print(escape(str(health.get("error", {}).get("message", ""))))
    if state is not None:
        _print_local(home, console, state)
    _print_tokens(console, tokens)
    console.print(_replica_table(health.get("replicas", [])))
    return 0 if well else 1


def token_counts(exposition: str) -> dict[str, int]:
    """Tokens of committed turns by what became of them, from the Prometheus text."""
    totals: defaultdict[str, float] = defaultdict(float)
    for line in exposition.splitlines():
        sample = _SAMPLE.match(line)
        kind = _KIND.search(sample["labels"] or "") if sample else None
        if sample and kind and sample["name"] == "sinkserve_tokens_total":
            totals[kind[1]] += float(sample["value"])
    return {kind: int(total) for kind, total in totals.items()}


def doctor(home: Home, console: Console) -> int:
    """Check this machine. Returns 1 if something would keep the service from working."""
    config = load_config({})
    running = home.is_running()
    plan = machine_plan(home, config, ports=not running)
    found = [*preflight.examine(plan), *accelerators()]
    store_url = embedded.running_url(home.data)
    if store_url is not None:
        found += preflight.store(store_url)
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in found:
        colour = colours[check.verdict]
        console.print(
            f"[{colour}]{check.verdict:>4}[/{colour}]  {check.name}: {escape(check.detail)}",
            soft_wrap=True,
        )
        if check.advice:
            console.print(f"      {escape(check.advice)}", style="dim", soft_wrap=True)
    if running:
        console.print()
        return max(show(home, console, "", ""), *(int(not check.ok) for check in found))
    return int(not all(check.ok for check in found))


def _print_local(home: Home, console: Console, state: ServiceState) -> None:
    up = dt.timedelta(seconds=round(time.time() - state.started_s))
    console.print(
        f"up {up} · process {state.process.pid} · files in {home.root}", style="dim", soft_wrap=True
    )
    console.print(
        f"Ray at {state.ray_address} (RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={home.ray_token})",
        style="dim",
        soft_wrap=True,
    )


def _print_tokens(console: Console, tokens: dict[str, int]) -> None:
    names = {
        "input": "read",
        "output": "written",
        "prefill": "prefilled",
        "cached": "found in a kv_slot",
    }
    told = [f"{tokens[kind]:,} {name}" for kind, name in names.items() if kind in tokens]
    if told:
        console.print(f"tokens since the start: {', '.join(told)}")


def _replica_table(replicas: list[dict[str, Any]]) -> Table:
    """One row per figure, one column per replica."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("")
    for replica in replicas:
        table.add_column(str(replica["replica"]), justify="right")
    for name in sorted({name for replica in replicas for name in replica} - {"replica"}):
        values = (f"{replica[name]:,.6g}" if name in replica else "" for replica in replicas)
        table.add_row(name.replace("_", " "), *values)
    return table
