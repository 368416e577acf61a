"""The figures of a verification, and what passes. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.float_reference import Mistake
from engine_build.spec import WeightFormat

Floats = npt.NDArray[np.floating[Any]]
Exact = npt.NDArray[np.float64]

MISTAKE_SHARE = 0.5
"""An error that holds less than this of a mistake's effect does not come from it."""


@dataclass(frozen=True, slots=True)
class Tolerances:
    """What an executor may be off by, on each conversation.

    `relative_error` is the root mean square of the logits' error over that of the logits, both without
    the mean of their token, which no probability depends on; `kl_mean` in nats a token; `top1` the least
    share of tokens with the same likeliest token.
    """

    relative_error: float
    kl_mean: float
    top1: float


TOLERANCES: dict[WeightFormat, Tolerances] = {
    "float32": Tolerances(5e-4, 1e-6, 0.995),
    "float16": Tolerances(0.008, 3e-4, 0.98),
    "bfloat16": Tolerances(0.05, 5e-3, 0.95),
    "int8": Tolerances(0.10, 1.5e-2, 0.93),
    "float8": Tolerances(0.22, 0.06, 0.78),
    "int4": Tolerances(0.07, 5e-3, 0.94),
}
"""By the weights' format, which decides that of activations and cache. docs/verify.md says where they
come from."""


@dataclass(frozen=True, slots=True)
class Figures:
    """How far logits are from those they are compared with, over `num_tokens` tokens.

    Errors are of logits without the mean of their token; `relative_error` as in `Tolerances`. KL from the
    reference, nats a token.
    """

    num_tokens: int
    max_error: float
    rms_error: float
    relative_error: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float


@dataclass(frozen=True, slots=True)
class PartFigures:
    """One conversation. `greedy_tokens` were drawn by the engine; the first that the reference would not
    have drawn came after `greedy_same` of them (None: all are the same), and the most that the reference
    liked another token better is `greedy_regret`, in logits."""

    name: str
    figures: Figures
    greedy_tokens: int
    greedy_same: int | None
    greedy_regret: float
    greedy_is_top: bool


@dataclass(frozen=True, slots=True)
class MistakeFigures:
    """Whether the engine's error looks like a wrong window's effect, over the tokens that it shows in.

    `share` is the least-squares share of that effect in the error, `share_error` its standard error: 0 for
    an engine that is right, whatever its noise, and about 1 for one that makes the mistake. `effect` is the
    relative error that the mistake itself makes.
    """

    mistake: Mistake
    share: float
    share_error: float
    effect: float

    @property
    def seen(self) -> bool:
        """Whether the engine makes this mistake, as far as its noise lets one see."""
        return self.share > MISTAKE_SHARE and self.share > 4 * self.share_error

    @property
    def ruled_out(self) -> bool:
        """Whether the noise was low enough to see it."""
        return not self.seen and 4 * self.share_error < MISTAKE_SHARE


@dataclass(frozen=True, slots=True)
class LayerFigures:
    """What rounding the weights does to one layer: the largest relative error (Frobenius) of its matrices,
    which, and the relative error of the hidden states after it, all layers before it being rounded too."""

    layer: int
    weight_error: float
    worst_weight: str
    hidden_error: float


@dataclass(frozen=True, slots=True)
class Verification:
    """All that was found. `problems` are the reasons for which it fails, none if it passes.

    `quantisation` and `total` (engine against checkpoint) are over the tokens of all conversations.
    `failure` says why an engine gave no answers to compare.
    """

    parts: tuple[PartFigures, ...]
    mistakes: tuple[MistakeFigures, ...]
    tolerances: Tolerances
    quantisation: Figures | None = None
    total: Figures | None = None
    layers: tuple[LayerFigures, ...] = ()
    failure: str = ""

    @property
    def problems(self) -> tuple[str, ...]:
        found = [f"the engine failed: {self.failure}"] if self.failure else []
        for part in self.parts:
            found += _part_problems(part, self.tolerances)
        for one in self.mistakes:
            if one.seen:
                found.append(
                    f"the window is wrong: the error is {one.share:.2f} times that of {one.mistake!r}"
                )
        return tuple(found)


def _part_problems(part: PartFigures, limits: Tolerances) -> list[str]:
    figures, found = part.figures, []
    for name, value, limit in (
        ("relative_error", figures.relative_error, limits.relative_error),
        ("kl_mean", figures.kl_mean, limits.kl_mean),
    ):
        if not value <= limit:
            found.append(f"{part.name}: {name} {value:.2g} is above {limit:g}")
    if not figures.top1 >= limits.top1:
        found.append(f"{part.name}: top1 {figures.top1:.3f} is below {limits.top1:g}")
    if not part.greedy_is_top:
        found.append(f"{part.name}: a greedy token is not the likeliest of the engine's own logits")
    return found


