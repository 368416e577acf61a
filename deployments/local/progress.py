"""Steps of a start-up, shown as they happen: a live bar on a terminal, one line each in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TaskID as BarId


@dataclass(slots=True)
class Step:
    """One running step. `note` replaces what is said about it once it is done."""

    title: str
    note: str = ""
    _bars: Progress | None = None
    _bar: BarId | None = None

    def update(self, detail: str, fraction: float | None = None) -> None:
        """Say what is being done; `fraction` of the step (0..1) fills the bar."""
        if self._bars is not None and self._bar is not None:
            total = None if fraction is None else 1.0
            self._bars.update(
                self._bar,
                description=f"{self.title}  [dim]{escape(detail)}[/dim]",
                completed=fraction or 0.0,
                total=total,
            )


class Steps:
    """Prints steps to one console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        fancy = "utf" in console.encoding.lower()
        self._done, self._failed = ("✓", "✗") if fancy else ("ok", "failed")

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Run one step: a tick and its seconds when it ends well, a cross when it raises."""
        started = time.monotonic()
        step = Step(title)
        try:
            with self._live(step):
                yield step
        except BaseException:
            self._console.print(f"[red]{self._failed}[/red] {title}", highlight=False)
            raise
        seconds = f"{time.monotonic() - started:.1f} s"
        note = f"  {escape(step.note)}" if step.note else ""
        self._console.print(
            f"[green]{self._done}[/green] {title}[dim]{note}  {seconds}[/dim]", highlight=False
        )

    @contextlib.contextmanager
    def _live(self, step: Step) -> Iterator[None]:
        if not self._console.is_terminal:
            yield
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bars:
            step._bars = bars
            step._bar = bars.add_task(step.title, total=None)
            yield
