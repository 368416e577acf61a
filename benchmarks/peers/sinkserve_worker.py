"""SinkServe's CPU engine as a measured subject, with the same operations as llama_cpp_worker.py."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine.onnx_engine import OnnxEngine
from engine.protocol import Row, SampleRequest, StepPlan, TokenIds
from engine.sampling import SamplingParams
from engine.window import SinkWindow
from engine_build.manifest import load_engine_spec

GREEDY = SamplingParams(temperature=0.0)
NOTHING: TokenIds = np.zeros(0, np.int32)


class Subject:
    """One engine with `sequences` conversations of `capacity` tokens each, `keep` of them sinks."""

    def __init__(
        self,
        engine_dir: str,
        threads: int,
        sequences: int,
        capacity: int,
        keep: int,
        profile: Path | None = None,
    ) -> None:
        spec = load_engine_spec(Path(engine_dir), capacity=capacity)
        self.engine = OnnxEngine(
            Path(engine_dir),
            memory_budget_bytes=sequences * spec.slot_bytes,
            capacity=capacity,
            threads=threads,
            spinning=True,
            profile=profile,
        )
        slot_tokens = self.engine.spec.slot_tokens
        self.window = SinkWindow(keep, capacity - keep, slot_tokens - keep)
        self.length = [0] * sequences
        self.last = [1] * sequences

    def _row(self, sequence: int, tokens: list[int], *, sample: bool) -> Row:
        start = self.length[sequence]
        self.length[sequence] += len(tokens)
        request = SampleRequest(GREEDY, 0, start, NOTHING) if sample else None
        ids = np.asarray(tokens, np.int32)
        return Row(kv_slot=sequence, start=start, tokens=ids, window=self.window, sample=request)

    def _step(self, rows: list[Row]) -> list[int]:
        results = self.engine.step(StepPlan(tuple(rows))).rows
        return [-1 if row.token_id is None else row.token_id for row in results]

    def prefill(self, sequence: int, tokens: list[int]) -> int:
        """Run `tokens` in chunks and return the greedy next token."""
        chunk = self.engine.spec.max_chunk
        for begin in range(0, len(tokens), chunk):
            ends = begin + chunk >= len(tokens)
            row = self._row(sequence, tokens[begin : begin + chunk], sample=ends)
            self.last[sequence] = self._step([row])[0]
        return self.last[sequence]

    def decode(self, sequences: int, steps: int) -> float:
        """Seconds for `steps` greedy steps of the first `sequences` conversations together."""
        started = time.perf_counter()
        for _ in range(steps):
            rows = [self._row(s, [self.last[s]], sample=True) for s in range(sequences)]
            self.last[:sequences] = self._step(rows)
        return time.perf_counter() - started

    def turn(self, tokens: list[int], generate: int) -> tuple[float, float]:
        """TTFT of a turn in conversation 0, and the seconds for the `generate` tokens after it."""
        started = time.perf_counter()
        self.prefill(0, tokens)
        first = time.perf_counter() - started
        return first, self.decode(1, generate)


def main() -> None:
    """Answer one JSON object per line of stdin with one per line of stdout."""
    subject: Subject | None = None
    for line in sys.stdin:
        call: dict[str, Any] = json.loads(line)
        operation = call.pop("op")
        answer: dict[str, Any] = {}
        if operation == "open":
            subject = Subject(**call)
        elif subject is None:
            answer = {"error": f"{operation} before open"}
        elif operation == "prefill":
            answer["token"] = subject.prefill(**call)
        elif operation == "decode":
            answer["seconds"] = subject.decode(**call)
        elif operation == "turn":
            answer["ttft_s"], answer["decode_s"] = subject.turn(**call)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
