"""The folder of the demonstration: nothing else is begun in or deleted, and a run goes on as it was begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddlm.cli import main
from ddlm.commands import demo_folder


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["demo", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("name", ["config.yaml", "thesis.txt"])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_folder_that_no_demonstration_wrote_is_left_alone(
    fresh: bool, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by one begun in it: --fresh would delete the folder's other files with the demonstration."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / name).write_text("train: {}\n")
    line = refused(capsys, "--out", str(precious), "--model", "none", *["--fresh"] * fresh)
    assert "it has no demo.json" in line
    assert "name another --out" in line
    assert [p.name for p in precious.iterdir()] == [name]


def test_fresh_deletes_a_demonstration_also_one_with_a_broken_note(tmp_path: Path) -> None:
    run, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(run)
    demo_folder.empty(run)  # nothing there, nothing to delete
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    (run / demo_folder.NOTE).write_text("{")
    assert demo_folder.choose("none", link, fresh=True) is None
    demo_folder.empty(link)
    assert list(run.iterdir()) == []
    assert link.is_symlink()


def test_what_an_interrupted_deletion_leaves_is_still_a_demonstration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    demo_folder.write_note(tmp_path, None, 0)
    (tmp_path / "samples").mkdir()
    monkeypatch.setattr("shutil.rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo_folder.empty(tmp_path)
    assert demo_folder.choose("none", tmp_path, fresh=True) is None


def test_fresh_deletes_nothing_when_the_model_does_not_load_or_lies_in_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo_folder.write_note(tmp_path, None, 0)
    (tmp_path / "samples").mkdir()
    options = ["--out", str(tmp_path), "--fresh", "--model"]
    assert "does not exist" in refused(capsys, *options, str(tmp_path / "no"))
    line = refused(capsys, *options, str(tmp_path))
    assert line == (
        f"error: --fresh would delete {tmp_path}, the model to start from: name another --out"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.json", "samples"]


def test_a_file_is_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    line = refused(capsys, "--out", str(tmp_path / "file"), "--model", "none")
    assert "is no folder: name another" in line


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"model": 3}', '{"model": "none", "seed": "x"}']
)
def test_a_broken_note_is_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / demo_folder.NOTE).write_text(text)
    line = refused(capsys, "--out", str(tmp_path))
    assert "demo.json is damaged" in line
    assert "--fresh" in line


def test_another_seed_does_not_go_on_with_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo_folder.write_note(tmp_path, None, 3)
    line = refused(capsys, "--out", str(tmp_path), "--seed", "4")
    assert "was begun with --seed 3, not 4" in line
    assert demo_folder.choose(None, tmp_path, 3) is None
    # A run from before the seed was kept goes on with any.
    (tmp_path / demo_folder.NOTE).write_text('{"model": "none"}')
    assert demo_folder.choose(None, tmp_path, 4) is None
