"""`sinkserve build`: a checkpoint becomes an engine directory; its CPU kernels are compiled too."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from deployments.local.progress import Steps
from engine.kernels.compile import KernelError, kernel_library
from engine_build.build import BuildOptions, build_engine
from engine_build.files import sinkserve_home
from engine_build.manifest import ManifestError
from engine_build.spec import SpecError


def run(source: Path, out: Path, options: BuildOptions, console: Console) -> int:
    """Build and say what to do next. Returns the exit status."""
    if not source.exists():
        console.print(f"[red]error:[/red] {escape(str(source))} does not exist", soft_wrap=True)
        return 1
    try:
        with Steps(console).step(f"Building {escape(source.name)}") as step:
            build_engine(source, out, options, step.update)
        if options.target == "cpu":
            with Steps(console).step("CPU kernels") as step:
                kernel_library(sinkserve_home(), step.update)
    except (SpecError, ManifestError, KernelError, OSError, ValueError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return 1
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    console.print(f"{escape(str(out))}: {size / 1e6:,.0f} MB", soft_wrap=True)
    if options.target != "cpu":
        console.print(
            f"where it is to serve, first: sinkserve verify {escape(str(out))}", soft_wrap=True
        )
    console.print(f"serve it: sinkserve up --model {escape(str(out))}", soft_wrap=True)
    return 0
