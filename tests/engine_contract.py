"""What every engine does, whatever it computes with. Run by test_engine_contract.py on each of `ENGINES`.

An engine that passes can serve. `EngineContract` compares an engine with itself, with a tolerance, as
summation order may depend on what else is in a step; tests/exactness_contract.py compares it with the oracle.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pytest

from engine.protocol import Engine, EngineDead, Row, RowResult, SampleRequest, StepPlan
from engine.sampling import SamplingParams
from engine.toy_engine import ToyEngine, ToyText, byte_spec
from engine.window import SinkWindow
from engine_build.spec import WeightFormat
from tests.engine_fixtures import cut, feed, make_engine, random_tokens, row_for, window_of
from tests.tensorrt_on_onnx import make_tensorrt_engine

CAPACITY, MAX_CHUNK, SLOTS, VOCAB = 32, 12, 5, 259
CLOSE = 1e-4
GREEDY = SampleRequest(SamplingParams(temperature=0.0), 0, 0, np.zeros(0, np.int32))
SEEDED = SampleRequest(SamplingParams(seed=11), 2, 5, np.zeros(0, np.int32))


class MakeEngine(Protocol):
    """A fresh engine of a tiny model (see `tests.engine_fixtures.make_engine`)."""

    def __call__(
        self, family: str = ..., *, capacity: int = ..., max_chunk: int = ..., slots: int = ...
    ) -> Engine: ...


@dataclass(frozen=True)
class Candidate:
    """An engine to hold to the contract.

    `needs` are modules without which it is skipped, with that as the reason. `exact`: it computes in
    float32, and is held to the oracle too. `slow`: that takes long here (an interpreter), so it runs with
    the slow tests, or when `--engine` names this engine.
    """

    make: MakeEngine
    needs: tuple[str, ...] = ()
    exact: bool = True
    slow: bool = False


def toy(
    family: str = "", *, capacity: int = CAPACITY, max_chunk: int = MAX_CHUNK, slots: int = SLOTS
) -> Engine:
    spec = byte_spec(capacity=capacity, max_chunk=max_chunk)
    return ToyEngine(spec, max_resident=slots, text=ToyText(words=()))


def onnx(weight_format: WeightFormat) -> MakeEngine:
    return functools.partial(make_engine, weight_format=weight_format)


def elsewhere(module: str, function: str) -> MakeEngine:
    """A maker whose module is imported when an engine is made: it may need what is not installed."""

    def make(family: str = "llama", **sizes: int) -> Engine:
        made: Engine = getattr(importlib.import_module(module), function)(family, **sizes)
        return made

    return make


# To add an engine, add one line. Its maker takes what `make_engine` takes (family, capacity, max_chunk,
# slots) and gives an engine whose weights are float32, unless `exact` is False. Where its module needs
# torch or the like, name the maker with `elsewhere` and the modules in `needs`: it is skipped without them.
# `pytest --engine NAME` runs one of them; NAME may be the part before a dash.
ENGINES: dict[str, Candidate] = {
    "toy": Candidate(toy, exact=False),
    "cpu-float32": Candidate(onnx("float32")),
    "cpu-int8": Candidate(onnx("int8"), exact=False),
    "tensorrt-on-onnx": Candidate(make_tensorrt_engine),
    "cuda-interpreted": Candidate(
        elsewhere("tests.cuda_fixtures", "make_cuda_engine"), ("torch", "triton"), slow=True
    ),
}


def chosen_engines(asked: Sequence[str] | None, *, exact: bool) -> list[Any]:
    """Parameters for the tests of a contract. Raises UsageError for a name that means no engine."""
    for one in asked or ():
        if not any(_means(one, name) for name in ENGINES):
            raise pytest.UsageError(f"--engine {one}: none of {', '.join(ENGINES)}")
    chosen = []
    for name, candidate in ENGINES.items():
        if exact and not candidate.exact:
            continue
        if asked and not any(_means(one, name) for one in asked):
            continue
        slow = [pytest.mark.slow] if candidate.slow and exact and not asked else []
        chosen.append(pytest.param(name, marks=slow))
    return chosen


def _means(asked: str, name: str) -> bool:
    return asked in (name, name.partition("-")[0])


def maker_of(name: str) -> MakeEngine:
    """Skips the test where a module that the engine needs is not installed."""
    candidate = ENGINES[name]
    for module in candidate.needs:
        pytest.importorskip(module, reason=f"{name} needs {module}")
    return candidate.make


def last(engine: Engine, row: Row) -> RowResult:
    (result,) = engine.step(StepPlan((dataclasses.replace(row, logits="last"),))).rows
    return result


class EngineContract:
    """`engine` is a fixture that gives a fresh engine."""

    def window(self, engine: Engine, sinks: int = 4) -> SinkWindow:
        return window_of(engine.spec, sinks)

    def test_chunking_does_not_matter(self, engine: Engine) -> None:
        tokens = random_tokens(1, 150, VOCAB)
        row = row_for(self.window(engine))
        whole = feed(engine, tokens, row, [MAX_CHUNK])
        for slot, sizes in enumerate([(1,), (5, 1, 11)], start=1):
            again = feed(engine, tokens, dataclasses.replace(row, kv_slot=slot), sizes)
            assert np.abs(again - whole).max() < self.tolerance(engine)

    def tolerance(self, engine: Engine) -> float:
        # 8-bit activations round to the other side now and then.
        return CLOSE if engine.spec.weight_format == "float32" else 1.0

    def test_slots_do_not_see_one_another(self, engine: Engine) -> None:
        window = self.window(engine)
        tokens = [random_tokens(seed, 60, VOCAB) for seed in range(3)]
        alone = [feed(engine, t, row_for(window, 4), [MAX_CHUNK])[-1] for t in tokens]
        for begin, end in cut(60, [1, MAX_CHUNK]):
            rows = [
                Row(slot, begin, t[begin:end], window, logits="last")
                for slot, t in enumerate(tokens)
            ]
            results = engine.step(StepPlan(tuple(rows))).rows
        for result, wanted in zip(results, alone, strict=True):
            assert result.logits is not None
            assert np.abs(result.logits[0] - wanted).max() < self.tolerance(engine)

    def test_results_come_in_the_order_of_the_plan(self, engine: Engine) -> None:
        window = self.window(engine)
        firsts = [random_tokens(slot, 1 + 2 * slot, VOCAB) for slot in range(3)]
        alone = [last(engine, Row(slot, 0, firsts[slot], window)).logits for slot in range(3)]
        rows = tuple(Row(s, 0, firsts[s], window, logits="last") for s in (2, 0, 1))
        for result, slot in zip(engine.step(StepPlan(rows)).rows, (2, 0, 1), strict=True):
            wanted = alone[slot]
            assert result.logits is not None
            assert wanted is not None
            assert np.abs(result.logits - wanted).max() < self.tolerance(engine)

    def test_logits_have_the_shape_asked_for(self, engine: Engine) -> None:
        window = self.window(engine)
        vocab = engine.spec.model.vocab_size
        for slot, count in enumerate([1, 7]):
            row = Row(slot, 0, random_tokens(1, count, VOCAB), window)
            (nothing,) = engine.step(StepPlan((row,))).rows
            assert nothing == RowResult()
            row = dataclasses.replace(row, start=count, logits="all", sample=GREEDY)
            (every,) = engine.step(StepPlan((row,))).rows
            assert every.logits is not None
            assert every.logits.shape == (count, vocab)
            assert every.logits.dtype == np.float32
            assert every.token_id == int(every.logits[-1].argmax())
            one = last(engine, dataclasses.replace(row, start=2 * count)).logits
            assert one is not None
            assert one.shape == (1, vocab)

    def test_logits_belong_to_the_caller(self, engine: Engine) -> None:
        window = self.window(engine)
        first = last(engine, Row(0, 0, random_tokens(1, 1, VOCAB), window)).logits
        assert first is not None
        kept = first.copy()
        last(engine, Row(1, 0, random_tokens(2, 1, VOCAB), window))
        assert (first == kept).all()

    def test_a_seed_draws_the_same_token_in_any_company(self, engine: Engine) -> None:
        window = self.window(engine)
        rows = [
            Row(slot, 0, random_tokens(slot, 1 + 4 * (slot == 3), VOCAB), window, sample=SEEDED)
            for slot in range(4)
        ]
        together = [r.token_id for r in engine.step(StepPlan(tuple(rows))).rows]
        alone = [engine.step(StepPlan((row,))).rows[0].token_id for row in reversed(rows)]
        assert together == alone[::-1]
        assert len(set(together)) > 1

    def test_logprobs_are_those_of_the_logits(self, engine: Engine) -> None:
        params = SamplingParams(temperature=0.0, logprobs=True, top_logprobs=3)
        request = SampleRequest(params, 0, 0, np.zeros(0, np.int32))
        tokens = random_tokens(1, 5, VOCAB)
        result = last(engine, Row(0, 0, tokens, self.window(engine), sample=request))
        assert result.logits is not None
        assert result.logprob is not None
        logits = result.logits[0].astype(np.float64)
        wanted = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert result.logprob.token_id == result.token_id
        assert [entry.token_id for entry in result.top] == np.argsort(-wanted)[:3].tolist()
        for entry in (result.logprob, *result.top):
            assert abs(entry.logprob - wanted[entry.token_id]) < 1e-3

    def test_a_slot_is_reused_without_a_trace(self, engine: Engine) -> None:
        window, other = self.window(engine), self.window(engine, 9)
        tokens = random_tokens(3, 20, VOCAB)
        fresh = feed(engine, tokens, row_for(window, 0), [MAX_CHUNK])
        feed(engine, random_tokens(4, 90, VOCAB), row_for(other, 1), [MAX_CHUNK])
        assert (feed(engine, tokens, row_for(window, 1), [MAX_CHUNK]) == fresh).all()

    def test_refused_plans_change_nothing(self, engine: Engine) -> None:
        window = self.window(engine)
        tokens = random_tokens(3, 41, VOCAB)
        feed(engine, tokens[:40], row_for(window, 0), [MAX_CHUNK])
        good = Row(0, 40, tokens[40:], window)
        for field, changes in self.bad_rows(engine).items():
            bad = dataclasses.replace(good, **{"kv_slot": 1, **changes})
            with pytest.raises(ValueError, match=field):
                engine.step(StepPlan((dataclasses.replace(good, start=30), bad)))
        whole = feed(engine, tokens, row_for(window, 2), [MAX_CHUNK])
        logits = last(engine, good).logits
        assert logits is not None
        assert np.abs(logits[0] - whole[-1]).max() < self.tolerance(engine)

    def bad_rows(self, engine: Engine) -> dict[str, dict[str, Any]]:
        ids, spec = np.array([1], np.int32), engine.spec
        return {
            r"kv_slot: 0 is .* twice": {"kv_slot": 0},
            rf"kv_slot: {SLOTS}": {"kv_slot": engine.max_resident},
            r"kv_slot: -1": {"kv_slot": -1},
            r"start": {"start": -1},
            r"start: \d": {"start": 2**62},
            r"window_start": {"window_start": 41},
            r"tokens: 0 ": {"tokens": ids[:0]},
            rf"tokens: {MAX_CHUNK + 1} ": {"tokens": np.tile(ids, MAX_CHUNK + 1)},
            r"tokens: float": {"tokens": ids.astype(np.float32)},
            r"tokens: int32 \(1, 1\)": {"tokens": ids[None]},
            r"tokens: an id": {"tokens": np.array([spec.model.vocab_size], np.int32)},
            r"tokens: an id .*": {"tokens": np.array([-1], np.int32)},
            r"window.sink_tokens": {"window": window_of(spec, spec.max_sink_tokens + 1)},
            r"window.slot_tokens": {"window": SinkWindow(4, CAPACITY - 4, spec.slot_tokens - 3)},
            r"window.ring_tokens": {"window": SinkWindow(4, 1, 0)},
            r"logits": {"logits": "some"},
        }

    def test_a_closed_engine_is_dead(self, engine: Engine) -> None:
        engine.close()
        engine.close()
        with pytest.raises(EngineDead):
            engine.step(StepPlan((Row(0, 0, random_tokens(1, 1, VOCAB), self.window(engine)),)))
