"""Sampling on the device: logits that are there become token ids there, and the host waits once a step.

    prepare(requests) -> run(logits) -> read()

`prepare` fills static buffers from pinned memory, asynchronously; `run` is a fixed sequence of kernel
launches over them, without allocation or synchronisation, so that a CUDA graph can hold it; `read` is
the one place that waits. All three belong on the caller's current stream. An engine that has more to send
than the requests brings its own `Upload`, whose first words are theirs: it calls `place` for `prepare`.

The rules are those of engine/sampling.py, to the token: same order of operations, ties to the lower
id, inverse CDF in order of token id, u = Philox(seed, turn, k). Where u lies within float rounding of an
edge of the CDF the neighbouring token may come out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.cuda_kernels.sampling import SamplingBuffers, SamplingSizes, launch_sampling
from engine.cuda_kernels.sampling_parts import ACTIVE, ADJUSTED, GREEDY, LOGPROBS
from engine.cuda_upload import Ints, Upload
from engine.protocol import SampleRequest
from engine.sampling import (
    NOT_FINITE,
    OUTSIDE_VOCABULARY,
    Sampled,
    TokenLogprob,
    repeats,
    sample_rows,
)

MAX_VOCAB = 2**18 + 2**17
"""Weights are integers of up to 2**44, and their sum must be less than 2**63."""

_MASK = 2**64 - 1
_POOL_PER_ROW = 2048

# One row of `SamplingBuffers.words`; the kernels count its words in sampling_parts.py.
_REQUEST = np.dtype(
    [
        ("top_p", "f8"),
        ("seed", "u8"),
        ("turn", "u8"),
        ("k", "u8"),
        ("scale", "f4"),
        ("min_p", "f4"),
        ("repetition", "f4"),
        ("frequency", "f4"),
        ("presence", "f4"),
        ("flags", "i4"),
        ("top_k", "i4"),
        ("num_top", "i4"),
        ("first", "i4"),
        ("count", "i4"),
    ]
)
REQUEST_WORDS = _REQUEST.itemsize // 8
"""int64 of a request in an `Upload`."""

_ENTRY = np.dtype([("token", "i4"), ("times", "i4"), ("dry", "f4"), ("bias", "f4")])
_Record = tuple[float | int, ...]
_IDLE: _Record = (1.0, 0, 0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0, 0, 0, 0)


class DeviceSampler:
    """Samples up to `max_rows` rows of a vocabulary of `vocab_size` on `device`.

    `pool_size` tokens in all can have a penalty or a bias in one step; a row that no longer fits is drawn
    on the host, by `read`. `upload` brings the requests and says how long `read` waits at most.
    Raises ValueError for a vocabulary of more than `MAX_VOCAB`, for more requests or rows than
    `max_rows`, for logits that do not fit.
    """

    def __init__(
        self,
        max_rows: int,
        vocab_size: int,
        device: torch.device | str,
        *,
        pool_size: int | None = None,
        sizes: SamplingSizes | None = None,
        upload: Upload | None = None,
    ) -> None:
        if not 1 <= vocab_size <= MAX_VOCAB:
            raise ValueError(f"vocab_size {vocab_size} is not in 1..{MAX_VOCAB}")
        self._max_rows = max_rows
        self._vocab_size = vocab_size
        if pool_size is None:
            pool_size = max_rows * min(vocab_size, _POOL_PER_ROW)
        device = torch.device(device)
        sizes = sizes or SamplingSizes.for_vocab(vocab_size)
        self._buffers = SamplingBuffers(max_rows, vocab_size, pool_size, device, sizes)
        self._num_words = max_rows * REQUEST_WORDS
        self._upload = upload or Upload(self._num_words, device)
        # The kernels read the requests where the upload brings them.
        self._buffers.wide = self._upload.device[: self._num_words].view(max_rows, REQUEST_WORDS)
        self._buffers.words = self._buffers.wide.view(torch.int32)
        self._idle = np.array([_IDLE] * max_rows, _REQUEST).view(np.int64)
        self._pool = _Staged(self._buffers.pool)
        self._out = [
            _Staged(result)
            for result in (
                self._buffers.tokens,
                self._buffers.logprobs,
                self._buffers.top_ids,
                self._buffers.top_logprobs,
            )
        ]
        self._requests: tuple[SampleRequest, ...] = ()
        self._at: tuple[int, ...] = ()
        self._logits = torch.empty((0, vocab_size), device=device)
        self._on_host: list[int] = []
        on_gpu = device.type == "cuda"
        self._drawn, self._pool_read = ((torch.cuda.Event() if on_gpu else None) for _ in range(2))

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return self._buffers.nbytes

    @property
    def tokens(self) -> torch.Tensor:
        """Of the last `run`, on the device: int32 [max_rows], -1 where there is none."""
        return self._buffers.tokens

    def prepare(self, requests: Sequence[SampleRequest]) -> None:
        """Say what rows 0 .. len(requests) - 1 of the next `run` are to draw.

        Rows of `run` beyond them are left alone: a graph may be captured for more rows than a step has.
        """
        self.place(requests, range(len(requests)), self._upload.room())
        self._upload.send(self._num_words)

    def place(self, requests: Sequence[SampleRequest], rows: Sequence[int], words: Ints) -> None:
        """`prepare` without the copy: requests[n] is for rows[n] of the next `run`.

        `words` is the upload's room; its first `REQUEST_WORDS` for each of `max_rows` rows are filled.
        """
        if max(len(requests), *rows, 0) > self._max_rows:
            raise ValueError(f"{len(requests)} requests, max_rows is {self._max_rows}")
        self._requests, self._at = tuple(requests), tuple(rows)
        self._on_host = []
        words[: self._num_words] = self._idle
        records = words[: self._num_words].view(_REQUEST)
        used = 0
        for number, (row, request) in enumerate(zip(rows, requests, strict=True)):
            count = 0
            if request.params.changes_logits:
                entries = _adjustments(request, self._vocab_size)
                count = len(entries)
                if not self._fill_pool(used, entries):
                    self._on_host.append(number)
                    continue
            records[row] = _record(request, self._vocab_size, used, count)
            used += count
        if used:
            self._pool.upload(used)
            if self._pool_read is not None:
                self._pool_read.record()

    def _fill_pool(self, first: int, entries: npt.NDArray[np.void]) -> bool:
        """Put adjustments where the next upload of the pool finds them; False if they do not fit."""
        pool = self._pool.host.view(_ENTRY)[:, 0]
        if first + len(entries) > len(pool):
            return False
        if first == 0 and self._pool_read is not None:
            # The last upload read the same pinned memory.
            self._pool_read.synchronize()
        pool[first : first + len(entries)] = entries
        return True

    def run(self, logits: torch.Tensor) -> None:
        """Draw a token from each row of `logits`, float32, float16 or bfloat16 [rows, vocab_size],
        contiguous along the vocabulary. They are left as they are and must stay until `read`."""
        if logits.dim() != 2 or logits.shape[1] != self._vocab_size or logits.stride(1) != 1:
            raise ValueError(f"logits {tuple(logits.shape)}, not [rows, {self._vocab_size}]")
        if logits.shape[0] > self._max_rows:
            raise ValueError(f"{logits.shape[0]} rows of logits, max_rows is {self._max_rows}")
        self._logits = logits
        launch_sampling(self._buffers, logits)

    def read(self, logits: torch.Tensor | None = None) -> list[Sampled]:
        """Wait for the last `run`: one result per request of the last `prepare` or `place`, in its order.

        Where a graph replayed that run, `logits` are what it ran on; else the last ones are known.
        A row whose logits are not finite, or whose logit_bias names no token, says so in `failed`.
        Raises EngineDead when the device takes longer than the upload's limit.
        """
        told = any(request.params.logprobs for request in self._requests)
        for result in self._out if told else self._out[:1]:
            result.download()
        rows = list[Sampled]()
        if self._drawn is not None:
            self._drawn.record()
            self._upload.wait(self._drawn)
        for at, request in zip(self._at, self._requests, strict=True):
            token = int(self._out[0].host[at])
            if token < 0:
                rows.append(Sampled(None, failed=NOT_FINITE))
            elif _names_no_token(request, self._vocab_size):
                rows.append(Sampled(None, failed=OUTSIDE_VOCABULARY))
            elif request.params.logprobs:
                rows.append(self._with_logprobs(at, token, request.params.top_logprobs))
            else:
                rows.append(Sampled(token))
        logits = self._logits if logits is None else logits
        for number in self._on_host:
            at = self._at[number]
            row = logits[at : at + 1].float().cpu().numpy()
            (rows[number],) = sample_rows(row, [self._requests[number]])
        return rows

    def _with_logprobs(self, number: int, token: int, num_top: int) -> Sampled:
        _, logprobs, top_ids, top_logprobs = (result.host for result in self._out)
        num_top = min(num_top, self._vocab_size)
        ids, values = top_ids[number, :num_top].tolist(), top_logprobs[number, :num_top].tolist()
        top = tuple(TokenLogprob(*entry) for entry in zip(ids, values, strict=True))
        return Sampled(token, TokenLogprob(token, float(logprobs[number])), top)


class _Staged:
    """A device tensor and its twin in the host's memory (pinned, where that means something)."""

    def __init__(self, device: torch.Tensor) -> None:
        self._device = device
        pinned = device.device.type == "cuda"
        self._pinned = torch.zeros(device.shape, dtype=device.dtype, pin_memory=pinned)
        self.host: npt.NDArray[np.generic] = self._pinned.numpy()

    def upload(self, count: int) -> None:
        self._device[:count].copy_(self._pinned[:count], non_blocking=True)

    def download(self) -> None:
        """All of it: results are small, and two views cost more than the copy."""
        self._pinned.copy_(self._device, non_blocking=True)


