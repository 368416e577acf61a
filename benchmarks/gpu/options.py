"""Which options of the engines the rest of a run uses, by what was measured. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def chosen_options(sections: Mapping[str, Any], model: str) -> dict[str, Any]:
    """`overlap` and `choices` of `CudaOptions`: those of the variant with the shortest mean step.

    A model without variants of its own takes `overlap` from those of another. Choices are keyed by the
    layers' shapes, so those of all models go together. Nothing measured: nothing chosen.
    """
    variants = [found for key, found in sections.items() if key.startswith("variant/")]
    if not variants:
        return {}
    own = [found for found in variants if found["model"] == model] or variants
    best = min(own, key=lambda found: found["mean_ms"])
    choices: dict[str, str] = {}
    for name in {found["model"] for found in variants}:
        theirs = [found for found in variants if found["model"] == name]
        choices |= min(theirs, key=lambda found: found["mean_ms"])["choices"]
    return {"overlap": best["overlap"], "choices": choices}


def plan_capabilities(sections: Mapping[str, Any]) -> list[str] | None:
    """What TensorRT's plans are to be built for on this card, as the probe found out.

    An empty list is the library's own choice; None: nothing runs here. Raises KeyError where it was not
    probed.
    """
    for key, found in sections.items():
        if key.startswith("tensorrt_sm90/"):
            capabilities: list[str] | None = found["capabilities"]
            return capabilities
    raise KeyError("tensorrt_sm90")
