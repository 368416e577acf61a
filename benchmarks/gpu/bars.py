"""The bars of the GPU engines: what must be shown, evaluated on what was measured. Pure.

1. decode at batch 1: at least 5 times StreamingLLM as published, in interleaved runs
2. decode at batch 1: at least 85% of the bandwidth roofline
3. prefill: at least 60% of the measured rate of matrix products
4. time per token at ages from 1,000 to 4,000,000: within 2%
5. decode at larger batches: at least 80% of the roofline
6. correctness: every check passed, every wrong rule failed
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

STREAMING_RATIO = 5.0
BATCH_1_ROOFLINE = 0.85
BATCHED_ROOFLINE = 0.80
PREFILL_RATE = 0.60
AGE_SPREAD = 0.02


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar at one point: `value` against `bar`. `at_least` says which side is good."""

    name: str
    point: str
    value: float
    bar: float
    at_least: bool = True

    @property
    def passed(self) -> bool:
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "pass" if self.passed else "FAIL"
        return f"{verdict}  {self.name}, {self.point}: {self.value:.3g} (bar {sign} {self.bar:g})"


def evaluate(sections: Mapping[str, Any]) -> list[Bar]:
    """Bars of all that was measured, in the order above; what was not measured has none."""
    found: dict[str, list[Bar]] = {"versus": [], "decode": [], "prefill": [], "age": []}
    found["correctness"] = []
    for key, result in sections.items():
        section = key.split("/", 1)[0]
        if section == "versus":
            found[section].extend(_versus(result))
        elif section == "decode":
            found[section].extend(_decode(result))
        elif section == "prefill":
            found[section].extend(_prefill(result))
        elif section == "age":
            spread = result["spread"]
            found[section].append(
                Bar("ms per token over age, largest gap", _point(result), spread, AGE_SPREAD, False)
            )
        elif section == "correctness":
            found[section].extend(_correctness(result))
    return [bar for bars in found.values() for bar in bars]


def on(result: Mapping[str, Any]) -> str:
    """ " on TensorRT-RTX" where a result is of that engine; nothing for the CUDA engine."""
    return " on TensorRT-RTX" if result.get("target") == "tensorrt-rtx" else ""


def _point(result: Mapping[str, Any], *more: str) -> str:
    return ", ".join([f"{result['model']} at capacity {result['capacity']}{on(result)}", *more])


def _versus(result: Mapping[str, Any]) -> Iterator[Bar]:
    if result["peer"] == "streaming_llm":
        point = _point(result, "batch 1")
        yield Bar("speed over StreamingLLM as published", point, result["ratio"], STREAMING_RATIO)


def _decode(result: Mapping[str, Any]) -> Iterator[Bar]:
    for row in result["points"]:
        single = row["batch"] == 1
        name = "decode, share of the roofline"
        bar = BATCH_1_ROOFLINE if single else BATCHED_ROOFLINE
        yield Bar(name, _point(result, f"batch {row['batch']}"), row["of_roofline"], bar)


def _prefill(result: Mapping[str, Any]) -> Iterator[Bar]:
    name = "prefill, share of the matmul rate"
    yield Bar(name, _point(result), result["of_matmul_rate"], PREFILL_RATE)


def _correctness(result: Mapping[str, Any]) -> Iterator[Bar]:
    for check in result["checks"]:
        point = f"{result['model']} {result['weight_format']}{on(result)}: {check['name']}"
        yield Bar("error", point, check["error"], check["bar"], bool(check.get("at_least", False)))
