"""Host slots of engines whose kv_slots are ordinary memory: a copy is a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.protocol import SlotCopy


class HostSlots:
    """`num_slots` host slots for `cache` [kv_slots, ...], which may be a view with axes swapped.

    Pages are touched when first used.
    """

    def __init__(self, cache: npt.NDArray[Any], num_slots: int) -> None:
        self._cache = cache
        self._host = np.zeros((num_slots, *cache.shape[1:]), cache.dtype)

    def run(self, copies: Sequence[SlotCopy]) -> None:
        """In order."""
        for copy in copies:
            if copy.direction == "save":
                self._host[copy.host_slot] = self._cache[copy.kv_slot]
            else:
                self._cache[copy.kv_slot] = self._host[copy.host_slot]
