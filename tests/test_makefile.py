"""What `make` installs, and when."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_other_extras_are_another_installation(root: Path, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    shutil.copyfile(root / "Makefile", tmp_path / "Makefile")

    def installs(*options: str) -> list[str]:
        run = subprocess.run(
            ["make", "-n", "setup", *options],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return [line.split()[-1] for line in run.stdout.splitlines() if "pip install" in line]

    assert installs() == ["'.[plots]'"]
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".stamp.plots").touch()
    assert installs() == []
    assert installs("EXTRAS=serve,plots") == ["'.[serve,plots]'"]
    assert installs("EXTRAS=") == ["'.'"]
