"""The results of a run: one JSON document, written anew after each section. A timeout loses nothing."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import machine

FORMAT = 1


class WrongResults(ValueError):
    """A file to resume from that does not belong to this run; the message says what to do."""


@dataclass(slots=True)
class Results:
    """`document["sections"][key of a task]` is what it measured; `["failed"]`, `["skipped"]` say why not;
    `["calls"]` has the arguments and the device of each call that added to it.

    `failed_before`: keys of what failed in the call that this one resumes.
    """

    path: Path
    document: dict[str, Any]
    failed_before: frozenset[str] = frozenset()

    @classmethod
    def new(cls, folder: Path, device: dict[str, Any], arguments: Sequence[str] = ()) -> Results:
        """`folder`/gpu-CARD-DATE.json; one that is there already is kept under another name."""
        day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        folder.mkdir(parents=True, exist_ok=True)
        card = "".join(c if c.isalnum() else "-" for c in str(device["name"]).lower()).strip("-")
        document = {
            "benchmark": "gpu",
            "format": FORMAT,
            "date": day,
            "machine": f"{device['name']}; {machine()}",
            "device": device,
            "calls": [_call(device, arguments)],
            "sections": {},
            "failed": {},
            "skipped": {},
            "bars": [],
        }
        path = folder / f"gpu-{card}-{day}.json"
        if path.exists():
            changed = int(path.stat().st_mtime)
            path.replace(path.with_name(f"before-{changed}-{path.name}"))
        return cls(path, document)

    @classmethod
    def resumed(
        cls,
        earlier: dict[str, Any],
        path: Path,
        device: dict[str, Any],
        arguments: Sequence[str] = (),
    ) -> Results:
        """Go on from `earlier`, a document of the same card, writing it to `path`. Figures of two cards are
        not mixed: see `card_of`."""
        failed = frozenset(earlier["failed"])
        earlier["failed"], earlier["skipped"] = {}, {}
        earlier.setdefault("calls", []).append(_call(device, arguments))
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls(path, earlier, failed)

    @property
    def done(self) -> set[str]:
        return set(self.document["sections"])

    def section(self, key: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.document["sections"].get(key)
        return found

    def save(self) -> None:
        """Replace the file in one step."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.document, indent=2) + "\n")
        os.replace(part, self.path)


def read_document(path: Path) -> dict[str, Any]:
    """The document of an earlier call. Raises WrongResults for a file that is none."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WrongResults(f"{path}: {error}. Start without --resume") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise WrongResults(f"{path} is no result of this version. Start without --resume")
    return document


def card_of(document: dict[str, Any]) -> str:
    """The name of the card that a document is of."""
    return str(document["device"]["name"])


def _call(device: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """One call: when it began, of what, on what. Two machines of one kind may differ in their driver."""
    now = datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
    return {"began": now, "arguments": list(arguments), "device": device}
