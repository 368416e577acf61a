"""Model in: a Hugging Face folder or a GGUF file, read without running anything that it brings."""

from __future__ import annotations

from pathlib import Path

from engine_build.gguf_checkpoint import read_gguf
from engine_build.hf_checkpoint import PICKLE_SUFFIXES, read_folder
from engine_build.spec import SpecError
from engine_build.tensors import Checkpoint


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a model; its weights are loaded tensor by tensor, when asked for.

    Raises SpecError naming the file, field or tensor that is missing, damaged or unsupported.
    """
    if path.is_dir():
        return read_folder(path)
    if not path.exists():
        raise SpecError(
            "model",
            f"{path} does not exist",
            "Give a Hugging Face folder or a .gguf file on this machine",
        )
    if path.suffix in PICKLE_SUFFIXES:
        raise SpecError(
            path.name,
            "is a pickle file, which can run code when it is read",
            "Give a folder with safetensors files, or a .gguf file",
        )
    if path.suffix == ".safetensors":
        raise SpecError(
            path.name, "is only a part of a model", "Give the folder that holds it and config.json"
        )
    return read_gguf(path)
