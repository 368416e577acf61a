"""A Hugging Face folder: config.json and safetensors, never pickle and never the model's own code.

Source of the file format: huggingface/safetensors README, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine_build.hf_config import Fields, shape_from_config, trained_tokens
from engine_build.spec import SpecError
from engine_build.tensors import Checkpoint, StoredTensor, Weights, select_tensors
from engine_build.tokenizer import text_from_folder

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
GENERATION_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_folder(folder: Path) -> Checkpoint:
    """Read a Hugging Face folder; weights stay on disk until asked for.

    Raises SpecError naming the file or field that is missing, damaged or unsupported.
    """
    config = read_json_object(folder / "config.json")
    shape = shape_from_config(config)
    stored: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        stored.update(read_safetensors(file))
    return Checkpoint(
        name=folder.resolve().name,
        shape=shape,
        tensors=select_tensors(shape, stored),
        text=text_from_folder(folder),
        trained_tokens=trained_tokens(config),
        generation=_generation(folder),
    )


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: those its index names, else the only one."""
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise SpecError(
            INDEX, f"is missing beside {len(files)} safetensors files", "Take the complete folder"
        )
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise SpecError(
            pickled[0],
            "is a pickle file, which can run code when it is read",
            "Use the model's safetensors files, or convert it with transformers' save_pretrained",
        )
    raise SpecError(
        "*.safetensors", f"no weights found in {folder}", "Take the complete folder, or a GGUF file"
    )


def _indexed_files(folder: Path) -> list[Path]:
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SpecError(f"{INDEX}: weight_map", "is missing", "Take the complete folder")
    names = sorted(set(weight_map.values()), key=str)
    for name in names:
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise SpecError(
                f"{INDEX}: weight_map",
                f"{name!r} is not a safetensors file of this folder",
                "Take the complete folder with its safetensors files",
            )
        if not (folder / name).is_file():
            raise SpecError(name, f"is named by {INDEX} but missing", "Take the complete folder")
    return [folder / name for name in names]


def read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, mapped rather than read.

    Raises SpecError naming the file for a damaged header, the tensor for one that is not float32,
    float16 or bfloat16.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(file, "its header is cut off")
        text = stream.read(header_bytes)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise _damaged(file, f"its header is not JSON: {error}") from error
    start = 8 + header_bytes
    stored = {}
    for name, entry in header.items():
        if name != "__metadata__":
            stored[name] = _stored_tensor(file, name, entry, (start, size))
    return stored


def _stored_tensor(file: Path, name: str, entry: Any, data: tuple[int, int]) -> StoredTensor:
    start, size = data
    try:
        dtype, (begin, end) = entry["dtype"], entry["data_offsets"]
        shape = tuple(int(length) for length in entry["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"the entry of {name} is not valid") from error
    if dtype not in ITEM_BYTES:
        raise SpecError(
            name, f"is stored as {dtype}", "Use a float32, float16 or bfloat16 checkpoint"
        )
    fits = 0 <= begin <= end <= size - start and end - begin == math.prod(shape) * ITEM_BYTES[dtype]
    if not fits:
        raise _damaged(file, f"{name} does not fit")

    def load() -> Weights:
        raw = np.memmap(file, dtype=np.uint8, mode="r", offset=start + begin, shape=(end - begin,))
        return _as_float32(raw, dtype).reshape(shape)

    return StoredTensor(shape=shape, load=load)


def _as_float32(raw: np.memmap[Any, Any], dtype: str) -> Weights:
    if dtype == "F32":
        return raw.view("<f4")
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _generation(folder: Path) -> Mapping[str, float]:
    path = folder / "generation_config.json"
    fields = Fields(read_json_object(path) if path.is_file() else {}, "generation_config.json: ")
    found = {
        name: fields.optional_number(name) for name in GENERATION_FIELDS if name in fields.values
    }
    return {name: value for name, value in found.items() if value is not None}


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises SpecError naming the file."""
    if not path.is_file():
        raise SpecError(path.name, f"not found in {path.parent}", "Take the complete folder")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpecError(path.name, f"not valid JSON: {error}", "Repair the file") from error
    if not isinstance(value, dict):
        raise SpecError(path.name, "is not a JSON object", "Repair the file")
    return value


def _damaged(file: Path, problem: str) -> SpecError:
    return SpecError(file.name, f"is damaged: {problem}", "Fetch the file again")
