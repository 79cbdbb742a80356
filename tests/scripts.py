"""The scripts of ``benchmarks`` in the tests' own process: one of their own takes seconds to import what they need."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load_script(path: Path) -> ModuleType:
    """A script as a module; nothing of its ``main`` is run."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(path: Path, *arguments: str, cwd: Path) -> int:
    """``python path arguments`` in the folder ``cwd``: its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(path), *arguments])
        status = load_script(path).main()
    assert isinstance(status, int)
    return status
