"""One conversation of many turns over HTTP: does anything grow with its age?

    python -m benchmarks.endurance                  30 turns against the service that is up here
    python -m benchmarks.endurance --turns 1000     the record; also draws docs/endurance.png

Start the service first: scripts/up --detach. Ctrl-C ends the run early, with what there is. Each turn
is a streamed `POST /v1/chat/completions` that carries only the new message. Recorded per turn: time to
first token, milliseconds per token after it, tokens prefilled, tokens that have left the window, and the
replicas' processor time and resident memory.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import track

from benchmarks import report
from deployments.local.client import ApiClient, Reply
from deployments.local.home import Home

SYSTEM = "You give short answers."
LENGTH = (
    "Two sentences, please."  # replies that end by themselves: cut ones teach a model to ramble
)
NUM_SAMPLES = 20
PLOT = Path(__file__).parent.parent / "docs" / "endurance.png"

SUBJECTS = (
    "the sea", "bread", "winter", "the moon", "trains", "gardens", "music", "chess", "rivers", "cats",
    "mountains", "letters", "bees", "glass", "the wind", "old maps", "tea", "lighthouses", "apples",
    "bridges", "snow", "clocks", "forests", "ships", "stars", "stories", "horses", "rain", "islands",
)  # fmt: skip
OPENINGS = (
    "Let's talk about {}.",
    "What do you know about {}?",
    "I have always liked {}. Do you know why people do?",
    "My daughter asked me about {} today. What should I tell her?",
    "Write two sentences about {} and {}.",
    "What is the difference between {} and {}?",
    "Give me an idea for a short story about {}.",
    "Where in the world would I go to see {}?",
    "How did people live with {} a hundred years ago?",
    "Is there a famous poem or song about {}?",
    "What is the hardest thing about {}?",
    "Explain {} to somebody who has never heard of it.",
    "Someone told me that {} will be gone in fifty years. Could that be?",
)
FOLLOW_UPS = (
    "Why is that?",
    "Can you give me an example?",
    "That is interesting. What else?",
    "And how does {} come into it?",
    "Put that into one simple sentence, please.",
    "I am not sure I agree. What would you say against it?",
    "Who would know more about this?",
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn as the client saw it. `age_tokens` is the conversation's length after it."""

    turn: int
    age_tokens: int
    ttft_ms: float
    ms_per_token: float
    output_tokens: int
    prefill_tokens: int
    evicted_tokens: int
    recovery: str
    cpu_ms_per_token: float
    rss_mib: tuple[float, ...]


def messages() -> Iterator[str]:
    """Endless, and the same every time: a subject is opened, then asked about once or twice more."""
    for number in itertools.count():
        first = SUBJECTS[number % len(SUBJECTS)]
        second = SUBJECTS[(7 * number + 3) % len(SUBJECTS)]
        yield f"{OPENINGS[number % len(OPENINGS)].format(first, second)} {LENGTH}"
        for follow_up in range(1 + number % 2):
            question = FOLLOW_UPS[(number + 3 * follow_up) % len(FOLLOW_UPS)]
            yield f"{question.format(second)} {LENGTH}"


def replica_processes(home: Home) -> list[psutil.Process]:
    """The engine replicas of the service on this machine; empty for one elsewhere."""
    state = home.read_state()
    found = [mark.find() for mark in state.processes] if state else []
    return [one for one in found if one and "SinkReplica" in " ".join(one.cmdline())]


def run_turn(client: ApiClient, body: dict[str, Any]) -> Reply:
    reply = Reply()
    for _ in client.stream(body, reply):
        pass
    return reply


def turn_of(reply: Reply, cpu_s: float, processes: Sequence[psutil.Process]) -> Turn:
    counts, times = reply.sink_usage, reply.text_times_s
    num_output = int(reply.usage["completion_tokens"])
    written_s = times[-1] - times[0] if times else 0.0
    return Turn(
        turn=reply.turn or 0,
        age_tokens=int(reply.usage["total_tokens"]),
        ttft_ms=1000 * (reply.ttft_s or 0.0),
        ms_per_token=1000 * written_s / max(1, num_output - 1),
        output_tokens=num_output,
        prefill_tokens=int(counts["prefill_tokens"]),
        evicted_tokens=int(counts["evicted_tokens"]),
        recovery=str(counts["recovery"]),
        cpu_ms_per_token=1000 * cpu_s / (num_output + int(counts["prefill_tokens"])),
        rss_mib=tuple(process.memory_info().rss / 2**20 for process in processes),
    )


