"""The attention operator against a conversation that keeps every key un-rotated and rotates from scratch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.rotary import Rotary
from engine.window import SinkWindow
from engine_build.spec import RopeSpec
from tests.kernel_models import Kernel
from tests.reference import Rule

Floats = npt.NDArray[np.floating[Any]]
TOLERANCE = {4: 2e-5, 2: 1e-2}
SLOTS, LAYERS, LAYER = 4, 3, 1
Part = tuple[int, SinkWindow, int, int, int]
"""kv_slot, window, start, number of tokens, window_start."""


@dataclass(frozen=True)
class Shape:
    kv_heads: int
    group: int
    dim: int
    rotary_dim: int
    places: int
    kv_bytes: int
    qk_norm: bool = False

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim


@dataclass
class Conversation:
    """The slow way: [heads, dim] queries against a list of raw keys."""

    shape: Shape
    rule: Rule
    rope: RopeSpec
    norms: tuple[Floats, Floats] | None
    window_start: int = 0
    indices: list[int] = field(default_factory=list)
    keys: list[Floats] = field(default_factory=list)
    values: list[Floats] = field(default_factory=list)

    def push(self, i: int, qkv: Floats) -> Floats:
        shape, rule = self.shape, self.rule
        all_heads: Floats = qkv.reshape(-1, shape.dim).astype(np.float64)
        q, k, v = np.split(all_heads, [shape.heads, shape.heads + shape.kv_heads])
        if self.norms is not None:
            q, k = self.normed(q, self.norms[0]), self.normed(k, self.norms[1])
        self.indices.append(i)
        self.keys.append(k)
        self.values.append(v)
        seen = [
            n
            for n, j in enumerate(self.indices)
            if rule.sees(i, j) and (j < rule.sink_tokens or j >= self.window_start)
        ]
        turned = self.rotated(q[None], np.array([rule.query_position(i)]))[0]
        positions = np.array([rule.key_position(i, self.indices[n]) for n in seen])
        keys = self.rotated(np.array([self.keys[n] for n in seen]), positions)
        values = np.array([self.values[n] for n in seen])
        out = []
        for head in range(shape.heads):
            kv_head = head // shape.group
            scores = keys[:, kv_head] @ turned[head]
            weights = np.exp(scores - scores.max())
            out.append(weights / weights.sum() @ values[:, kv_head])
        return np.concatenate(out)

    def normed(self, heads: Floats, weight: Floats) -> Floats:
        scaled: Floats = heads / np.sqrt((heads**2).mean(axis=-1, keepdims=True) + 1e-5) * weight
        return scaled

    def rotated(self, heads: Floats, positions: npt.NDArray[np.int64]) -> Floats:
        """[n, heads, dim], each of the n at its own position."""
        angles = (positions[:, None] * self.rope.inverse_frequencies())[:, None]
        half = self.shape.rotary_dim // 2
        first, second, rest = np.split(heads, [half, 2 * half], axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        turned = [first * cos - second * sin, second * cos + first * sin, rest]
        return np.concatenate(turned, axis=-1)


class Bench:
    """The operator, its cache and a stream of random steps, compared with the slow way."""

    def __init__(self, shape: Shape, threads: int = 1, seed: int = 0) -> None:
        self.shape = shape
        self.rng = np.random.default_rng(seed)
        self.rope = RopeSpec(theta=1000.0, rotary_dim=shape.rotary_dim)
        padded = -(-shape.dim // 16) * 16
        head_bytes = -(-shape.places // 16) * 16 * padded * shape.kv_bytes
        # Whatever a slot held before must not matter; only numbers that are none were never written.
        cache = self.rng.standard_normal(LAYERS * SLOTS * 2 * shape.kv_heads * head_bytes // 4)
        kind = np.float16 if shape.kv_bytes == 2 else np.float32
        cache = np.resize(cache.astype(kind), cache.size * 4 // shape.kv_bytes)
        self.cache = cache.view(np.uint8).reshape(LAYERS, SLOTS, 2 * shape.kv_heads, head_bytes)
        self.norms: tuple[Floats, Floats] | None = None
        if shape.qk_norm:
            one, two = (1 + 0.3 * self.rng.standard_normal((2, shape.dim))).astype(np.float32)
            self.norms = (one, two)
        inputs = self.inputs([(0, SinkWindow(1, 4, 4), 0, 1, 0)], self.draw(1))
        self.kernel = Kernel(
            "SinkAttention",
            inputs,
            threads=threads,
            layer=LAYER,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            dim=shape.dim,
            rotary_dim=shape.rotary_dim,
            kv_bytes=shape.kv_bytes,
            qk_norm=int(shape.qk_norm),
            epsilon=1e-5,
        )

    def draw(self, tokens: int) -> Floats:
        # Scores of a few units: attention is peaked, so one wrong key or angle shows.
        scale = np.full(self.shape.width, 2.2 / self.shape.dim**0.25)
        if self.shape.qk_norm:
            scale[:] = 1.0
        scale[(self.shape.heads + self.shape.kv_heads) * self.shape.dim :] = 1.0
        values: Floats = self.rng.standard_normal((tokens, self.shape.width)) * scale
        return values.astype(np.float32)

    def inputs(self, rows: list[Part], qkv: Floats) -> list[npt.NDArray[Any]]:
        positions = [
            (i, window.cache_position(i))
            for _, window, start, count, _ in rows
            for i in range(start, start + count)
        ]
        cos, sin = Rotary(self.rope).cos_sin(np.array(positions, np.int64).reshape(-1, 2))
        angles = np.stack([cos, sin], axis=2).reshape(len(positions), 4, -1)
        table = np.array(
            [
                (slot, count, start, w.sink_tokens, w.window_tokens, w.ring_tokens, first)
                for slot, w, start, count, first in rows
            ],
            np.int64,
        ).reshape(-1, 7)
        return [qkv, np.ascontiguousarray(angles), table, self.cache, *(self.norms or ())]

    def step(self, rows: list[Part], qkv: Floats) -> Floats:
        result: Floats = self.kernel(*self.inputs(rows, qkv))[0]
        return result

    def error(
        self,
        windows: list[SinkWindow],
        length: int,
        sizes: tuple[int, ...],
        *,
        rules: list[Rule] | None = None,
    ) -> float:
        """Run conversations side by side, one turn of `sizes` after another; the largest difference."""
        rules = rules or [Rule(w.sink_tokens, w.window_tokens) for w in windows]
        slow = [Conversation(self.shape, rule, self.rope, self.norms) for rule in rules]
        done, worst = [0] * len(windows), 0.0
        for turn in itertools.count():
            rows = []
            for n, window in enumerate(windows):
                count = min(sizes[(turn + n) % len(sizes)], length - done[n])
                if count:
                    rows.append((n, window, done[n], count, 0))
            if not rows:
                return worst
            qkv = self.draw(sum(row[3] for row in rows))
            got, token = self.step(rows, qkv), 0
            for n, _, start, count, _ in rows:
                for i in range(start, start + count):
                    worst = max(
                        worst, float(np.abs(got[token] - slow[n].push(i, qkv[token])).max())
                    )
                    token += 1
                done[n] += count
        raise AssertionError


@pytest.mark.parametrize("kv_bytes", [4, 2])
@pytest.mark.parametrize("sinks", [0, 4, 50])
@pytest.mark.parametrize(
    ("kv_heads", "group", "dim"), [(3, 3, 64), (2, 4, 80), (1, 8, 96), (2, 1, 128)]
)
def test_equals_the_slow_way_while_rings_wrap(
    kv_heads: int, group: int, dim: int, sinks: int, kv_bytes: int
) -> None:
    window = SinkWindow(sinks, 45, 45 + 9)
    bench = Bench(Shape(kv_heads, group, dim, dim, 110, kv_bytes))
    others = [SinkWindow(4, 30, 37), SinkWindow(0, 20, 19 + 1)]
    assert bench.error([window, *others], 150, (1, 7, 1, 33)) < TOLERANCE[kv_bytes]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kv_bytes", [4, 2])
def test_rows_that_are_split_among_threads(kv_bytes: int, threads: int) -> None:
    """Over 32 blocks of keys, rows of a few tokens are cut into parts and put together again."""
    bench = Bench(Shape(2, 3, 16, 16, 600, kv_bytes), threads)
    windows = [SinkWindow(4, 530, 540), SinkWindow(40, 520, 530)]
    assert bench.error(windows, 640, (97, 64, 1, 200, 1, 8)) < TOLERANCE[kv_bytes]


@pytest.mark.parametrize("kv_bytes", [4, 2])
def test_norms_partial_rotation_and_odd_heads(kv_bytes: int) -> None:
    bench = Bench(Shape(2, 2, 24, 12, 48, kv_bytes, qk_norm=True))
    assert bench.error([SinkWindow(3, 20, 22)] * 2, 90, (1, 5, 17)) < TOLERANCE[kv_bytes]


def test_a_chunk_longer_than_the_ring() -> None:
    bench = Bench(Shape(1, 2, 16, 16, 32, 4))
    assert bench.error([SinkWindow(6, 10, 10)], 130, (64, 1)) < TOLERANCE[4]


WRONG = {
    "no_sinks": Rule(4, 40, no_sinks=True),
    "no_shift": Rule(4, 40, no_shift=True),
    "one_key_too_few": Rule(4, 40, one_key_too_few=True),
}


@pytest.mark.parametrize("kv_bytes", [4, 2])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_told_from_the_right_one(name: str, kv_bytes: int) -> None:
    bench = Bench(Shape(2, 2, 32, 32, 64, kv_bytes))
    error = bench.error([SinkWindow(4, 40, 50)], 90, (1, 9), rules=[WRONG[name]])
    assert error > 20 * TOLERANCE[kv_bytes]


@pytest.mark.parametrize("kv_bytes", [4, 2])
def test_how_tokens_are_grouped_changes_nothing(kv_bytes: int) -> None:
    """The same tokens, whatever the chunks and the company: equal to rounding, in float16 too."""
    shape, window = Shape(2, 3, 64, 64, 330, kv_bytes), SinkWindow(4, 300, 310)
    qkv = Bench(shape).draw(400)
    results: list[Floats] = []
    for sizes in ((1,), (64,), (5, 17, 1)):
        bench, start, out = Bench(shape, seed=len(results)), 0, []
        for size in itertools.cycle(sizes):
            count = min(size, 400 - start)
            if not count:
                break
            company = (2, SinkWindow(0, 8, 8), 3, 1, 3)
            both = np.concatenate([bench.draw(1), qkv[start : start + count]])
            out.append(bench.step([company, (1, window, start, count, 0)], both)[1:])
            start += count
        results.append(np.concatenate(out))
    assert max(np.abs(results[0] - other).max() for other in results[1:]) < 2e-5


def test_company_does_not_change_a_bit() -> None:
    shape, window = Shape(2, 3, 64, 64, 330, 2), SinkWindow(4, 300, 310)
    bench = Bench(shape)
    history, token = bench.draw(320), bench.draw(1)
    for slot in (0, 1):
        bench.step([(slot, window, 0, 320, 0)], history)
    (alone,) = bench.step([(0, window, 320, 1, 0)], token)
    company = (2, SinkWindow(0, 8, 8), 0, 50, 0)
    together = bench.step(
        [company, (1, window, 320, 1, 0)], np.concatenate([bench.draw(50), token])
    )
    assert (together[-1] == alone).all()


def test_what_was_not_replayed_is_not_seen() -> None:
    shape, window = Shape(2, 2, 32, 32, 64, 4), SinkWindow(4, 40, 50)
    bench = Bench(shape)
    bench.step([(0, window, 0, 64, 0)], bench.draw(64))
    slow = Conversation(shape, Rule(4, 40), bench.rope, None, window_start=5000)
    for start, count in ((0, 4), (5000, 7), (5007, 1), (5008, 60)):
        qkv = bench.draw(count)
        got = bench.step([(0, window, start, count, 5000)], qkv)
        for n in range(count):
            assert np.abs(got[n] - slow.push(start + n, qkv[n])).max() < TOLERANCE[4]


def test_only_its_own_places_are_written() -> None:
    """A step touches one layer of its kv_slots, and there only the places of its tokens."""
    shape, window = Shape(2, 2, 32, 32, 64, 4), SinkWindow(4, 40, 50)
    bench = Bench(shape)
    before = bench.cache.copy()
    bench.step([(2, window, 52, 5, 0)], bench.draw(5))
    changed = bench.cache != before
    assert set(
        zip(*(axis.tolist() for axis in changed.any(axis=(2, 3)).nonzero()), strict=True)
    ) == {(LAYER, 2)}
    heads = changed[LAYER, 2].reshape(2, 2, -1)
    keys = heads[:, 0].reshape(2, 4, 32, 16, 4).any(axis=(0, 2, 4)).reshape(-1)
    values = heads[:, 1].reshape(2, 64, 32, 4).any(axis=(0, 2, 3))
    wanted = {window.place(i) for i in range(52, 57)}
    assert set(keys.nonzero()[0]) == set(values.nonzero()[0]) == wanted


def test_values_that_are_no_numbers_do_not_outlive_their_turn() -> None:
    """Infinite and NaN keys and values spoil the turn that made them, not the next one in that slot."""
    shape, window = Shape(2, 2, 32, 32, 64, 2), SinkWindow(0, 40, 50)
    bench = Bench(shape)
    bad = bench.draw(48)
    bad[::2] = np.nan
    bad[1::2] = 1e30
    assert not np.isfinite(bench.step([(0, window, 0, 48, 0)], bad)).all()
    slow = Conversation(shape, Rule(0, 40), bench.rope, None)
    qkv = bench.draw(3)
    got = bench.step([(0, window, 0, 3, 0)], qkv)
    assert max(np.abs(got[n] - slow.push(n, qkv[n])).max() for n in range(3)) < TOLERANCE[2]


ROW = {"slot": 0, "count": 2, "start": 0, "sinks": 4, "window": 10, "ring": 12, "window_start": 0}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"slot": SLOTS}, "kv_slot"),
        ({"slot": -1}, "kv_slot"),
        ({"count": 3}, "more tokens"),
        ({"count": 1}, "no row"),
        ({"count": 0}, "more tokens"),
        ({"count": -1}, "more tokens"),
        ({"start": -1}, "window"),
        ({"sinks": -1}, "window"),
        ({"window": 0}, "window"),
        ({"ring": 8}, "ring"),
        ({"ring": 61}, "ring"),
        ({"ring": 2**62, "sinks": 2**62}, "ring"),
        ({"ring": 0, "window": 1}, "ring"),
    ],
)
def test_rows_that_would_touch_foreign_memory_are_refused(
    changes: dict[str, int], problem: str
) -> None:
    bench = Bench(Shape(2, 2, 32, 32, 64, 4))
    good = bench.inputs([(0, SinkWindow(4, 10, 12), 0, 2, 0)], bench.draw(2))
    bad = [*good[:2], np.array([list({**ROW, **changes}.values())], np.int64), *good[3:]]
    with pytest.raises(Exception, match=problem):
        bench.kernel(*bad)
    bench.kernel(*good)


def test_tensors_of_other_shapes_are_refused() -> None:
    bench = Bench(Shape(2, 2, 32, 32, 64, 4))
    good = bench.inputs([(0, SinkWindow(4, 10, 12), 0, 2, 0)], bench.draw(2))
    for index, wrong in (
        (0, good[0][:, :-1]),
        (0, good[0][:1]),
        (1, good[1][:, :3]),
        (1, good[1][:1]),
        (2, good[2][:, :6]),
        (3, good[3][:1]),
        (3, good[3][:, :, :2]),
        (3, good[3][..., :-4]),
    ):
        bad = [np.ascontiguousarray(wrong) if n == index else array for n, array in enumerate(good)]
        with pytest.raises(Exception, match="SinkAttention"):
            bench.kernel(*bad)
