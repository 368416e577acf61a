"""The report of a verification in an engine directory, and whether the engine may serve.

    verify.json   what was found, of which files, under which libraries, on which GPU

A CPU engine serves without one, for its operators check themselves on every machine; only a report that
says FAILED stops it. Engines for GPUs serve with a passed report alone, of these files and this machine.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.verify_figures import Verification
from engine_build.files import sha256_of, write_atomically
from engine_build.libraries import target_versions
from engine_build.manifest import MANIFEST, load_manifest
from engine_build.spec import EngineSpec

REPORT = "verify.json"
REPORT_VERSION = 1


class NotVerified(ValueError):
    """An engine that may not serve. The message says why and which command to run."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What a verification was of: the fingerprint of engine and window, the files, and what computed.

    `libraries` are versions by module name; `gpus` the names of this machine's GPUs, each once.
    """

    fingerprint: str
    manifest_sha256: str
    libraries: dict[str, str]
    gpus: tuple[str, ...]

    @classmethod
    def of(cls, engine_dir: Path, spec: EngineSpec, gpus: tuple[str, ...]) -> Verified:
        """What one would be of now. Raises ManifestError."""
        return cls(
            fingerprint=load_manifest(engine_dir).fingerprint(spec),
            manifest_sha256=sha256_of(engine_dir / MANIFEST),
            libraries=target_versions(spec.target),
            gpus=gpus if spec.target != "cpu" else (),
        )


def write_report(
    path: Path, verified: Verified, found: Verification, about: dict[str, Any]
) -> dict[str, Any]:
    """Write the report to `path`, by atomic rename, and return it. `about` goes in as it is: date,
    text, seconds, engine."""
    report = {
        "version": REPORT_VERSION,
        "passed": not found.problems,
        "problems": list(found.problems),
        "verified": dataclasses.asdict(verified),
        **about,
        "findings": dataclasses.asdict(found),
    }
    write_atomically(path, json.dumps(report, indent=2) + "\n")
    return report


def check_verified(engine_dir: Path, spec: EngineSpec, now: Verified | None = None) -> None:
    """Raises NotVerified unless the engine may serve with this spec (a changed capacity is another engine).

    `now` is `Verified.of` on the machine that is to serve; None leaves its libraries and GPUs out, where
    the machine that asks is another.
    """
    path = engine_dir / REPORT
    if not path.is_file():
        if spec.target == "cpu":
            return
        raise _refusal(
            engine_dir, spec, f"it has no {REPORT}: an engine for {spec.target} needs one"
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["version"] != REPORT_VERSION:
            raise _refusal(engine_dir, spec, f"its {REPORT} is of another release")
        passed, problems, of = bool(report["passed"]), report["problems"], report["verified"]
        then = Verified(
            of["fingerprint"], of["manifest_sha256"], dict(of["libraries"]), tuple(of["gpus"])
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, NotVerified):
            raise
        raise _refusal(engine_dir, spec, f"its {REPORT} is damaged ({error!r})") from error
    stale = _stale(then, now or dataclasses.replace(then, **_files(engine_dir, spec)))
    if spec.target == "cpu":
        if passed or stale:
            return
    elif stale:
        raise _refusal(engine_dir, spec, f"its {REPORT} is of {stale}")
    if not passed:
        first = problems[0] if problems else "no reason is given"
        raise _refusal(engine_dir, spec, f"its verification failed ({first})")


def _files(engine_dir: Path, spec: EngineSpec) -> dict[str, Any]:
    now = Verified.of(engine_dir, spec, ())
    return {"fingerprint": now.fingerprint, "manifest_sha256": now.manifest_sha256}


def _stale(then: Verified, now: Verified) -> str:
    """What has changed since, "" if nothing."""
    if then.manifest_sha256 != now.manifest_sha256:
        return "another build"
    if then.fingerprint != now.fingerprint:
        return "another capacity"
    for name, version in now.libraries.items():
        if then.libraries.get(name, "") != version:
            return f"{name} {then.libraries.get(name) or '(none)'}, this machine has {version or 'none'}"
    if then.gpus != now.gpus:
        return (
            f"{', '.join(then.gpus) or 'no GPU'}, this machine has {', '.join(now.gpus) or 'none'}"
        )
    return ""


def _refusal(engine_dir: Path, spec: EngineSpec, problem: str) -> NotVerified:
    command = f"sinkserve verify {engine_dir} --capacity {spec.capacity}"
    return NotVerified(f"{engine_dir}: {problem}. Run: {command}")