def relative_error(got: Floats, wanted: Floats) -> float:
    """Frobenius norm of the difference over that of `wanted`."""
    return float(np.linalg.norm(got - wanted) / (np.linalg.norm(wanted) or 1.0))


def _centred(logits: Floats) -> Exact:
    exact = logits.astype(np.float64)
    exact -= exact.mean(axis=-1, keepdims=True)
    return exact


def _log_sum_exp(logits: Exact) -> Exact:
    """[n, vocab] -> [n, 1]."""
    top = logits.max(axis=-1, keepdims=True)
    total: Exact = np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)) + top
    return total


@dataclass(slots=True)
class Tally:
    """Adds up `Figures`, a block of rows [n, vocab] at a time."""

    _max: float = 0.0
    _error: float = 0.0
    _wanted: float = 0.0
    _entries: int = 0
    _kl: list[float] = field(default_factory=list)
    _same: int = 0

    def add(self, got: Floats, wanted: Floats) -> None:
        exact = _centred(wanted)
        error = _centred(got) - exact
        self._max = max(self._max, float(np.abs(error).max()))
        self._error += float(np.square(error).sum())
        self._wanted += float(np.square(exact).sum())
        self._entries += error.size
        # KL(p || q) = sum p (log p - log q), and log q = log p + error - a constant of the row.
        normaliser = _log_sum_exp(exact)
        constant = _log_sum_exp(exact + error) - normaliser
        p = np.exp(exact - normaliser)
        self._kl += np.maximum(0.0, (p * (constant - error)).sum(axis=-1)).tolist()
        self._same += int((got.argmax(axis=-1) == wanted.argmax(axis=-1)).sum())

    def figures(self) -> Figures:
        kl = np.array(self._kl)
        return Figures(
            num_tokens=len(kl),
            max_error=self._max,
            rms_error=math.sqrt(self._error / self._entries),
            relative_error=math.sqrt(self._error / (self._wanted or 1.0)),
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99, method="higher")),
            kl_max=float(kl.max()),
            top1=self._same / len(kl),
        )


@dataclass(slots=True)
class GreedyTally:
    """Follows the engine's own tokens, those of `token_ids` from `num_given` on, through the reference."""

    token_ids: npt.NDArray[np.int32]
    num_given: int
    _same: int | None = None
    _regret: float = 0.0

    def add(self, kept: npt.NDArray[np.int64], reference: Floats) -> None:
        """`reference` are the logits after the tokens at the places `kept`, in order."""
        for place, row in zip(kept.tolist(), reference, strict=True):
            drawn = place + 1
            if self.num_given <= drawn < len(self.token_ids):
                regret = float(row.max() - row[self.token_ids[drawn]])
                self._regret = max(self._regret, regret)
                if regret > 0 and self._same is None:
                    self._same = drawn - self.num_given

    def part(self, name: str, figures: Figures, greedy_is_top: bool) -> PartFigures:
        return PartFigures(
            name=name,
            figures=figures,
            greedy_tokens=len(self.token_ids) - self.num_given,
            greedy_same=self._same,
            greedy_regret=self._regret,
            greedy_is_top=greedy_is_top,
        )


@dataclass(slots=True)
class MistakeTally:
    """Adds up `MistakeFigures`, a block of rows [n, vocab] at a time."""

    _along: list[float] = field(default_factory=list)
    _effect: list[float] = field(default_factory=list)
    _right: float = 0.0

    def add(self, got: Floats, right: Floats, wrong: Floats) -> None:
        exact = _centred(right)
        effect = _centred(wrong) - exact
        self._along += ((_centred(got) - exact) * effect).sum(axis=-1).tolist()
        self._effect += np.square(effect).sum(axis=-1).tolist()
        self._right += float(np.square(exact).sum())

    def figures(self, mistake: Mistake) -> MistakeFigures:
        along, effect = np.array(self._along), np.array(self._effect)
        total = float(effect.sum()) or 1.0
        share = float(along.sum()) / total
        return MistakeFigures(
            mistake=mistake,
            share=share,
            share_error=float(np.linalg.norm(along - share * effect)) / total,
            effect=math.sqrt(float(effect.sum()) / (self._right or 1.0)),
        )
