"""Rules about the source that no linter knows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["engine_build", "engine", "cluster", "deployments"]
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
MAX_LINES = 500
# Ray's word and ONNX Runtime's, for what they hand us.
SESSION_ALLOWED = {"conversation_router.py", "service.py", "graph_run.py", "onnx_engine.py"}


def names_in(path: Path) -> Iterator[str]:
    """Every identifier that this module defines or uses, attributes included."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_modules_are_small_and_speak_the_vocabulary(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert "from __future__ import annotations" in text or path.name == "__init__.py"
    words = {word for name in names_in(path) for word in name.lower().split("_")}
    assert "pos" not in words
    if path.name not in SESSION_ALLOWED:
        assert "session" not in words


def test_the_rooms_are_packaged() -> None:
    import tomllib

    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    found = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for path in MODULES
        if path.name == "__init__.py"
    }
    assert found == set(packages)
