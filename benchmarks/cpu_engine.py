"""The CPU engine against llama.cpp on the same weights, threads and window, in interleaved runs.

    python -m benchmarks.cpu_engine                # about ten minutes; builds llama.cpp once
    python -m benchmarks.cpu_engine --runs 3       # quicker, noisier

Both subjects run q8 weights of SmolLM2-135M-Instruct in conversations that are full and slide (ours:
sinks and ring; llama.cpp: context shift). Reported are medians and the median of run-by-run ratios:

1. decode of one conversation,
2. 16 conversations at once against llama.cpp's best aggregate at 1, 4 or 16,
3. TTFT of a 64-token turn in a long conversation, also against llama-server fed a truncated history
   with --cache-reuse,
4. where our time goes (ONNX Runtime's own profile plus host counters).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.cpu_profile import breakdown
from benchmarks.peers.llama_cpp_peer import LlamaCpp, ensure_llama_cpp
from benchmarks.peers.llama_server import LlamaServer
from benchmarks.peers.worker import Worker
from benchmarks.report import machine, median, paired_ratio, save, table
from engine_build.build import BuildOptions
from engine_build.demo import ensure_demo_engine, fetch_demo_model
from engine_build.files import sinkserve_home

CAPACITY = 512
SINKS = 4
TURN = 64


def main() -> None:
    """Run every comparison and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9, help="interleaved pairs (default 9)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    home = sinkserve_home()
    peer = ensure_llama_cpp(home)
    gguf = peer.quantise(fetch_demo_model(home))
    engine_dir = ensure_demo_engine(home, BuildOptions(capacity=CAPACITY, max_chunk=TURN))
    log = home / "peers" / "cpu_engine.log"
    print(machine(), file=sys.stderr)
    result: dict[str, Any] = {"capacity": CAPACITY, "sinks": SINKS, "runs": options.runs}
    result["decode_one"] = [
        _decode_one(peer, gguf, engine_dir, threads, options.runs, log)
        for threads in options.threads
    ]
    threads = max(options.threads)
    result["decode_many"] = _decode_many(peer, gguf, engine_dir, threads, options.runs, log)
    result["turn"] = _turn(peer, gguf, engine_dir, threads, options.runs, log)
    result["milliseconds_per_step"] = {
        f"{rows} at once": breakdown(engine_dir, rows, threads, CAPACITY) for rows in (1, 16)
    }
    _print(result)
    print(f"\nwritten: {save('cpu_engine', result)}")


def _open(worker: Worker, sequences: int, threads: int, **model: str) -> Worker:
    """Load the model and fill every conversation past its capacity."""
    worker.call(
        "open", threads=threads, sequences=sequences, capacity=CAPACITY, keep=SINKS, **model
    )
    for sequence, tokens in zip(range(sequences), _texts(CAPACITY + TURN), strict=False):
        worker.call("prefill", sequence=sequence, tokens=tokens)
    return worker


def _subject(log: Path) -> Worker:
    return Worker([sys.executable, "-m", "benchmarks.peers.sinkserve_worker"], log)


def _texts(length: int) -> Iterator[list[int]]:
    numbers = random.Random(0)
    while True:
        yield [numbers.randrange(1000, 40000) for _ in range(length)]


def _decode_one(
    peer: LlamaCpp, gguf: Path, engine_dir: Path, threads: int, runs: int, log: Path
) -> dict[str, Any]:
    # 256 steps hold one context shift of llama.cpp, so that its cost is counted fairly.
    steps = 256
    ours, theirs = [], []
    with _subject(log) as a, peer.worker() as b:
        _open(a, 1, threads, engine_dir=str(engine_dir))
        _open(b, 1, threads, gguf=str(gguf))
        for run in range(runs + 1):
            pair = [w.call("decode", sequences=1, steps=steps)["seconds"] for w in (a, b)]
            if run:
                ours.append(steps / pair[0])
                theirs.append(steps / pair[1])
            _progress(f"decode, {threads} threads", run, runs)
    return {
        "threads": threads,
        "sinkserve_tokens_per_s": median(ours),
        "llama_cpp_tokens_per_s": median(theirs),
        "ratio": paired_ratio(ours, theirs),
    }


