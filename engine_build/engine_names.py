"""What builds and engines call the files, inputs and weights of an engine. Needs no ONNX: a machine that
only runs engines has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

GRAPH_FILE = "graph.onnx"
WEIGHTS_FILE = "weights.safetensors"

LOGIT_ROWS = "logit_rows"
LOGITS = "logits"

LEVELS, SCALES = ".levels", ".scales"
"""What is added to a weight's name where it is kept in few bits: the integers, and their scales."""


@dataclass(frozen=True, slots=True)
class StoredAt:
    """Where a weight's bytes are in the weights file."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Declared:
    """A weight: element type and shape."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
