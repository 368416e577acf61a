"""A result of benchmarks.gpu.run with round figures, as if a card had been measured."""

from __future__ import annotations

from typing import Any

SPREAD = {"ms": 4.0, "ms_p10": 3.9, "ms_p90": 4.2, "samples": 100}
TILING = {"block_m": 16, "keys": 64, "splits": 8, "num_warps": 4, "num_stages": 3}
POINT = {
    "model": "llama-3-8b",
    "capacity": 2048,
    "max_chunk": 512,
    "weight_format": "bfloat16",
}


def sample_document() -> dict[str, Any]:
    return {
        "benchmark": "gpu",
        "format": 1,
        "date": "2026-11-27",
        "machine": "Imaginary Card; some processor, 16 cores",
        "device": {
            "name": "Imaginary Card",
            "driver": "1.2",
            "l2_bytes": 50 << 20,
            "versions": {"python": "3.12.3", "torch": "2.11.0"},
        },
        "sections": _sections(),
        "failed": {"versus/llama-3-8b/peer=static_compile/capacity=1024": "compile | broke"},
        "skipped": {"age/qwen2.5-0.5b": "no time left: go on with --resume"},
        "bars": [],
    }


def _sections() -> dict[str, Any]:
    return {
        "limits/all": {
            "copy_bytes_per_s": 3.0e12,
            "read_bytes_per_s": 3.1e12,
            "matmul_operations_per_s": 7.5e14,
            "matmul_side": 8192,
            "launch_eager_s": 3e-6,
            "launch_graph_s": 1e-6,
        },
        "correctness/llama-3-8b/format=bfloat16": {
            **POINT,
            "checks": [
                {"name": "mixed chunks", "error": 0.01, "bar": 0.08},
                {"name": "no sinks", "error": 20.0, "bar": 3.0, "at_least": True},
            ],
        },
        "versus/llama-3-8b/peer=streaming_llm/capacity=2048": {
            **POINT,
            "peer": "streaming_llm",
            "peer_dtype": "torch.float16",
            "ours": {**SPREAD, "tokens_per_s": 250.0},
            "theirs": {**SPREAD, "tokens_per_s": 40.0},
            "ratio": 6.25,
        },
        "decode/llama-3-8b/capacity=2048": {
            **POINT,
            "slots": 64,
            "points": [
                {**_decode(1), "of_roofline": 0.9},
                {**_decode(64), "of_roofline": 0.7},
            ],
            "skipped": [{"batch": 256, "reason": "256 kv_slots do not fit"}],
        },
        "prefill/llama-3-8b/capacity=2048": {
            **POINT,
            **SPREAD,
            "chunk": 512,
            "tokens_per_s": 30_000.0,
            "of_matmul_rate": 0.65,
        },
        "age/llama-3-8b/capacity=2048": {
            **POINT,
            "ages": [{**SPREAD, "age": age} for age in (10_000, 4_000_000)],
            "spread": 0.03,
        },
        "restore/llama-3-8b/capacity=2048": {
            **POINT,
            "slot_bytes": 300 << 20,
            "replay": [{**SPREAD, "windows": n, "steps": 4 * n} for n in (1, 4)],
            "copy": {"save": SPREAD, "restore": SPREAD},
        },
        "variant/llama-3-8b/tune=True/overlap=False": {
            **POINT,
            "tune": True,
            "overlap": False,
            "batches": [{"batch": 1, **SPREAD}],
            "mean_ms": 4.0,
            "choices": {"a": "library"},
        },
        "variant/llama-3-8b/tune=False/overlap=True": {
            **POINT,
            "tune": False,
            "overlap": True,
            "batches": [{"batch": 1, **SPREAD}],
            "mean_ms": 4.5,
            "choices": {},
        },
        "attention/llama-3-8b/capacity=2048": {
            **POINT,
            "attention": [
                {
                    "batch": 1,
                    "limit_ms": 0.003,
                    "own": {**TILING, **SPREAD},
                    "best": {**TILING, **SPREAD},
                    "tried": [{**TILING, **SPREAD}, {**TILING, "refused": "shared memory"}],
                }
            ],
        },
        "tensorrt_sm90/all/engine=tensorrt": {
            "library": {"version": "1.7.1", "from": "carried", "names": ["8.9"]},
            "gpu": {"name": "Imaginary Card", "compute_capability": "9.0"},
            "runs": ["for the GPU that is here"],
            "capabilities": ["current"],
            "plans": [
                {
                    "way": "for the GPU that is here",
                    "plan_bytes": 11_000,
                    "valid": "EngineValidity.VALID",
                    "opens": True,
                    "right": True,
                    "said": [],
                },
                {
                    "way": "9.0, asked for by number",
                    "plan_bytes": None,
                    "said": ["not | supported", "in\ncapability"],
                },
                {"way": "8.9 alone", "ended": "the process ended with code -6"},
            ],
        },
        "decode/llama-3-8b/engine=tensorrt/capacity=2048": {
            **POINT,
            "target": "tensorrt-rtx",
            "slots": 64,
            "points": [{**_decode(1), "of_roofline": 0.5}],
            "skipped": [],
            "plan": {
                "plan_bytes": 20_000_000,
                "plan_for": "current",
                "build_s": 30.0,
                "open_s": 2.0,
            },
        },
        "overheads/llama-3-8b/capacity=2048": {
            **POINT,
            "batches": [{"batch": 1, "sampling": {"greedy": SPREAD}, "without_graphs": SPREAD}],
        },
    }


def _decode(batch: int) -> dict[str, Any]:
    return {
        **SPREAD,
        "batch": batch,
        "tokens_per_s": batch * 250.0,
        "limit_ms": 3.6,
        "bound": "bandwidth",
    }