def _decode_many(
    peer: LlamaCpp, gguf: Path, engine_dir: Path, threads: int, runs: int, log: Path
) -> dict[str, Any]:
    counts = (1, 4, 16)
    rates: dict[str, list[float]] = {f"{who}_{n}": [] for n in counts for who in ("ours", "llama")}
    with ExitStack() as stack:
        subject = _open(stack.enter_context(_subject(log)), 16, threads, engine_dir=str(engine_dir))
        peers = {
            n: _open(stack.enter_context(peer.worker()), n, threads, gguf=str(gguf)) for n in counts
        }
        for run in range(runs + 1):
            for count in counts:
                # A whole period between two context shifts, at least every other run.
                steps = 128
                for who, worker in (("ours", subject), ("llama", peers[count])):
                    seconds = worker.call("decode", sequences=count, steps=steps)["seconds"]
                    if run:
                        rates[f"{who}_{count}"].append(count * steps / seconds)
            _progress(f"1, 4, 16 conversations, {threads} threads", run, runs)
    best = max(counts, key=lambda n: median(rates[f"llama_{n}"]))
    return {
        "threads": threads,
        "tokens_per_s": {name: median(values) for name, values in rates.items()},
        "llama_best_at": best,
        "ratio_16_over_best": paired_ratio(rates["ours_16"], rates[f"llama_{best}"]),
    }


def _turn(
    peer: LlamaCpp, gguf: Path, engine_dir: Path, threads: int, runs: int, log: Path
) -> dict[str, Any]:
    ttft: dict[str, list[float]] = {"ours": [], "llama_cpp": [], "llama_server": []}
    with ExitStack() as stack:
        subject = _open(stack.enter_context(_subject(log)), 1, threads, engine_dir=str(engine_dir))
        shifted = _open(stack.enter_context(peer.worker()), 1, threads, gguf=str(gguf))
        server = stack.enter_context(LlamaServer(peer.server, gguf, threads, CAPACITY, log))
        head = next(_texts(SINKS))
        # The server's history needs a few turns to reach the length at which it is truncated.
        warm_up = 6
        for run, tokens in zip(range(runs * 3 + warm_up), _texts(TURN), strict=False):
            values = {
                "ours": subject.call("turn", tokens=tokens, generate=TURN)["ttft_s"],
                "llama_cpp": shifted.call("turn", tokens=tokens, generate=TURN)["ttft_s"],
                "llama_server": server.turn(head, tokens, TURN),
            }
            if run >= warm_up:
                for name, value in values.items():
                    ttft[name].append(value)
            _progress(f"turns, {threads} threads", run, runs * 3 + warm_up - 1)
    return {
        "threads": threads,
        "turn_tokens": TURN,
        "ttft_ms": {name: 1000 * median(values) for name, values in ttft.items()},
        "ratio_to_llama_cpp": paired_ratio(ttft["ours"], ttft["llama_cpp"]),
        "ratio_to_llama_server": paired_ratio(ttft["ours"], ttft["llama_server"]),
    }


def _progress(what: str, done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\r{what}: {done}/{total}", end=end, file=sys.stderr, flush=True)


def _print(result: dict[str, Any]) -> None:
    rows = [["measure", "SinkServe", "llama.cpp", "ratio"]]
    for one in result["decode_one"]:
        ours, theirs = one["sinkserve_tokens_per_s"], one["llama_cpp_tokens_per_s"]
        name = f"decode of one conversation, {one['threads']} threads (tokens/s)"
        rows.append([name, f"{ours:.1f}", f"{theirs:.1f}", f"{one['ratio']:.2f}"])
    many = result["decode_many"]
    rates, best = many["tokens_per_s"], many["llama_best_at"]
    name = f"16 conversations against llama.cpp's best ({best} at once), {many['threads']} threads"
    ratio = f"{many['ratio_16_over_best']:.2f}"
    rows.append([name, f"{rates['ours_16']:.1f}", f"{rates[f'llama_{best}']:.1f}", ratio])
    turn = result["turn"]
    ttft = turn["ttft_ms"]
    for peer, label in (("llama_cpp", "context shift"), ("llama_server", "--cache-reuse")):
        name = f"TTFT of a {TURN}-token turn, {label} (ms, lower is better)"
        ratio = f"{turn[f'ratio_to_{peer}']:.2f}"
        rows.append([name, f"{ttft['ours']:.0f}", f"{ttft[peer]:.0f}", ratio])
    print("\n" + table(rows))
    parts = result["milliseconds_per_step"]
    columns = list(parts)
    spent = [["ms of a decode step", *columns]]
    spent += [
        [name, *(f"{parts[column][name]:.2f}" for column in columns)] for name in parts[columns[0]]
    ]
    print("\n" + table(spent))


if __name__ == "__main__":
    main()