def _record(request: SampleRequest, vocab_size: int, first: int, count: int) -> _Record:
    """One `_REQUEST`."""
    params = request.params
    flags = ACTIVE.value
    flags |= GREEDY.value if params.greedy else 0
    flags |= ADJUSTED.value if count else 0
    flags |= LOGPROBS.value if params.logprobs else 0
    return (
        params.top_p,
        params.seed & _MASK,
        request.turn & _MASK,
        request.k & _MASK,
        1.0 if params.greedy else 1.0 / params.temperature,
        params.min_p,
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
        flags,
        params.top_k if params.top_k < vocab_size else 0,
        min(params.top_logprobs, vocab_size),
        first,
        count,
    )


def _names_no_token(request: SampleRequest, vocab_size: int) -> bool:
    return any(token >= vocab_size for token, _ in request.params.logit_bias)


def _adjustments(request: SampleRequest, vocab_size: int) -> npt.NDArray[np.void]:
    """The tokens whose scores are not the model's, as `_ENTRY`, each once."""
    params, history = request.params, request.history
    if not params.changes_logits or _names_no_token(request, vocab_size):
        return np.zeros(0, _ENTRY)
    penalised = (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )
    tokens, times = np.unique(history if penalised else history[:0], return_counts=True)
    dry, bias = dict[int, np.float32](), dict[int, np.float32]()
    if params.dry_multiplier != 0.0:
        next_tokens, lengths = repeats(history, request.k, params.dry_allowed_length)
        excess = (lengths - params.dry_allowed_length).astype(np.float32)
        amounts = np.float32(params.dry_multiplier) * np.float32(params.dry_base) ** excess
        # Shortest first: of a token that occurs several times the longest repeat counts.
        dry = dict(zip(next_tokens.tolist(), amounts, strict=True))
    for token, shift in params.logit_bias:
        bias[token] = bias.get(token, np.float32(0)) + np.float32(shift)
    others = (
        np.array(sorted({*dry, *bias} - set(tokens.tolist())), np.int32)
        if dry or bias
        else tokens[:0]
    )
    entries = np.zeros(len(tokens) + len(others), _ENTRY)
    entries["token"] = np.concatenate([tokens, others])
    entries["times"][: len(tokens)] = times
    if dry or bias:
        place = {token: number for number, token in enumerate(entries["token"].tolist())}
        for name, amounts_of in (("dry", dry), ("bias", bias)):
            for token, amount in amounts_of.items():
                entries[name][place[token]] = amount
    return entries
