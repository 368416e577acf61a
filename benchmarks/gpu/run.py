"""Build, check and measure our engines on the machine's GPU, beside their peers and the card's limits.

    python -m benchmarks.gpu.run --out $OUT                  # about nine minutes: what the bars need first
    python -m benchmarks.gpu.run --out $OUT --resume FILE    # go on where that one stopped
    python -m benchmarks.gpu.run --out $OUT --resume FILE --engine tensorrt   # TensorRT-RTX: see below
    python -m benchmarks.gpu.run --out $OUT --quick          # two minutes: one model, few points
    python -m benchmarks.gpu.run --out $OUT --resume FILE --only variant      # which kernels are fastest
    python -m benchmarks.gpu.run --out $OUT --resume FILE --again decode versus correctness  # with those
    python -m benchmarks.gpu.run --list                      # what would be measured, in which order
    python -m benchmarks.gpu.run --out /tmp/x --device cpu --tiny   # no GPU: the same code, interpreted

Run from the repository's root. Needs torch with its triton, numpy, ml_dtypes and (for peers) transformers;
nothing is installed, downloaded or fetched. TensorRT-RTX is taken from .gpu-carry/, where
`python -m benchmarks.gpu.pack_tensorrt` puts it on a machine with network; without it its sections are left
out. The results, OUT/gpu-CARD-DATE.json, are saved after each section, so a call that is cut off loses one
section at most; --resume takes the rest and keeps what is there. Copy the file to benchmarks/results/ and run
`python -m benchmarks.gpu.report` for the table and the plots. The operator's page is docs/gpu-measuring.md.

Everything that touches the card runs in processes of their own. A section that fails is recorded with its
error, and the run goes on; OUT/*.log has what the processes printed, OUT/profile.txt the tables of kernels
(--profile). The exit status is 1 if a check of correctness failed or a section could not be run, else 0; a
bar that was missed is printed, not an error.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.bars import evaluate
from benchmarks.gpu.budget import Budget, Task, fitting, in_order
from benchmarks.gpu.options import chosen_options, plan_capabilities
from benchmarks.gpu.process import WorkerFailed, WorkerProcess
from benchmarks.gpu.results_file import Results, WrongResults, card_of, read_document
from benchmarks.gpu.shapes import FULL, MODELS, QUICK, TINY_GRID, Grid
from benchmarks.gpu.tasks import NEED_LIMITS, SECTIONS, tasks_for
from benchmarks.gpu.tensorrt_sm90 import probe
from benchmarks.gpu.versus import measure_versus

START_S = 120.0
"""How long the first answer of a process may take: torch's import and CUDA's start, on a cold disk."""

GRIDS: dict[str, Grid] = {"full": FULL, "quick": QUICK, "tiny": TINY_GRID}


class Run:
    """The parent: it starts processes, asks them, saves what they answer, and never imports torch."""

    def __init__(self, device: str, size: str, out: Path) -> None:
        self._device, self._size, self._out = device, size, out
        self._subject: WorkerProcess | None = None
        self._engine = ""

    def device(self, engine: str) -> dict[str, Any]:
        """What the card is, by the process of `engine`. Raises WorkerFailed where there is none."""
        return self._started_subject(engine).call("device", START_S)

    def execute(self, task: Task, results: Results, timeout_s: float) -> dict[str, Any]:
        """One task's result. Raises WorkerFailed."""
        if task.section == "tensorrt_sm90":
            return probe(timeout_s, self._out / "tensorrt.log")
        given: dict[str, Any] = {"limits": _limits_in(results)}
        sections = results.document["sections"]
        if task.engine == "tensorrt":
            _check_runnable(task, results.document["failed"])
            given["capabilities"] = _capabilities_in(sections)
        else:
            given["options"] = chosen_options(sections, task.model)
        subject = self._started_subject(task.engine)
        if task.section == "versus":
            module = "benchmarks.gpu.peers"
            log = self._out / "peers.log"
            with WorkerProcess(module, ["--device", self._device], log) as peer:
                return measure_versus(
                    subject, peer, task, timeout_s, given, GRIDS[self._size].effort
                )
        if task.section in NEED_LIMITS and given["limits"] is None:
            raise WorkerFailed("needs the section limits, which is not measured yet", alive=True)
        return subject.call(
            "measure",
            timeout_s,
            section=task.section,
            model=task.model,
            parameters={name: p for name, p in task.parameters.items() if name != "engine"},
            given=given,
        )

    def close(self) -> None:
        if self._subject is not None:
            self._subject.kill()
            self._subject = None

    def _started_subject(self, engine: str) -> WorkerProcess:
        """The process of this engine. There is one at a time: each would hold memory of the card."""
        if self._subject is not None and not (self._subject.alive and self._engine == engine):
            self.close()
        if self._subject is None:
            arguments = ["--device", self._device, "--size", self._size, "--out", str(self._out)]
            module = "benchmarks.gpu.subject_process"
            log = self._out / f"subject-{engine}.log"
            self._subject = WorkerProcess(module, [*arguments, "--engine", engine], log)
            self._engine = engine
        return self._subject


def _limits_in(results: Results) -> dict[str, Any] | None:
    """The arguments of `roofline.Limits`: the higher of the two bandwidths, the stricter limit."""
    measured = results.section("limits/all")
    if measured is None:
        return None
    return {
        "bandwidth": max(measured["copy_bytes_per_s"], measured["read_bytes_per_s"]),
        "matmul": measured["matmul_operations_per_s"],
        "l2_bytes": results.document["device"]["l2_bytes"],
    }


