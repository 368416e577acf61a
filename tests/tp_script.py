"""A process of its own that runs a tensor-parallel engine as rank 0: MPI may end it outright.

    python -m tests.tp_script ENGINE_DIR SCENARIO [OUT]

Prints one JSON line for each thing that happened.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import psutil

from engine.open_engine import EngineOptions, open_engine
from engine.protocol import (
    Engine,
    EngineDead,
    Logits,
    Row,
    SampleRequest,
    SlotCopy,
    StepPlan,
)
from engine.sampling import SamplingParams
from engine_build.manifest import SPEC
from engine_build.spec import EngineSpec, SpecError
from tests import tp_rank
from tests.engine_fixtures import feed, random_tokens, row_for, window_of
from tests.slot_copy_contract import HOST_SLOTS, SLOTS, SlotCopyContract

LENGTH, OFFSET = 160, 1_000_003
OPTIONS = EngineOptions(memory_budget_bytes=1 << 20, threads=1, host_memory_bytes=1 << 18)
SEEDED = SampleRequest(SamplingParams(seed=11), 2, 5, np.zeros(0, np.int32))


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def conversations(engine: Engine) -> dict[str, npt.NDArray[Any]]:
    """Logits of every way to run tokens: chunks through ring wraps, mixed rows, a bounded replay, a
    conversation that lost its kv_slot and came back from host memory."""
    window, chunk = window_of(engine.spec, 4), engine.spec.max_chunk
    tokens = random_tokens(7, LENGTH)
    found = {"chunks": feed(engine, tokens, row_for(window, 0), [1, 3, chunk, 7])}
    mixed: list[list[Logits]] = [[], []]
    length = [0, 0]
    for sizes in zip((1, chunk, 5, 1, 9, 1) * 3, (chunk, 1, 1, 7, 2, chunk) * 3, strict=True):
        rows = [
            Row(n + 1, length[n], tokens[length[n] : length[n] + count], window, logits="all")
            for n, count in enumerate(sizes)
        ]
        for n, result in enumerate(engine.step(StepPlan(tuple(rows))).rows):
            assert result.logits is not None
            mixed[n].append(result.logits)
            length[n] += sizes[n]
    found |= {f"mixed{n}": np.concatenate(part) for n, part in enumerate(mixed)}
    # Only the sinks and what comes after `OFFSET` are replayed, into a slot that held something else.
    feed(engine, tokens[:4], row_for(window, 1), [4])
    row = row_for(window, 1, OFFSET, OFFSET)
    found["replay"] = feed(engine, tokens[:90], row, [chunk, 1])
    # Its kv_slot goes to another; it comes back to a third, with a step of its own for each copy or not.
    engine.step(StepPlan((), (SlotCopy("save", 1, 0),)))
    feed(engine, tokens, row_for(window, 1), [chunk])
    row = Row(0, OFFSET + 90, tokens[90:95], window, OFFSET, logits="all")
    (back,) = engine.step(StepPlan((row,), (SlotCopy("restore", 0, 0),))).rows
    assert back.logits is not None
    found["restored"] = back.logits
    drawn = [
        engine.step(StepPlan((Row(2, 0, tokens[:count], window, sample=SEEDED),))).rows[0].token_id
        for count in (1, 2, 3, 9, 12)
    ]
    found["sampled"] = np.array(drawn)
    return found


def forever(engine: Engine) -> None:
    """Decode until something happens."""
    window, tokens = window_of(engine.spec, 4), random_tokens(1, 1)
    index = 0
    try:
        while True:
            engine.step(StepPlan((Row(0, index, tokens, window, logits="last"),)))
            index += 1
            if index == 5:
                tell(running=True)
            if index == 30:
                tell(went_on=True)
    except EngineDead as error:
        tell(dead=str(error), at=time.monotonic())
        engine.close()
        time.sleep(60)


def opened(engine_dir: Path, scenario: str, argument: str) -> Engine:
    if scenario == "copies":
        spec = EngineSpec.from_json((engine_dir / SPEC).read_text(encoding="utf-8"))
        budgets = (count * spec.slot_bytes for count in (SLOTS, HOST_SLOTS))
        return open_engine(
            engine_dir, EngineOptions(next(budgets), host_memory_bytes=next(budgets))
        )
    if scenario not in ("deadline", "trouble"):
        return open_engine(engine_dir, OPTIONS)
    from engine import ranks
    from engine.rank_executors import RankOptions, open_executor

    options = RankOptions(str(engine_dir), 1 << 20)
    if scenario == "deadline":
        # Nobody looks after processes that do not move: the wait inside a step is what ends it.
        return ranks.TensorParallelEngine(options, ranks.RankTimeouts(rank_s=600, step_s=1))
    group = functools.partial(ranks.RankGroup, module=tp_rank.__name__)
    opener = functools.partial(tp_rank.open_troubled, whole=open_executor)
    with patch.object(ranks, "RankGroup", group), patch.object(ranks, "open_executor", opener):
        return ranks.TensorParallelEngine(options, ranks.RankTimeouts(**json.loads(argument)))


def check_copies(engine: Engine) -> None:
    """The suite of slot_copy_contract.py, in the process that has the engine."""
    contract = SlotCopyContract()
    names = [name for name in dir(contract) if name.startswith("test_")]
    for name in names:
        getattr(contract, name)(engine)
    engine.close()
    tell(passed=names)


def main(engine_dir: Path, scenario: str, out: str) -> None:
    try:
        engine = opened(engine_dir, scenario, out)
    except (EngineDead, SpecError) as error:
        tell(refused=str(error))
        return
    programs = {"engine.ranks", "tests.tp_rank"}
    ranks = [p.pid for p in psutil.Process().children(True) if programs & set(p.cmdline())]
    tell(pid=os.getpid(), ranks=ranks, max_resident=engine.max_resident)
    if scenario == "compute":
        np.savez(out, **conversations(engine))  # type: ignore[arg-type]
        try:
            engine.step(
                StepPlan(
                    (Row(engine.max_resident, 0, random_tokens(1, 1), window_of(engine.spec, 4)),)
                )
            )
        except ValueError as error:
            tell(refused=str(error))
        engine.close()
        engine.close()
        tell(closed=True)
        time.sleep(1.0)  # long enough for a launcher that would end us
        tell(lived=True)
    elif scenario == "copies":
        check_copies(engine)
    elif scenario == "idle":
        time.sleep(float(out))
        tell(idle=True)
        forever(engine)
    else:
        forever(engine)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "")