def growth(turns: Sequence[Turn], value: Callable[[Turn], float]) -> float:
    """Median of the last quarter over the median of the second: 1 is flat.

    The first quarter is left out: the window is still filling there.
    """
    quarter = max(1, len(turns) // 4)
    early = statistics.median(value(turn) for turn in turns[quarter : 2 * quarter])
    late = statistics.median(value(turn) for turn in turns[-quarter:])
    return late / early if early else float("nan")


def summarise(turns: Sequence[Turn]) -> dict[str, Any]:
    ttft = [turn.ttft_ms for turn in turns]
    writing = [turn.ms_per_token for turn in turns if turn.output_tokens > 4]
    return {
        "turns": len(turns),
        "age_tokens": turns[-1].age_tokens,
        "evicted_tokens": turns[-1].evicted_tokens,
        "ttft_ms": {"p50": report.median(ttft), "p99": report.percentile(ttft, 99)},
        "ms_per_token": {"p50": report.median(writing), "p99": report.percentile(writing, 99)},
        "growth": {
            "ttft_per_prefilled_token": growth(turns, lambda t: t.ttft_ms / t.prefill_tokens),
            "ttft": growth(turns, lambda t: t.ttft_ms),
            "ms_per_token": growth(turns, lambda t: t.ms_per_token),
            "cpu_ms_per_token": growth(turns, lambda t: t.cpu_ms_per_token),
            "rss": growth(turns, lambda t: sum(t.rss_mib)),
        },
        "cpu_ms_per_token": report.median([turn.cpu_ms_per_token for turn in turns]),
        "max_prefill_tokens": max(turn.prefill_tokens for turn in turns),
        "not_resident": sum(turn.recovery != "none" for turn in turns),
    }


def draw(turns: Sequence[Turn], path: Path) -> None:
    """Four panels against the conversation's age."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    age = [turn.age_tokens / 1000 for turn in turns]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    panels = (
        ("time to first token, ms", [turn.ttft_ms for turn in turns]),
        ("time per further token, ms", [turn.ms_per_token for turn in turns]),
        ("tokens out of the window, thousands", [turn.evicted_tokens / 1000 for turn in turns]),
    )
    for axis, (title, values) in zip(axes.flat, panels, strict=False):
        axis.plot(age, values, ".", markersize=2.5, alpha=0.6)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_ylim(0, None)
    memory = axes.flat[3]
    for number, sizes in enumerate(zip(*(turn.rss_mib for turn in turns), strict=True)):
        memory.plot(age, sizes, label=f"replica {number + 1}")
    memory.set_title("resident memory, MiB", fontsize=10, loc="left")
    memory.set_ylim(0, None)
    if memory.lines:
        memory.legend(loc="lower right", fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("age of the conversation, thousand tokens")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--max-tokens", type=int, default=160, help="of each reply")
    parser.add_argument("--url", default="", help="default: the service on this machine")
    parser.add_argument("--record", action="store_true", help="save JSON and plot")
    options = parser.parse_args()
    console, home = Console(), Home.from_env()
    state = home.read_state()
    url = options.url or (state.url if state and home.is_running() else "")
    if not url:
        console.print("nothing is up: start it with scripts/up --detach")
        return 1
    processes = replica_processes(home) if not options.url else []

    def cpu_s() -> float:
        times = [process.cpu_times() for process in processes]
        return sum(one.user + one.system for one in times)

    turns, samples = list[Turn](), list[dict[str, Any]]()
    every = max(1, options.turns // NUM_SAMPLES)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also when started in the background
    with ApiClient(url) as client, contextlib.suppress(KeyboardInterrupt):
        model = client.model()
        conversation = client.post("/v1/conversations", {"system": SYSTEM})
        shared = {"model": model, "conversation": conversation["id"], "seed": 1}
        shared |= {"max_tokens": options.max_tokens}
        texts = messages()
        for number in track(range(options.turns), description="turns", console=console):
            text = next(texts)
            before_s = cpu_s()
            reply = run_turn(client, {**shared, "messages": [{"role": "user", "content": text}]})
            turns.append(turn_of(reply, cpu_s() - before_s, processes))
            if number % every == every - 1:
                samples.append({"turn": reply.turn, "user": text, "assistant": reply.text})
    summary = summarise(turns)
    console.print_json(data={**summary, "samples": samples[-3:]})
    if options.record or len(turns) >= 1000:
        rows = [asdict(turn) for turn in turns]
        result = {"model": model, "summary": summary, "samples": samples, "turns": rows}
        console.print(report.save("endurance", result))
        draw(turns, PLOT)
        console.print(PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
