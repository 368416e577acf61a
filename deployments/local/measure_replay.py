"""`sinkserve measure-replay`: how many windows of replay the served model needs, measured on it.

The conversation is the chat template's: passages of a text as the user's messages, answered by the model
as the service would. A model that talks to itself falls into loops, where every cache predicts the same.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.conversation import Message, TokenIds
from deployments.config import ConfigError, ServiceConfig
from deployments.conversation_records import MIN_SINK_TOKENS
from deployments.engine_files import EngineFiles, locate_engine, start_engine
from deployments.errors import ServiceError
from deployments.local.progress import Steps
from deployments.local.replay_plot import Curves, PlotError, depth_name, draw
from deployments.replay_measurement import Dialogue, Measurement, MeasureOptions, measure
from deployments.text import ChatCodec
from engine.protocol import EngineDead, TurnFailed
from engine.replay_quality import Bar, Recommendation, ReplayQuality, recommend

MAX_MESSAGE_TOKENS = 256
PROMPT = "Continue this text at length: "
"""Bare passages get short answers, and a comparison of few tokens."""

NAME = "measure_replay"


class TextError(ValueError):
    """The text cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Text:
    """What the user's messages are cut from, and what it is."""

    name: str
    content: str


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """What the command line asked for. Depths in windows, `replies` of each kind; `text` None: the
    documentation that comes with Python."""

    depths: tuple[int, ...]
    replies: int
    reply_tokens: int
    bar: Bar
    threads: int
    seed: int
    text: Path | None
    out: Path | None


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """A measurement, of what, and what follows from it."""

    files: EngineFiles
    text: Text
    options: MeasureOptions
    measurement: Measurement
    bar: Bar
    recommendation: Recommendation

    @property
    def window_tokens(self) -> int:
        return self.files.spec.capacity - self.options.sink_tokens

    @property
    def curves(self) -> Curves:
        measured = self.measurement
        name = self.files.spec.weight_format
        return Curves(name, measured.depths, measured.floor, self.options.reply_tokens)

    def to_json(self) -> dict[str, Any]:
        """Everything but the tokens, as plain values. KL in nats a token, lengths in tokens."""
        spec, measured = self.files.spec, self.measurement
        return {
            "architecture": spec.model.architecture,
            "num_layers": spec.model.num_layers,
            "weight_format": spec.weight_format,
            "kv_dtype": spec.kv_dtype,
            "fingerprint": self.files.fingerprint,
            "capacity": spec.capacity,
            "sink_tokens": self.options.sink_tokens,
            "window_tokens": self.window_tokens,
            "text": self.text.name,
            "conversation_tokens": len(measured.conversation),
            "replies_of_each_kind": self.options.replies,
            "reply_tokens": self.options.reply_tokens,
            "greedy_reply_tokens": [
                len(reply.comparisons[0].kl) for reply in measured.replies if reply.greedy
            ],
            "depths": [
                {**quality_json(depth), **dataclasses.asdict(cost)}
                for depth, cost in zip(measured.depths, measured.costs, strict=True)
            ],
            "noise_floor": quality_json(measured.floor),
            "bar": dataclasses.asdict(self.bar),
            "recommendation": dataclasses.asdict(self.recommendation),
        }


def quality_json(quality: ReplayQuality) -> dict[str, Any]:
    """Plain values, the median divergence among them."""
    return {**dataclasses.asdict(quality), "median_divergence": quality.median_divergence}


def run(config: ServiceConfig, request: MeasureRequest, console: Console) -> int:
    """Measure, print, write. Returns the exit status: 1 also when no measured depth will do."""
    steps = Steps(console)
    try:
        text = read_text(request.text)
        report = measure_model(config, request, text, steps)
    except (ConfigError, TextError, ServiceError, ValueError, OSError) as error:
        return _refuse(console, str(error))
    except (TurnFailed, EngineDead) as error:
        return _refuse(console, f"the engine failed: {error}")
    console.print(quality_table(report))
    show_recommendation(report, config.replay_windows, console)
    if request.out is not None:
        write(report, request.out, console)
    return 0 if report.recommendation.windows is not None else 1


def measure_model(
    config: ServiceConfig, request: MeasureRequest, text: Text, steps: Steps
) -> ReplayReport:
    """Start the configured engine in this process and measure it.

    Raises ConfigError, TextError, ServiceError, ValueError; TurnFailed and EngineDead of the engine.
    """
    with steps.step("Engine") as step:
        files = locate_engine(config, step.update)
        step.note = f"{config.model_name}, {files.spec.weight_format}"
    options = MeasureOptions(
        depths=request.depths,
        replies=request.replies,
        reply_tokens=request.reply_tokens,
        sink_tokens=max(MIN_SINK_TOKENS, files.codec.pinned_tokens([])),
    )
    roomy = config
    if files.spec.target == "cpu" or config.memory_budget_bytes is not None:
        budget = max(config.cpu_budget_bytes, options.num_slots * files.spec.slot_bytes)
        roomy = config.model_copy(update={"memory_budget_bytes": budget})
    engine = start_engine(roomy, files, request.threads)
    try:
        with steps.step("Measuring") as step:
            sampling = dataclasses.replace(config.sampling.params(), seed=request.seed)
            dialogue = Dialogue(
                inputs=chat_inputs(files.codec, text, message_tokens(files.spec.capacity)),
                sampling=sampling,
                eos_ids=files.codec.eos_ids,
                closing=files.codec.close_reply([]).closing_ids,
            )
            measured = measure(engine, dialogue, options, step.update)
            step.note = f"{len(measured.conversation):,} tokens of conversation"
    finally:
        engine.close()
    verdict = recommend(measured.depths, measured.floor, request.bar, files.spec.model.num_layers)
    return ReplayReport(files, text, options, measured, request.bar, verdict)


