"""Triton kernels on a machine without a GPU: the interpreter, and how tests drive the kernels with it.

Import this before triton: kernels are interpreted only if the variable is set by then.
"""

from __future__ import annotations

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"
torch = pytest.importorskip("torch")
pytest.importorskip("triton")
