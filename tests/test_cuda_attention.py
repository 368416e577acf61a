"""The Triton attention, its rotation and its cache write, in the interpreter, against the slow way."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.window import SinkWindow
from engine_build.spec import RopeSpec
from tests.cuda_fixtures import torch
from tests.reference import Rule
from tests.test_attention_kernel import WRONG, Conversation, Part, Shape

from engine.cuda_kernels.attention import Tiling, sink_attention, split_space  # isort: skip
from engine.cuda_kernels.rotate import HeadNorms, rotate_and_cache, rotation_angles  # isort: skip

Floats = npt.NDArray[np.floating[Any]]
SLOTS, LAYERS, LAYER = 3, 2, 1
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
PADDED = 16


class Bench:
    """The kernels, a cache and a stream of random steps, compared with the slow way."""

    def __init__(
        self, shape: Shape, dtype: Any = torch.float32, block_m: int = 16, splits: int = 1
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self.rng = np.random.default_rng(0)
        self.rope = RopeSpec(theta=1000.0, rotary_dim=shape.rotary_dim)
        padded = -(-shape.dim // PADDED) * PADDED
        # Whatever a slot held before must not matter.
        size = (SLOTS, LAYERS, 2, shape.kv_heads, shape.places, padded)
        self.cache = torch.from_numpy(self.rng.standard_normal(size)).to(dtype)
        self.norms: tuple[Floats, Floats] | None = None
        if shape.qk_norm:
            one, two = (1 + 0.3 * self.rng.standard_normal((2, shape.dim))).astype(np.float32)
            self.norms = (one, two)
        self.tiling = Tiling(block_m, 32, splits, num_warps=4, num_stages=1)
        self.arrived = torch.zeros(64, dtype=torch.int32)

    def draw(self, tokens: int) -> Floats:
        # Scores of a few units: attention is peaked, so one wrong key or angle shows.
        scale = np.full(self.shape.width, 2.2 / self.shape.dim**0.25)
        if self.shape.qk_norm:
            scale[:] = 1.0
        scale[(self.shape.heads + self.shape.kv_heads) * self.shape.dim :] = 1.0
        drawn = torch.from_numpy(self.rng.standard_normal((tokens, self.shape.width)) * scale)
        # As the kernel gets it, so that only what it computes itself is compared.
        values: Floats = drawn.to(self.dtype).double().numpy()
        return values

    def step(self, rows: list[Part], qkv: Floats) -> Floats:
        shape, queries = self.shape, self.tiling.queries(self.shape.group)
        table, tiles = [], []
        token_rows: list[int] = []
        for number, (slot, window, start, count, window_start) in enumerate(rows):
            sizes = (window.sink_tokens, window.window_tokens, window.ring_tokens)
            table.append((slot, count, start, *sizes, window_start, len(token_rows)))
            token_rows += [number] * count
            tiles += [(number, first) for first in range(0, count, queries)]
        # Padding, as in a captured step of few rows.
        table.append((0,) * 8)
        tiles.append((len(rows), 0))
        tokens = len(token_rows)
        on_device = [torch.tensor(part, dtype=torch.int64) for part in (table, token_rows, tiles)]
        rows_in, token_rows_in, tiles_in = on_device
        frequencies = torch.from_numpy(self.rope.inverse_frequencies())
        angles = torch.empty((tokens, 4, shape.rotary_dim // 2))
        rotation_angles(rows_in, token_rows_in, frequencies, 1.0, angles)
        given = torch.from_numpy(qkv).to(self.dtype)
        q = torch.empty((2, tokens, shape.heads, shape.dim), dtype=self.dtype)
        norms = None
        if self.norms is not None:
            q_norm, k_norm = (torch.from_numpy(norm) for norm in self.norms)
            norms = HeadNorms(q_norm, k_norm, 1e-5)
        layer = self.cache[:, LAYER]
        rotate_and_cache(given, angles, norms, layer, rows_in, token_rows_in, q)
        out = torch.empty((tokens, shape.heads, shape.dim), dtype=self.dtype)
        space = split_space(self.tiling, len(tiles), shape.kv_heads, shape.dim, self.arrived)
        sink_attention(q, layer, out, rows_in, tiles_in, self.tiling, space)
        assert not self.arrived.any()
        result: Floats = out.reshape(tokens, -1).double().numpy()
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
                    wanted = slow[n].push(i, qkv[token])
                    worst = max(worst, float(np.abs(got[token] - wanted).max()))
                    token += 1
                done[n] += count
        raise AssertionError


@pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "sinks", "splits"),
    [
        (2, 3, 64, 4, 4),
        (1, 4, 80, 0, 1),
        (1, 8, 96, 40, 4),
        (2, 1, 128, 4, 1),
        pytest.param(2, 3, 64, 40, 1, marks=pytest.mark.slow),
        pytest.param(1, 4, 80, 4, 4, marks=pytest.mark.slow),
        pytest.param(1, 8, 96, 0, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, 128, 0, 4, marks=pytest.mark.slow),
    ],
)
def test_equals_the_slow_way_while_rings_wrap(
    kv_heads: int, group: int, dim: int, sinks: int, splits: int
) -> None:
    window = SinkWindow(sinks, 45, 45 + 33)
    bench = Bench(Shape(kv_heads, group, dim, dim, 118, 4), block_m=64, splits=splits)
    others = [SinkWindow(4, 30, 63), SinkWindow(0, 20, 19 + 33)]
    assert bench.error([window, *others], 140, (1, 20, 33)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_m", [16, 64])
def test_half_precision(dtype: Any, block_m: int) -> None:
    bench = Bench(Shape(2, 3, 64, 64, 80, 2), dtype, block_m, splits=2)
    assert bench.error([SinkWindow(4, 40, 60)] * 2, 120, (21, 1, 9)) < TOLERANCE[dtype]


def test_norms_partial_rotation_and_odd_heads() -> None:
    bench = Bench(Shape(2, 2, 24, 12, 48, 4, qk_norm=True), block_m=64)
    assert bench.error([SinkWindow(3, 20, 40)] * 2, 90, (1, 5, 17)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_told_from_the_right_one(name: str, splits: int) -> None:
    bench = Bench(Shape(2, 2, 32, 32, 64, 4), splits=splits)
    error = bench.error([SinkWindow(4, 40, 50)], 70, (9,), rules=[WRONG[name]])
    assert error > 20 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("start", [5_000, 16_000_000, 2**40 - 200])
def test_far_out_and_what_was_not_replayed_is_not_seen(start: int) -> None:
    shape, window = Shape(1, 2, 32, 32, 120, 4), SinkWindow(4, 40, 100)
    bench = Bench(shape, block_m=64)
    bench.step([(0, window, 0, 60, 0)], bench.draw(60))
    slow = Conversation(shape, Rule(4, 40), bench.rope, None, window_start=start)
    # The reference rotates at the index less a whole number of windows: what attention sees is distance.
    for at, count in ((0, 4), (start, 7), (start + 7, 1), (start + 8, 60)):
        qkv = bench.draw(count)
        got = bench.step([(0, window, at, count, start)], qkv)
        for n in range(count):
            wanted = slow.push(at + n, qkv[n])
            assert np.abs(got[n] - wanted).max() < (1e-3 if start > 2**30 else 2e-5)


def test_only_its_own_places_are_written() -> None:
    """A step touches one layer of its kv_slots, and there only the places of its tokens."""
    shape, window = Shape(2, 2, 32, 32, 64, 4), SinkWindow(4, 40, 50)
    bench = Bench(shape)
    before = bench.cache.clone()
    bench.step([(2, window, 52, 5, 0)], bench.draw(5))
    changed = (bench.cache != before).numpy()
    assert set(np.argwhere(changed.any(axis=(2, 3, 4, 5)))[:, 1]) == {LAYER}
    assert set(np.argwhere(changed.any(axis=(1, 2, 3, 4, 5)))[:, 0]) == {2}
    places = changed[2, LAYER].any(axis=(1, 3))
    assert [set(part.nonzero()[0]) for part in places] == [
        {window.place(i) for i in range(52, 57)}
    ] * 2


def test_values_that_are_no_numbers_do_not_outlive_their_turn() -> None:
    shape, window = Shape(2, 2, 32, 32, 64, 2), SinkWindow(0, 40, 50)
    bench = Bench(shape)
    bad = bench.draw(11)
    bad[::2] = np.nan
    bad[1::2] = 1e30
    for start in range(0, 55, 11):
        assert not np.isfinite(bench.step([(0, window, start, 11, 0)], bad)).all()
    slow = Conversation(shape, Rule(0, 40), bench.rope, None)
    qkv = bench.draw(3)
    got = bench.step([(0, window, 0, 3, 0)], qkv)
    assert max(np.abs(got[n] - slow.push(n, qkv[n])).max() for n in range(3)) < 2e-5


def poison(monkeypatch: pytest.MonkeyPatch, fill: float) -> None:
    """Memory that nobody has written holds `fill`, as a GPU's may hold anything."""
    empty = torch.empty

    def filled(*size: Any, **options: Any) -> Any:
        made = empty(*size, **options)
        return made.fill_(fill) if made.is_floating_point() else made.fill_(2**31 - 1)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.mark.parametrize(("dim", "splits"), [(24, 1), (32, 8)])
def test_memory_that_was_never_written_is_never_read(
    monkeypatch: pytest.MonkeyPatch, dim: int, splits: int
) -> None:
    """To the bit: a weight of zero does not hide a value that is no number."""
    shape = Shape(2, 2, dim, dim, 64, 4)
    windows = [SinkWindow(4, 40, 50), SinkWindow(0, 20, 36)]
    told = []
    for fill in (0.0, float("nan")):
        with monkeypatch.context() as patch:
            poison(patch, fill)
            bench = Bench(shape, block_m=16, splits=splits)
            bench.cache.fill_(fill)
            results = []
            for turn, count in enumerate((3, 1, 9, 1)):
                starts = ((0, 3, 4, 13)[turn], (0, 3, 4, 13)[turn])
                rows = [(n, windows[n], starts[n], count, 0) for n in range(2)]
                results.append(bench.step(rows, bench.draw(2 * count)))
            told.append(np.concatenate(results))
    assert np.array_equal(told[0], told[1])
    # A row that claims more tokens than were cached is shown what lies there.
    assert np.isnan(bench.step([(2, windows[0], 20, 1, 0)], bench.draw(1))).any()
