"""The seam between the loop that decides and the executors that compute.

A `StepPlan` says which tokens of which kv_slots to run; an `Engine` runs them and samples. An engine
keeps no lengths and no conversations: the plan names every token_index, so the same plan always means
the same thing, on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from engine.sampling import SamplingParams, TokenLogprob
from engine.window import SinkWindow
from engine_build.spec import EngineSpec

TokenIds = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]

FinishReason = Literal["stop", "length", "cancelled"]


class TurnFailed(Exception):
    """This turn cannot go on; the engine and every other turn can."""


class EngineDead(Exception):
    """The engine cannot go on; its replica must be replaced and its conversations replayed."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Draw one token after the last token of a row.

    `turn` and `k` are the Philox counter; `history` is what penalties count: the retained token ids
    of the conversation, int32, oldest first.
    """

    params: SamplingParams
    turn: int
    k: int
    history: TokenIds


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation's share of a step: `tokens` at token_index `start`, `start` + 1, ...

    Tokens before `start` are already in `kv_slot`, except window tokens before `window_start`, which
    a bounded replay left out. `logits` asks for float32 [1, vocab] ("last") or [len(tokens), vocab]
    ("all").
    """

    kv_slot: int
    start: int
    tokens: TokenIds
    window: SinkWindow
    window_start: int = 0
    sample: SampleRequest | None = None
    logits: Literal["none", "last", "all"] = "none"


@dataclass(frozen=True, slots=True)
class SlotCopy:
    """Copy a whole kv_slot to a host slot ("save"), or back into a kv_slot, any ("restore")."""

    direction: Literal["save", "restore"]
    kv_slot: int
    host_slot: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Rows of different kv_slots: prefill chunks of at most `max_chunk` tokens and decode steps, mixed.

    `copies` have their effect before any row, one after another, also where every row fails.
    """

    rows: tuple[Row, ...]
    copies: tuple[SlotCopy, ...] = ()


@dataclass(frozen=True, slots=True)
class RowResult:
    """`token_id` if the row asked for a sample; `top` holds `params.top_logprobs` alternatives.

    `failed` says why this row's turn cannot go on (the loop makes it a TurnFailed); other rows can.
    """

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    top: tuple[TokenLogprob, ...] = ()
    logits: Logits | None = None
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """One result per row of the plan, in its order."""

    rows: tuple[RowResult, ...]


class Engine(Protocol):
    """Executes steps. Single-threaded: one thread calls `step`. Contract: `tests/engine_contract.py`."""

    @property
    def spec(self) -> EngineSpec: ...

    @property
    def max_resident(self) -> int:
        """Number of kv_slots: valid ids are 0 .. max_resident - 1."""
        ...

    def step(self, plan: StepPlan) -> StepResult:
        """Write the rows' K and V, attend, sample.

        A row that cannot go on says so in `RowResult.failed`. Raises TurnFailed when that holds for
        every row of the plan, EngineDead when no further step can work.
        """
        ...

    def close(self) -> None:
        """Free memory; idempotent."""
        ...


@runtime_checkable
class HasHostSlots(Protocol):
    """An engine that runs `StepPlan.copies`. Others refuse a plan that has any."""

    @property
    def host_slots(self) -> int:
        """Number of host slots: valid ids are 0 .. host_slots - 1."""
        ...


def num_host_slots(engine: Engine) -> int:
    """0 for an engine that has none."""
    return engine.host_slots if isinstance(engine, HasHostSlots) else 0
