from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from engine_build.hf_config import shape_from_config
from engine_build.spec import EngineSpec, SpecError
from tests.tiny_models import FAMILIES, tiny_config


def tiny_spec(family: str = "llama", **changes: Any) -> EngineSpec:
    spec = EngineSpec(shape_from_config(tiny_config(family)), capacity=32, max_chunk=16)
    return dataclasses.replace(spec, **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spec_survives_its_file(family: str) -> None:
    spec = tiny_spec(family, weight_format="float32", rewind_tokens=3)
    assert EngineSpec.from_json(spec.to_json()) == spec


def test_memory_is_counted_exactly() -> None:
    spec = tiny_spec(capacity=100, rewind_tokens=4)
    assert spec.slot_tokens == 104
    # K and V, 3 layers, 2 key/value heads, 104 places in 7 tiles of 16, 16 dimensions, 2 bytes
    assert spec.slot_bytes == 2 * 3 * 2 * 112 * 16 * 2
    assert dataclasses.replace(spec, kv_dtype="float32").slot_bytes == 2 * spec.slot_bytes
    odd = dataclasses.replace(spec, model=dataclasses.replace(spec.model, head_dim=24))
    assert odd.slot_bytes == 2 * spec.slot_bytes  # 24 dimensions take two tiles
    assert spec.max_sink_tokens == 50


def test_every_field_is_part_of_the_fingerprint() -> None:
    spec = tiny_spec()
    model = spec.model
    others = [
        tiny_spec(capacity=33),
        tiny_spec(max_chunk=15),
        tiny_spec(weight_format="float32"),
        tiny_spec(kv_dtype="float32"),
        tiny_spec(model=dataclasses.replace(model, tied_head=True)),
        tiny_spec(
            model=dataclasses.replace(model, rope=dataclasses.replace(model.rope, theta=2.0))
        ),
    ]
    assert len({other.fingerprint for other in [spec, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"capacity": 7}, "capacity"),
        ({"max_chunk": 0}, "max_chunk"),
        ({"weight_format": "int4"}, "weight_format"),
        ({"kv_dtype": "int8"}, "kv_dtype"),
    ],
)
def test_an_impossible_spec_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as refused:
        tiny_spec(**changes)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["version"], 1, "spec.version"),
        (["version"], None, "spec.version"),
        (["capacity"], 3, "capacity"),
        (["capacity"], "many", "spec.json"),
        (["model"], None, "spec.json"),
        (["model", "rope"], None, "spec.json"),
        (["model", "rope", "scaling_of_tomorrow"], 1.0, "spec.json"),
        (["of_tomorrow"], 1, "spec.json"),
    ],
)
def test_a_damaged_spec_file_is_refused(path: list[str], value: Any, field: str) -> None:
    fields: dict[str, Any] = json.loads(tiny_spec().to_json())
    place = fields
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(SpecError) as refused:
        EngineSpec.from_json(json.dumps(fields))
    assert refused.value.field == field


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_file_that_is_no_spec_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"spec\.json"):
        EngineSpec.from_json(text)
