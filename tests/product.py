"""Checkpoints of tiny models and engine directories for every target, as `sinkserve build` makes them.

Imports neither torch nor triton: an engine may be opened by another process.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from engine_build.build import BuildOptions, build_engine
from engine_build.spec import Target, WeightFormat
from tests.tiny_models import tiny_config, tiny_tensors, write_hf_folder

CAPACITY, MAX_CHUNK = 32, 16


def write_calm_model(folder: Path, family: str = "llama", num_layers: int = 2) -> Path:
    """A checkpoint whose attention is as flat as a trained model's, so that 16-bit formats stay within what
    `sinkserve verify` allows them."""
    config = tiny_config(family) | {"num_hidden_layers": num_layers}
    tensors = {}
    for name, values in tiny_tensors(family).items():
        if name.startswith("model.layers.") and int(name.split(".")[2]) >= num_layers:
            continue
        sharp = name.endswith(("q_proj.weight", "k_proj.weight"))
        tensors[name] = values * np.float32(0.5) if sharp else values
    return write_hf_folder(folder, family, config=config, tensors=tensors)


def build_calm(
    folder: Path,
    target: Target = "cuda",
    weight_format: WeightFormat = "float32",
    *,
    family: str = "llama",
    tp_size: int = 1,
    capacity: int = CAPACITY,
) -> Path:
    """The engine directory of a calm model, built beside its checkpoint in `folder`."""
    model = folder / f"model-{family}"
    if not model.exists():
        write_calm_model(model, family)
    options = BuildOptions(capacity, MAX_CHUNK, weight_format, target, tp_size)
    return build_engine(model, folder / f"{target}-{weight_format}-{family}-{tp_size}", options)


def doctored(engine_dir: Path, **verified: object) -> None:
    """Change what verify.json says it is of."""
    path = engine_dir / "verify.json"
    report = json.loads(path.read_text())
    report["verified"] |= verified
    path.write_text(json.dumps(report))
