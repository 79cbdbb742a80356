"""What :func:`ddlm.files.write_folder` does with a folder that is already there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddlm.files import verify_files, write_folder
from ddlm.types import ConfigError


def write(folder: Path, **files: str) -> None:
    def fill(new: Path) -> None:
        for name, text in files.items():
            (new / name).write_text(text)

    write_folder(folder, fill)


def test_files_of_others_stay_beside_a_new_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(folder, weights="1", index="1")
    for name in ("notes.txt", ".git/config", "plots/loss.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    write(folder, weights="2")
    verify_files(folder)
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {"manifest.json", "weights", "notes.txt", ".git/config", "plots/loss.png"}
    assert (folder / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("mine")
    with pytest.raises(ConfigError, match=r"something else than a model \(weights\)"):
        write(tmp_path, weights="2")
    assert (tmp_path / "weights").read_text() == "mine"


def test_a_folder_of_hidden_files_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/.gitattributes").write_text("mine")
    write(tmp_path / "model", weights="2")
    assert (tmp_path / "model/.gitattributes").read_text() == "mine"
    verify_files(tmp_path / "model")
