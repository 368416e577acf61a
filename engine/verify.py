"""Is a built engine what it claims to be? Its answers beside those of a float reference on the same tokens.

    executor      engine against the reference on the engine's own weights: everything but their rounding
    mistakes      is what is left of that error noise, or the trace of a window that is wrong by one?
    quantisation  the reference on the engine's own weights against the reference on the checkpoint's

Only the first two are passed or failed: what a number format costs is a choice, not a fault.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.float_reference import MISTAKES, FloatDecoder, Floats, Passage
from engine.protocol import Engine, TokenIds
from engine.verify_figures import (
    TOLERANCES,
    GreedyTally,
    LayerFigures,
    MistakeFigures,
    MistakeTally,
    Tally,
    Tolerances,
    Verification,
    relative_error,
)
from engine.verify_run import Answer, Progress, run_engine
from engine_build.spec import EngineSpec
from engine_build.stored_weights import WeightOf

MISTAKE_TOKENS = 256
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What to run: `num_tokens` in all; `mistakes` compares with wrong windows too; `layers` fills
    `Verification.layers`, which needs the checkpoint. `tolerances` None: those of the weight format."""

    num_tokens: int
    mistakes: bool = True
    layers: bool = False
    tolerances: Tolerances | None = None


def verify(
    engine: Engine,
    weights: WeightOf,
    text: TokenIds,
    options: VerifyOptions,
    progress: Progress,
    checkpoint: WeightOf | None = None,
) -> Verification:
    """Run the engine and the reference, and compare.

    `weights` are the engine's own, `checkpoint` those that it was built from. Raises ValueError for a text
    or a number of tokens that will not do, EngineFault, and what the engine raises.
    """
    spec = engine.spec
    answers = run_engine(engine, text, options.num_tokens, progress)
    decoder = FloatDecoder(spec.model, weights, _reference_dtype(spec))
    original = None if checkpoint is None else dataclasses.replace(decoder, weight=checkpoint)
    mistakes = _mistaken(answers[0].passage, spec) if options.mistakes else ()
    states = _run_reference(decoder, original, answers, mistakes, progress)
    return _compare(spec, decoder, original, answers, states, options)


def _reference_dtype(spec: EngineSpec) -> type[np.floating[Any]]:
    """Only an engine that is exact to float32 needs a finer reference than that."""
    return np.float64 if spec.weight_format == "float32" else np.float32


def _mistaken(passage: Passage, spec: EngineSpec) -> tuple[Passage, ...]:
    """The beginning of a passage, up to a little after the window began to slide, under wrong windows."""
    end = spec.capacity - 1 + MISTAKE_TOKENS
    return tuple(
        dataclasses.replace(
            passage,
            token_ids=passage.token_ids[:end],
            indices=passage.indices[:end],
            mistake=mistake,
        )
        for mistake in MISTAKES
    )


@dataclass(slots=True)
class _States:
    """Hidden states after the last layer: of each conversation [n, hidden], of the same on the
    checkpoint's weights, and of each mistake the last tokens, from `first` on."""

    right: list[Floats]
    original: list[Floats]
    wrong: list[Floats]
    mistakes: Sequence[Passage]
    first: int
    layers: list[LayerFigures] = field(default_factory=list)


def _run_reference(
    decoder: FloatDecoder,
    original: FloatDecoder | None,
    answers: Sequence[Answer],
    mistakes: Sequence[Passage],
    progress: Progress,
) -> _States:
    passages = [answer.passage for answer in answers]
    first = passages[0].sink_tokens + passages[0].window_tokens - 1
    right = [decoder.embed(passage) for passage in passages]
    wrong = [right[0][first : len(mistake.indices)] for mistake in mistakes]
    theirs = [] if original is None else [original.embed(passage) for passage in passages]
    states = _States(right, theirs, wrong, mistakes, first)
    num_layers = decoder.shape.num_layers
    for number in range(num_layers):
        layer = decoder.layer(number)
        # Before the window slides, a wrong one is right.
        for place, mistake in enumerate(mistakes):
            x = np.concatenate([states.right[0][:first], states.wrong[place]])
            states.wrong[place] = layer.apply(x, mistake, first)
        states.right = [
            layer.apply(x, passage) for x, passage in zip(states.right, passages, strict=True)
        ]
        if original is not None:
            exact = original.layer(number)
            states.original = [
                exact.apply(x, passage)
                for x, passage in zip(states.original, passages, strict=True)
            ]
            errors = {
                name: relative_error(matrix, exact.weights[name])
                for name, matrix in layer.weights.items()
                if matrix.ndim == 2
            }
            worst = max(errors, key=lambda name: errors[name])
            hidden = relative_error(np.concatenate(states.right), np.concatenate(states.original))
            states.layers.append(LayerFigures(number, errors[worst], worst, hidden))
        progress("reference", (number + 1) / (num_layers + 1))
    return states


def _compare(
    spec: EngineSpec,
    decoder: FloatDecoder,
    original: FloatDecoder | None,
    answers: Sequence[Answer],
    states: _States,
    options: VerifyOptions,
) -> Verification:
    head = decoder.head()
    exact_head = None if original is None else original.head()
    quantisation, total = Tally(), Tally()
    parts = []
    for place, (answer, hidden) in enumerate(zip(answers, states.right, strict=True)):
        tally = Tally()
        greedy = GreedyTally(answer.passage.token_ids, answer.num_given)
        for begin in range(0, len(answer.kept), _ROWS_AT_ONCE):
            block = slice(begin, begin + _ROWS_AT_ONCE)
            kept, logits = answer.kept[block], answer.logits[block]
            reference = head(hidden[kept])
            tally.add(logits, reference)
            greedy.add(kept, reference)
            if exact_head is not None:
                exact = exact_head(states.original[place][kept])
                quantisation.add(reference, exact)
                total.add(logits, exact)
        parts.append(greedy.part(answer.name, tally.figures(), answer.greedy_is_top))
    return Verification(
        parts=tuple(parts),
        mistakes=tuple(
            _judge(head, answers[0], states, place) for place in range(len(states.mistakes))
        ),
        tolerances=options.tolerances or TOLERANCES[spec.weight_format],
        quantisation=quantisation.figures() if original is not None else None,
        total=total.figures() if original is not None else None,
        layers=tuple(states.layers) if options.layers else (),
    )


def _judge(
    head: Callable[[Floats], Floats], answer: Answer, states: _States, place: int
) -> MistakeFigures:
    """One mistake, over the kept tokens that it shows in."""
    passage, tally = states.mistakes[place], MistakeTally()
    rows = np.flatnonzero((answer.kept >= states.first) & (answer.kept < len(passage.indices)))
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        block = rows[begin : begin + _ROWS_AT_ONCE]
        kept = answer.kept[block]
        right, wrong = head(states.right[0][kept]), head(states.wrong[place][kept - states.first])
        tally.add(answer.logits[block], right, wrong)
    return tally.figures(MISTAKES[place])
