"""llama.cpp as a measured peer: runs in the benchmark's own environment, driven by JSON lines on stdin.

Imports only the standard library and llama_cpp (SinkServe is not installed there). Every sequence is a
conversation with `capacity` cells; when it is full the oldest half after `keep` tokens is discarded and
the rest is shifted, as llama.cpp's own programs do with context shift on.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

import llama_cpp as ll


class Peer:
    """One context with `sequences` conversations of `capacity` tokens each."""

    def __init__(self, gguf: str, threads: int, sequences: int, capacity: int, keep: int) -> None:
        model_params = ll.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = ll.llama_model_load_from_file(gguf.encode(), model_params)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {gguf}")
        params = ll.llama_context_default_params()
        params.n_ctx = capacity * sequences
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        self.context = ll.llama_init_from_model(self.model, params)
        self.memory = ll.llama_get_memory(self.context)
        self.vocab = ll.llama_model_get_vocab(self.model)
        self.sampler = ll.llama_sampler_init_greedy()
        self.batch = ll.llama_batch_init(512, 0, 1)
        self.capacity, self.keep = capacity, keep
        self.length = [0] * sequences
        self.last = [1] * sequences

    def _add(self, token: int, sequence: int, wants_logits: bool) -> None:
        at = self.batch.n_tokens
        self.batch.token[at] = token
        self.batch.pos[at] = self.length[sequence]
        self.batch.n_seq_id[at] = 1
        self.batch.seq_id[at][0] = sequence
        self.batch.logits[at] = wants_logits
        self.batch.n_tokens = at + 1
        self.length[sequence] += 1

    def _make_room(self, sequence: int, tokens: int) -> None:
        if self.length[sequence] + tokens <= self.capacity:
            return
        past = self.length[sequence]
        discard = (past - self.keep) // 2
        ll.llama_memory_seq_rm(self.memory, sequence, self.keep, self.keep + discard)
        ll.llama_memory_seq_add(self.memory, sequence, self.keep + discard, past, -discard)
        self.length[sequence] = past - discard

    def _decode(self) -> None:
        status = ll.llama_decode(self.context, self.batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def prefill(self, sequence: int, tokens: list[int]) -> int:
        """Run `tokens` and return the greedy next token."""
        for begin in range(0, len(tokens), 128):
            chunk = tokens[begin : begin + 128]
            self._make_room(sequence, len(chunk))
            self.batch.n_tokens = 0
            for offset, token in enumerate(chunk):
                self._add(token, sequence, begin + offset == len(tokens) - 1)
            self._decode()
        self.last[sequence] = ll.llama_sampler_sample(self.sampler, self.context, -1)
        return self.last[sequence]

    def decode(self, sequences: int, steps: int) -> float:
        """Seconds for `steps` greedy steps of the first `sequences` conversations together."""
        started = time.perf_counter()
        for _ in range(steps):
            self.batch.n_tokens = 0
            for sequence in range(sequences):
                self._make_room(sequence, 1)
                self._add(self.last[sequence], sequence, True)
            self._decode()
            for sequence in range(sequences):
                self.last[sequence] = ll.llama_sampler_sample(self.sampler, self.context, sequence)
        return time.perf_counter() - started

    def turn(self, tokens: list[int], generate: int) -> tuple[float, float]:
        """TTFT of a turn in conversation 0, and the seconds for the `generate` tokens after it."""
        started = time.perf_counter()
        self.prefill(0, tokens)
        first = time.perf_counter() - started
        return first, self.decode(1, generate)


def quantise(source: str, out: str) -> None:
    """Write the same weights as q8_0."""
    params = ll.llama_model_quantize_default_params()
    params.ftype = ll.LLAMA_FTYPE_MOSTLY_Q8_0
    params.allow_requantize = True
    status = ll.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status}")


def main() -> None:
    """Answer one JSON object per line of stdin with one per line of stdout."""
    # llama.cpp prints to fd 1 as well: keep a private copy for the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    ll.llama_backend_init()
    peer: Peer | None = None
    for line in sys.stdin:
        call: dict[str, Any] = json.loads(line)
        operation = call.pop("op")
        answer: dict[str, Any] = {}
        if operation == "quantise":
            quantise(**call)
        elif operation == "open":
            peer = Peer(**call)
        elif peer is None:
            answer = {"error": f"{operation} before open"}
        elif operation == "prefill":
            answer["token"] = peer.prefill(**call)
        elif operation == "decode":
            answer["seconds"] = peer.decode(**call)
        elif operation == "turn":
            answer["ttft_s"], answer["decode_s"] = peer.turn(**call)
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