def _check_runnable(task: Task, failed: Mapping[str, str]) -> None:
    """Raises WorkerFailed, as `absent`, if TensorRT's engine could not even be checked in this call: what
    crashed or hung once would do so in each of its sections."""
    if task.section == "correctness":
        return
    for key in failed:
        if key.startswith("correctness/") and "/engine=tensorrt/" in key:
            problem = f"TensorRT's engine could not be checked: see {key}"
            raise WorkerFailed(f"{problem} (--only {task.section} tries it)", True, absent=True)


def _capabilities_in(sections: dict[str, Any]) -> list[str]:
    """Raises WorkerFailed where TensorRT-RTX cannot be measured: `absent` if it is known not to run here."""
    try:
        found = plan_capabilities(sections)
    except KeyError as error:
        problem = f"needs the section {error.args[0]}, which is not measured yet"
        raise WorkerFailed(problem, alive=True, absent=True) from error
    if found is None:
        problem = "TensorRT-RTX runs no plan on this card: see tensorrt_sm90"
        raise WorkerFailed(problem, alive=True, absent=True)
    return found


def measure_all(run: Run, results: Results, ordered: Sequence[Task], budget: Budget) -> None:
    """Task by task, saving after each; `results` says what failed and what was left out."""
    document = results.document
    for task in ordered:
        if not budget.allows(task):
            document["skipped"][task.key] = "no time left: go on with --resume"
            continue
        begin = time.monotonic()
        print(f"{task.key} ...", file=sys.stderr, flush=True)
        try:
            found = run.execute(task, results, budget.timeout_s(task))
        except WorkerFailed as failure:
            kind = "skipped" if failure.absent else "failed"
            document[kind][task.key] = str(failure)
            print(f"    {kind}: {failure}", file=sys.stderr, flush=True)
        else:
            took_s = time.monotonic() - begin
            document["sections"][task.key] = {**found, "took_s": took_s}
            print(f"    {took_s:.0f} s{headline(found)}", file=sys.stderr, flush=True)
        document["bars"] = [bar.to_json() for bar in evaluate(document["sections"])]
        results.save()
    results.save()


def headline(found: dict[str, Any]) -> str:
    """What of a result is worth a line while the run goes on."""
    rows = found.get("points") or found.get("batches") or []
    shown = [f"batch {row['batch']}: {row['ms']:.2f} ms" for row in rows if "ms" in row]
    shown += [f"{found['ratio']:.2f} times the peer"] if "ratio" in found else []
    shown += [f"{found['tokens_per_s']:.0f} tokens/s"] if "tokens_per_s" in found else []
    shown += [f"runs: {', '.join(found['runs']) or 'none'}"] if "runs" in found else []
    return "".join(f", {one}" for one in shown)


def summary(document: dict[str, Any]) -> str:
    """Bars with their figures, what failed, what was left out."""
    lines = [str(bar) for bar in evaluate(document["sections"])]
    lines += [f"failed  {key}: {why}" for key, why in document["failed"].items()]
    lines += [f"left    {key}: {why}" for key, why in document["skipped"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    size = "tiny" if options.tiny else "quick" if options.quick else "full"
    tasks = tasks_for(GRIDS[size], options.profile)
    if options.engine:
        tasks = [
            task for task in tasks if task.engine == options.engine or task.section == "limits"
        ]
    if options.models:
        tasks = [task for task in tasks if task.model in {*options.models, "all"}]
    if options.list:
        _print_plan(in_order(tasks, options.only), options.budget_s)
        return 0
    if options.out is None:
        print("--out FOLDER says where the results go", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    budget = Budget(options.budget_s, time.monotonic)
    given = list(sys.argv[1:] if arguments is None else arguments)
    run = Run(options.device, size, options.out)
    try:
        # Before the card is waited for: a wrong file must not cost its time.
        earlier = None if options.resume is None else read_document(options.resume)
        device = run.device(options.engine or "cuda")
        if earlier is not None and card_of(earlier) != device["name"]:
            was = card_of(earlier)
            print(
                f"{options.resume} is of {was}, this is {device['name']}: begun anew",
                file=sys.stderr,
            )
            earlier = None
        if earlier is None:
            results = Results.new(options.out, device, given)
        else:
            path = options.out / options.resume.name
            results = Results.resumed(earlier, path, device, given)
        again = {key for key in results.done if key.split("/", 1)[0] in options.again}
        left = in_order(tasks, options.only, results.done - again, results.failed_before)
        measure_all(run, results, left, budget)
    except (WorkerFailed, WrongResults) as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    finally:
        run.close()
    print(summary(results.document))
    print(f"\nwritten: {results.path}")
    wrong = any(
        not bar.passed and bar.name == "error" for bar in evaluate(results.document["sections"])
    )
    return 1 if wrong or results.document["failed"] else 0


def _print_plan(ordered: Sequence[Task], budget_s: float) -> None:
    chosen, left = fitting(ordered, budget_s)
    for verdict, tasks in (("now", chosen), ("later", left)):
        for task in tasks:
            print(f"{verdict:6} {task.estimate_s:4.0f} s  {task.key}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="folder for the results and logs")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=[], help="these sections (default: all)"
    )
    parser.add_argument(
        "--engine", choices=["cuda", "tensorrt"], help="sections of one engine (default: both)"
    )
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=[], help="these models (default: all)"
    )
    parser.add_argument(
        "--budget-s", type=float, default=540.0, help="seconds in all (default 540)"
    )
    parser.add_argument("--resume", type=Path, help="results of an earlier call on the same card")
    parser.add_argument(
        "--again",
        nargs="+",
        choices=SECTIONS,
        default=[],
        help="with --resume: measure these sections anew, say with a faster variant",
    )
    parser.add_argument("--quick", action="store_true", help="one model, few points")
    parser.add_argument("--profile", action="store_true", help="also a table of kernels per model")
    parser.add_argument("--list", action="store_true", help="print the plan and stop")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes: is the script itself well?"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