# The text.


def read_text(file: Path | None) -> Text:
    """Raises TextError, OSError."""
    if file is not None:
        try:
            return Text(file.name, file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise TextError(f"{file} is not UTF-8 text") from error
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextError("this Python lacks its documentation: name a --text FILE") from error
    name = f"documentation of Python {sys.version_info.major}.{sys.version_info.minor}"
    return Text(name, "\n".join(topics[topic] for topic in sorted(topics)))


def message_tokens(capacity: int) -> int:
    """Length of the user's messages: an eighth of the window, within reason."""
    return max(4, min(MAX_MESSAGE_TOKENS, capacity // 8))


def chat_inputs(codec: ChatCodec, text: Text, tokens: int) -> Iterator[TokenIds]:
    """Input ids of turn after turn, without end: passages of about so many tokens, then from the start.

    Raises TextError, when first asked, for a text of fewer than ten passages.
    """
    words = text.content.split()
    sample = " ".join(words[:2000])
    in_sample = len(codec.encode_opening([Message("user", sample)])) or 1
    size = max(1, min(2000, len(words)) * tokens // in_sample)
    if len(words) < 10 * size:
        raise TextError(f"{text.name} is too short: {10 * size} words are needed")
    starts = itertools.cycle(range(0, len(words) - size + 1, size))
    for number, start in enumerate(starts):
        messages = [Message("user", PROMPT + " ".join(words[start : start + size]))]
        yield codec.encode_turn(messages) if number else codec.encode_opening(messages)


# What is shown and written.


def quality_table(report: ReplayReport) -> Table:
    """A row for each depth and one for the noise floor."""
    table = Table(box=None, pad_edge=False)
    for title in (
        "replay",
        "KL mean",
        "KL p99",
        "same top-1",
        "greedy same for",
        "tokens",
        "restore",
    ):
        table.add_column(title, justify="right")
    measured, chosen = report.measurement, report.recommendation.windows
    for depth, cost in zip(measured.depths, measured.costs, strict=True):
        row = (
            depth_name(depth.windows),
            *_figures(depth, report),
            f"{cost.tokens:,}",
            f"{cost.seconds:.2f} s",
        )
        table.add_row(*row, style="bold" if depth.windows == chosen else "")
    table.add_row(depth_name(None), *_figures(measured.floor, report), "all", "", style="dim")
    return table


def _figures(quality: ReplayQuality, report: ReplayReport) -> Sequence[str]:
    median = quality.median_divergence
    same = f"all {report.options.reply_tokens}" if median is None else f"{median} tokens"
    return (
        f"{quality.kl_mean:.1e}",
        f"{quality.kl_p99:.1e}",
        f"{quality.top1_agreement:.1%}",
        same,
    )


def show_recommendation(report: ReplayReport, configured: int, console: Console) -> None:
    """What to set, why, what it costs, and what the figures are."""
    verdict, sinks = report.recommendation, report.options.sink_tokens
    num_tokens = report.measurement.floor.num_tokens
    console.print(
        f"\nKL(live || restored) in nats a token, over {num_tokens} tokens of sampled replies; greedy "
        f"text: median of {report.options.replies} replies.\nThe noise floor is the whole "
        "conversation run again in other chunks: equal in exact arithmetic.\n",
        style="dim",
    )
    if verdict.windows is None:
        console.print(f"[yellow]no measured depth will do[/yellow]: {verdict.reason}.")
        return
    kept_bytes = 4 * (sinks + verdict.windows * report.window_tokens)
    console.print(f"[green]replay_windows: {verdict.windows}[/green]   {verdict.reason}.")
    console.print(
        f"  kept in the store for each conversation: {kept_bytes / 1024:,.0f} KiB", style="dim"
    )
    for caveat in verdict.caveats:
        console.print(f"  {caveat}", style="dim")
    if configured != verdict.windows:
        console.print(f"  configured now: {configured}", style="dim")


def write(report: ReplayReport, folder: Path, console: Console) -> None:
    """`measure_replay-DATE.json` and, if matplotlib is there, `.png`."""
    day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}-{day}.json"
    document = {"benchmark": NAME, "date": day, **report.to_json()}
    path.write_text(json.dumps(document, indent=2) + "\n")
    console.print(f"written: {escape(str(path))}", soft_wrap=True)
    picture = path.with_suffix(".png")
    try:
        draw([report.curves], picture)
    except PlotError as error:
        console.print(f"no plot: {error}", style="dim")
    else:
        console.print(f"written: {escape(str(picture))}", soft_wrap=True)


def _refuse(console: Console, problem: str) -> int:
    console.print(f"[red]error:[/red] {escape(problem)}", soft_wrap=True)
    return 1
