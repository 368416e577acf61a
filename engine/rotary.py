"""Rotary angles on the host, in float64.

float32 angles are off by 0.15 rad at token 4 million; here index * frequency is reduced modulo 2 pi in
float64 before the cast, so token 16 million rotates as exactly as token 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine_build.spec import RopeSpec

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Rotary:
    """Cosines and sines for a model's rotary embedding."""

    rope: RopeSpec
    _frequencies: npt.NDArray[np.float64] = field(init=False)
    _scale: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_frequencies", self.rope.inverse_frequencies())
        object.__setattr__(self, "_scale", self.rope.cos_sin_scale())

    def cos_sin(self, positions: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """float32 [*positions.shape, rotary_dim / 2], times the rope's own factor (yarn)."""
        angles = np.mod(positions[..., None] * self._frequencies, 2 * math.pi)
        cos, sin = np.cos(angles) * self._scale, np.sin(angles) * self._scale
        return cos.astype(np.float32), sin.astype(np.float32)
