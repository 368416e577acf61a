"""`sinkserve verify`: a built engine against a float reference, and the report that lets it serve."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tokenizers import Tokenizer

from deployments.engine_files import computes_here
from deployments.local.measure_replay import Text, TextError, read_text
from deployments.local.progress import Steps
from engine.kernels.compile import KernelError
from engine.open_engine import EngineOptions, open_engine
from engine.protocol import EngineDead, TurnFailed
from engine.verify import VerifyOptions, verify
from engine.verify_figures import TOLERANCES, Figures, Verification
from engine.verify_report import REPORT, Verified, write_report
from engine.verify_run import NUM_SLOTS, EngineFault, default_tokens
from engine_build.manifest import TOKENIZER, ManifestError, load_engine_spec, load_manifest
from engine_build.spec import EngineSpec, SpecError
from engine_build.stored_weights import checkpoint_weights, stored_weights

_CHARACTERS_PER_TOKEN = 12


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What the command line asked for. `tokens` and `capacity` None: the engine's own; `text` None: the
    documentation that comes with Python; `out` None: into the engine directory, where the service looks."""

    tokens: int | None
    capacity: int | None
    threads: int
    model: Path | None
    layers: bool
    mistakes: bool
    text: Path | None
    out: Path | None


def run(engine_dir: Path, request: VerifyRequest, console: Console) -> int:
    """Verify, print, write. Returns the exit status: 1 also for an engine that fails."""
    started = time.monotonic()
    if request.layers and request.model is None:
        return _refuse(console, "--layers compares with the checkpoint: name it with --model")
    try:
        spec = load_engine_spec(engine_dir, request.capacity)
        text = read_text(request.text)
        found = _verify(engine_dir, spec, request, text, Steps(console))
        verified = Verified.of(engine_dir, spec, computes_here(spec))
        about = {
            "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 1),
            "engine": _about(spec),
            "text": text.name,
        }
        path = request.out or engine_dir / REPORT
        write_report(path, verified, found, about)
    except (SpecError, ManifestError, KernelError, TextError, ValueError, OSError) as error:
        return _refuse(console, str(error))
    _show(found, spec, console)
    console.print(f"written: {escape(str(path))}", style="dim", soft_wrap=True)
    if found.problems:
        for problem in found.problems:
            console.print(f"[red]failed[/red]  {escape(problem)}", soft_wrap=True)
        return 1
    console.print("[green]passed[/green]")
    return 0


def _verify(
    engine_dir: Path, spec: EngineSpec, request: VerifyRequest, text: Text, steps: Steps
) -> Verification:
    with steps.step("Files") as step:
        # The report names the manifest; the reference would compute with a damaged weight, too.
        num_files = len(load_manifest(engine_dir, verify="sha256").files)
        step.note = f"{num_files} as they were built"
    num_tokens = request.tokens or default_tokens(spec)
    options = VerifyOptions(num_tokens, mistakes=request.mistakes, layers=request.layers)
    checkpoint = None if request.model is None else checkpoint_weights(request.model, spec.model)
    token_ids = _token_ids(engine_dir, text, num_tokens // 2)
    with steps.step("Engine") as step:
        step.note = f"{spec.target}, {spec.weight_format}, capacity {spec.capacity}"
        engine = open_engine(
            engine_dir,
            EngineOptions(
                memory_budget_bytes=_budget_bytes(spec),
                threads=request.threads,
                capacity=spec.capacity,
            ),
        )
    try:
        with steps.step("Comparing") as step:
            step.note = f"{num_tokens:,} tokens"
            weights = stored_weights(engine_dir, spec)
            return verify(engine, weights, token_ids, options, step.update, checkpoint)
    except (EngineDead, TurnFailed, EngineFault) as error:
        return Verification((), (), TOLERANCES[spec.weight_format], failure=str(error))
    finally:
        engine.close()


def _budget_bytes(spec: EngineSpec) -> int:
    """For just the kv_slots that are needed; more ranks than key/value heads hold some heads twice."""
    copies = -(-spec.tp_size // spec.model.num_kv_heads)
    return NUM_SLOTS * spec.slot_bytes * copies


def _token_ids(engine_dir: Path, text: Text, count: int) -> npt.NDArray[np.int32]:
    """The first `count` tokens of the text, or as many as there are."""
    tokenizer = Tokenizer.from_file(str(engine_dir / TOKENIZER))
    part = text.content[: _CHARACTERS_PER_TOKEN * count]
    return np.array(tokenizer.encode(part, add_special_tokens=False).ids[:count], np.int32)


def _about(spec: EngineSpec) -> dict[str, Any]:
    return {
        "architecture": spec.model.architecture,
        "num_layers": spec.model.num_layers,
        "target": spec.target,
        "weight_format": spec.weight_format,
        "kv_dtype": spec.kv_dtype,
        "tp_size": spec.tp_size,
        "capacity": spec.capacity,
        "max_chunk": spec.max_chunk,
    }


def _show(found: Verification, spec: EngineSpec, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    titles = ("tokens", "error", "max", "KL mean", "KL max", "same top-1", "greedy same")
    for title in ("", *titles):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for part in found.parts:
        same = part.greedy_tokens if part.greedy_same is None else part.greedy_same
        greedy = f"{same} of {part.greedy_tokens}" if part.greedy_tokens else ""
        if part.greedy_regret:
            greedy += f", then {part.greedy_regret:.2g} below the best"
        table.add_row(part.name, *_row(part.figures), greedy)
    limits = found.tolerances
    table.add_row(
        "tolerance",
        "",
        _percent(limits.relative_error),
        "",
        f"{limits.kl_mean:.1e}",
        "",
        f"{limits.top1:.1%}",
        "",
        style="dim",
    )
    for name, figures in (("weights rounded", found.quantisation), ("in all", found.total)):
        if figures is not None:
            table.add_row(name, *_row(figures), "")
    console.print(table)
    for one in found.mistakes:
        verdict = "seen" if one.seen else "ruled out" if one.ruled_out else "below the noise"
        console.print(
            f"window mistake, {one.mistake}: {verdict} ({one.share:+.2f} ± {one.share_error:.2f} of its "
            f"effect of {_percent(one.effect)})",
            style="red" if one.seen else "dim",
            soft_wrap=True,
        )
    for layer in found.layers:
        console.print(
            f"layer {layer.layer}: weights rounded by up to {_percent(layer.weight_error)} "
            f"({layer.worst_weight}), hidden states off by {_percent(layer.hidden_error)}",
            style="dim",
            soft_wrap=True,
        )


def _row(figures: Figures) -> tuple[str, ...]:
    return (
        f"{figures.num_tokens:,}",
        _percent(figures.relative_error),
        f"{figures.max_error:.2g}",
        f"{figures.kl_mean:.1e}",
        f"{figures.kl_max:.1e}",
        f"{figures.top1:.1%}",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"


def _refuse(console: Console, problem: str) -> int:
    console.print(f"[red]error:[/red] {escape(problem)}", soft_wrap=True)
    return 1
