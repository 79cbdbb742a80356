"""A demonstration that is gone on with from another working directory than it was begun in."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddlm.commands import demo_folder
from ddlm.commands.demo_folder import SHIPPED, choose, write_note


def test_the_shipped_weights_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, out = tmp_path / "checkout", tmp_path / "out"
    for folder in (checkout / SHIPPED, checkout / "src/ddlm/commands", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    (checkout / SHIPPED / "manifest.json").write_text("{}")
    monkeypatch.setattr(demo_folder, "__file__", str(checkout / "src/ddlm/commands/demo_folder.py"))
    monkeypatch.chdir(checkout)
    write_note(out, choose(None, out), seed=0)
    assert choose(None, out) == str(SHIPPED)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert choose(None, out) == str(checkout / SHIPPED)
    assert choose(str(checkout / SHIPPED), out) == str(checkout / SHIPPED), "named, it is the same"
