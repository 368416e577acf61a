"""The chaos run's toy on tensor-parallel ranks: they share its steps, so none gets on without the others."""

from __future__ import annotations

import numpy as np

from engine.collective import Collective
from engine.plan_codec import encode_plan
from engine.protocol import Engine, RowResult, StepPlan, StepResult
from engine.rank_executors import RankOptions, SlotCounts
from engine.ranks import RankGroup, RankTimeouts, main
from engine.toy_engine import byte_spec
from engine_build.spec import EngineSpec

NUM_RANKS = 2


class RankedToy:
    """Rank 0's: `toy` computes what the others only agree to."""

    def __init__(self, toy: Engine) -> None:
        self._toy = toy
        options = RankOptions("", memory_budget_bytes=None)
        self._group = RankGroup(NUM_RANKS, options, RankTimeouts(), module=__name__)
        self._group.ready(SlotCounts(toy.max_resident))

    @property
    def spec(self) -> EngineSpec:
        return self._toy.spec

    @property
    def max_resident(self) -> int:
        return self._toy.max_resident

    def step(self, plan: StepPlan) -> StepResult:
        """See `Engine.step`."""
        self._group.send(encode_plan(plan))
        agree(self._group.collective, plan)
        return self._toy.step(plan)

    def close(self) -> None:
        """See `Engine.close`."""
        self._toy.close()
        self._group.close()


def agree(collective: Collective, plan: StepPlan) -> None:
    """Add up something of the plan: every rank must have the same one."""
    mine = float(sum(int(row.tokens.sum()) % 1000 for row in plan.rows))
    total = np.array([mine], np.float32)
    collective.all_reduce(total)
    if float(total[0]) != collective.size * mine:
        raise RuntimeError("the ranks run different plans")


class OtherRank:
    """What another rank runs."""

    def __init__(self, collective: Collective) -> None:
        self.spec = byte_spec(64, 16)
        self.max_resident = 1 << 20
        self._collective = collective

    def step(self, plan: StepPlan) -> StepResult:
        """See `Engine.step`."""
        agree(self._collective, plan)
        return StepResult(tuple(RowResult() for _ in plan.rows))

    def close(self) -> None:
        """See `Engine.close`."""


def open_other(options: RankOptions, collective: Collective) -> Engine:
    """This rank's part; it has no options."""
    return OtherRank(collective)


if __name__ == "__main__":
    main(open_other)
