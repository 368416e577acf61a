"""Replay measured on a small random model in float32, where the truth is known.

What these prove: one window of replay differs from the live cache by far more than rounding (or the
measurement would see nothing), as many windows as the model has layers equal it, and both figures are
those of the slow reference, which knows nothing of engines, slots and chunks.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.conversation import TokenIds
from deployments.cli import app
from deployments.config import load_config
from deployments.engine_files import locate_engine
from deployments.local.measure_replay import (
    PROMPT,
    MeasureRequest,
    Text,
    TextError,
    chat_inputs,
    measure_model,
    message_tokens,
    read_text,
)
from deployments.local.progress import Steps
from deployments.replay_measurement import (
    Dialogue,
    MeasuredReply,
    Measurement,
    MeasureOptions,
    measure,
)
from engine.protocol import Engine, RowResult, StepPlan, StepResult, TurnFailed
from engine.replay_quality import Bar, kl_divergence, recommend
from engine.sampling import SamplingParams
from engine.toy_engine import ToyEngine, byte_spec
from engine_build.spec import EngineSpec
from tests.engine_fixtures import cached_tensors, make_engine, tiny_shape
from tests.reference import Floats, ReferenceDecoder, Rule
from tests.tiny_models import VOCAB_SIZE

CAPACITY, SINKS = 40, 4
WINDOW = CAPACITY - SINKS
LAYERS = 3
DEPTHS = (1, 2, LAYERS, LAYERS + 1)
OPTIONS = MeasureOptions(DEPTHS, replies=3, reply_tokens=10, sink_tokens=SINKS)
INPUT = 3
ROUNDING = 1e-10


def dialogue(seed: int = 1, eos_ids: frozenset[int] = frozenset()) -> Dialogue:
    rng = np.random.default_rng(seed)
    inputs = (rng.integers(0, VOCAB_SIZE, INPUT).astype(np.int32) for _ in itertools.count())
    closing = np.array([5, 6], np.int32)
    return Dialogue(inputs, SamplingParams(seed=seed), eos_ids, closing)


def ignore(what: str, fraction: float) -> None:
    pass


@functools.cache
def measured() -> Measurement:
    engine = make_engine(capacity=CAPACITY, max_chunk=20, slots=OPTIONS.num_slots)
    return measure(engine, dialogue(), OPTIONS, ignore)


def test_the_reference_has_as_many_layers() -> None:
    assert tiny_shape("llama").num_layers == LAYERS


def test_one_window_differs_from_live_and_a_window_for_each_layer_equals_it() -> None:
    one, two, exact, deeper = measured().depths
    assert one.kl_mean > 1e-2
    assert one.top1_agreement < 0.9
    assert one.median_divergence is not None
    assert 1e-4 < two.kl_mean < one.kl_mean / 10
    for quality in (exact, deeper, measured().floor):
        assert quality.kl_p99 < ROUNDING
        assert quality.top1_agreement == 1.0
        assert quality.diverged_after == (None,) * OPTIONS.replies


def test_the_noise_floor_is_rounding_but_not_nothing() -> None:
    """Other chunks were really run: the very same steps would give the very same logits."""
    assert 0.0 < measured().floor.kl_mean < ROUNDING


@functools.cache
def reference_logits() -> Floats:
    """After every token of the measured conversation, by the oracle in float64."""
    live = ReferenceDecoder(tiny_shape("llama"), cached_tensors("llama"), Rule(SINKS, WINDOW))
    return live.push_all(0, measured().conversation)


def reference_kl(reply: MeasuredReply, windows: int) -> Floats:
    """KL along a measured reply by the oracle: replay these windows into nothing, and compare."""
    ids, begin = measured().conversation, reply.base_tokens
    first_query = begin + reply.input_tokens - 1
    end = first_query + OPTIONS.reply_tokens
    start = begin - windows * WINDOW
    rebuilt = ReferenceDecoder(tiny_shape("llama"), cached_tensors("llama"), Rule(SINKS, WINDOW))
    rebuilt.push_all(0, ids[:SINKS])
    got = rebuilt.push_all(start, ids[start:end])[first_query - start :]
    wanted = reference_logits()[first_query:end]
    return np.array([kl_divergence(p, q) for p, q in zip(wanted, got, strict=True)])


def test_greedy_replies_are_the_likeliest_tokens_and_sampled_ones_are_not() -> None:
    ids = measured().conversation
    likeliest = reference_logits().argmax(axis=1)
    for reply in measured().replies:
        start = reply.base_tokens + reply.input_tokens
        said = ids[start : start + OPTIONS.reply_tokens]
        wanted = likeliest[start - 1 : start - 1 + OPTIONS.reply_tokens]
        assert np.array_equal(said, wanted) == reply.greedy


def test_the_divergence_is_the_one_that_the_reference_finds() -> None:
    reply = measured().replies[-2]
    assert not reply.greedy
    for place, windows in enumerate(DEPTHS[:2]):
        expected = reference_kl(reply, windows)
        np.testing.assert_allclose(reply.comparisons[place].kl, expected, rtol=2e-2, atol=1e-7)
        assert expected.mean() > 1e-4
    assert reference_kl(reply, LAYERS).max() < 1e-15


def test_every_second_reply_is_greedy_and_half_a_window_lies_between() -> None:
    replies = measured().replies
    assert [reply.greedy for reply in replies] == [False, True] * OPTIONS.replies
    assert replies[0].base_tokens >= SINKS + (max(DEPTHS) + 2) * WINDOW
    for one, next_one in itertools.pairwise(replies):
        assert next_one.base_tokens - one.base_tokens >= WINDOW // 2


def test_the_conversation_is_inputs_replies_and_closings() -> None:
    ids, inputs = measured().conversation.tolist(), dialogue().inputs
    turn = INPUT + OPTIONS.reply_tokens + 2
    assert len(ids) % turn == 0
    for begin in range(0, len(ids), turn):
        assert ids[begin : begin + INPUT] == next(inputs).tolist()
        assert ids[begin + turn - 2 : begin + turn] == [5, 6]


def test_a_reply_ends_where_the_live_cache_ends_it() -> None:
    """The end token is compared, and is not part of the conversation."""
    stop = frozenset(range(0, VOCAB_SIZE, 8))
    engine = make_engine(capacity=CAPACITY, max_chunk=20, slots=OPTIONS.num_slots)
    found = measure(engine, dialogue(eos_ids=stop), OPTIONS, ignore)
    lengths = [len(reply.comparisons[0].kl) for reply in found.replies]
    assert min(lengths) < OPTIONS.reply_tokens
    assert found.depths[2].kl_p99 < ROUNDING
    for reply, length in zip(found.replies, lengths, strict=True):
        start = reply.base_tokens + reply.input_tokens
        said = found.conversation[start : start + length - 1]
        assert not stop & set(said.tolist())


def test_costs_are_those_of_the_plans() -> None:
    assert [cost.tokens for cost in measured().costs] == [SINKS + d * WINDOW for d in DEPTHS]
    assert all(cost.seconds > 0 for cost in measured().costs)


def test_the_recommendation_on_what_was_measured() -> None:
    found = measured()
    assert recommend(found.depths, found.floor, Bar(), LAYERS).windows == LAYERS
    assert recommend(found.depths[:2], found.floor, Bar(), LAYERS).windows is None


def test_a_toy_without_traces_needs_one_window() -> None:
    toy = ToyEngine(byte_spec(CAPACITY, 20), max_resident=OPTIONS.num_slots)
    rng = np.random.default_rng(0)
    inputs = (rng.integers(97, 123, 9).astype(np.int32) for _ in itertools.count())
    found = measure(toy, Dialogue(inputs, SamplingParams(seed=1)), OPTIONS, ignore)
    for quality in (*found.depths, found.floor):
        assert (quality.kl_mean, quality.top1_agreement) == (0.0, 1.0)


class Failing:
    """An engine whose rows fail from some step on."""

    def __init__(self, inner: Engine, good_steps: int, result: RowResult) -> None:
        self._inner, self._left, self._result = inner, good_steps, result

    @property
    def spec(self) -> EngineSpec:
        return self._inner.spec

    @property
    def max_resident(self) -> int:
        return self._inner.max_resident

    def step(self, plan: StepPlan) -> StepResult:
        self._left -= 1
        if self._left >= 0:
            return self._inner.step(plan)
        return StepResult(tuple(self._result for _ in plan.rows))

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("result", [RowResult(failed="no memory"), RowResult()])
def test_a_failed_row_ends_the_measurement(result: RowResult) -> None:
    toy = ToyEngine(byte_spec(CAPACITY, 20), max_resident=OPTIONS.num_slots)
    inputs = itertools.repeat(np.array([97, 98], np.int32))
    with pytest.raises(TurnFailed):
        measure(Failing(toy, 3, result), Dialogue(inputs, SamplingParams()), OPTIONS, ignore)


def test_an_engine_that_is_too_small_is_refused() -> None:
    few = ToyEngine(byte_spec(CAPACITY, 20), max_resident=OPTIONS.num_slots - 1)
    with pytest.raises(ValueError, match="6 kv_slots"):
        measure(few, dialogue(), OPTIONS, ignore)
    narrow = ToyEngine(byte_spec(8, 4), max_resident=OPTIONS.num_slots)
    with pytest.raises(ValueError, match="5 tokens are pinned"):
        measure(narrow, dialogue(), replace(OPTIONS, sink_tokens=5), ignore)


@pytest.mark.parametrize(
    "wrong", [{"depths": ()}, {"depths": (0, 1)}, {"depths": (2, 1)}, {"replies": 0}]
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        replace(OPTIONS, **wrong)


def test_progress_rises_to_the_end() -> None:
    toy = ToyEngine(byte_spec(CAPACITY, 20), max_resident=OPTIONS.num_slots)
    fractions = list[float]()
    inputs = itertools.repeat(np.array([97, 98, 99], np.int32))
    measure(toy, Dialogue(inputs, SamplingParams()), OPTIONS, lambda what, f: fractions.append(f))
    assert fractions == sorted(fractions)
    assert 0.0 <= fractions[0] < 0.1
    assert 0.7 < fractions[-1] <= 1.0


# The text and the command.


def passages(text: str, tokens: int, count: int) -> list[TokenIds]:
    codec = locate_engine(load_config({"model": "toy"})).codec
    inputs: Iterator[TokenIds] = chat_inputs(codec, Text("a text", text), tokens)
    return list(itertools.islice(inputs, count))


def test_messages_are_passages_of_the_text_in_order_and_over_again() -> None:
    codec = locate_engine(load_config({"model": "toy"})).codec
    words = [f"w{number}" for number in range(100)]
    said = [codec.decode(ids) for ids in passages(" ".join(words), 40, 12)]
    bare = [text.removeprefix("user:").removesuffix("assistant:") for text in said]
    assert all(text.startswith(PROMPT) for text in bare)
    heard = " ".join(text.removeprefix(PROMPT) for text in bare).split()
    again = heard.index("w0", 1)
    assert 90 < again <= 100
    assert heard == [*words[:again], *words][: len(heard)]


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(TextError, match="too short"):
        passages("only a few words", 40, 1)


def test_the_default_text_is_there_and_long() -> None:
    text = read_text(None)
    assert "Python" in text.name
    assert len(text.content.split()) > 20_000


def test_a_text_file_is_read_and_must_be_text(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("naïve words")
    assert read_text(tmp_path / "good") == Text("good", "naïve words")
    (tmp_path / "bad").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match="UTF-8"):
        read_text(tmp_path / "bad")


@pytest.mark.parametrize(("capacity", "tokens"), [(8, 4), (512, 64), (65_536, 256)])
def test_messages_are_a_part_of_the_window(capacity: int, tokens: int) -> None:
    assert message_tokens(capacity) == tokens


def test_the_command_end_to_end(tiny_engine_dir: Path, tmp_path: Path) -> None:
    arguments = ["measure-replay", "--model", str(tiny_engine_dir), "--capacity", "96"]
    arguments += ["--depths", "1,3", "--replies", "1", "--tokens", "6", "--threads", "1"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "replay_windows: 3" in done.output
    assert "noise floor" in done.output
    (file,) = tmp_path.glob("measure_replay-*.json")
    report = json.loads(file.read_text())
    assert report["benchmark"] == "measure_replay"
    assert report["window_tokens"] == 96 - report["sink_tokens"]
    one, three = report["depths"]
    assert one["kl_mean"] > 1e-4
    assert three["kl_p99"] < ROUNDING
    assert report["noise_floor"]["kl_mean"] < ROUNDING
    assert report["recommendation"]["windows"] == 3
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_no_measured_depth_will_do(tiny_engine_dir: Path) -> None:
    arguments = ["measure-replay", "--model", str(tiny_engine_dir), "--capacity", "96"]
    arguments += ["--depths", "1", "--replies", "1", "--tokens", "4", "--threads", "1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "no measured depth will do" in done.output
    assert "at 3 windows" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--depths", "1,two"], "not numbers"),
        (["--depths", "4,2"], "rising"),
        (["--depths", "0"], "rising"),
        (["--text", "/no/such/file"], "No such file"),
        (["--model", "/no/such/engine"], "model:"),
        (["--capacity", "16"], "are pinned"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_reason(
    tiny_engine_dir: Path, arguments: list[str], problem: str
) -> None:
    done = CliRunner().invoke(app, ["measure-replay", "--model", str(tiny_engine_dir), *arguments])
    assert done.exit_code == 1
    assert problem in done.output
    assert "Traceback" not in done.output


def test_the_engine_is_closed_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(ToyEngine, "close", lambda self: closed.append(True))
    request = MeasureRequest((1,), 1, 4, Bar(), 1, 1, None, None)
    steps = Steps(Console(file=io.StringIO()))
    config = load_config({"model": "toy", "capacity": 64})
    with pytest.raises(TextError):
        measure_model(config, request, Text("a word", "word"), steps)
    assert closed == [True]
