"""The prepared text of a study: named later, missing, too short, of another tokenizer; what that leaves of a study."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from analysis.test_mixture import SHORT, change, exported
from analysis.test_study import refused
from ddlm import study as study_module
from ddlm.analysis import record
from ddlm.analysis.gallery import Study as Drawing
from ddlm.checkpoint import find_model
from ddlm.data.prepare import prepare
from ddlm.data.shards import TokenShards
from ddlm.study import Recording, Study
from ddlm.types import ConfigError
from training.runs import shards_in


@pytest.fixture(scope="module")
def text(small_run: Path) -> Path:
    """The shards that the model was trained on."""
    return small_run.parent / "data"


@pytest.fixture(scope="module")
def alone(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose text is not at hand."""
    return exported(small_run, tmp_path_factory.mktemp("alone") / "m", data="nowhere")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of another tokenizer."""
    return shards_in(tmp_path_factory.mktemp("foreign"), vocab_size=280).folder


@pytest.fixture(scope="module")
def nothing_held_out(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the model's tokenizer without a held-out document."""
    folder = tmp_path_factory.mktemp("train-only") / "data"
    source, model = small_run.parent / "text.jsonl", find_model(small_run)
    prepare(str(source), folder, tokenizer=str(model), val_fraction=0, processes=1)
    assert TokenShards(folder).tokens("val") == 0
    return folder


def parts(out: Path) -> set[str]:
    return set(Drawing.load(out).others)


def test_text_named_after_the_note_that_asks_for_it(
    alone: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = Recording(Study(str(alone), out, **SHORT))
    first.run()
    assert ["--data" in note for note in first.notes] == [True]
    assert parts(out) == {"overhead"}
    second = Recording(Study(str(alone), out, data=str(text), **SHORT))
    second.run()
    assert second.notes == []
    assert parts(out) == {"overhead", "schedule", "frequency", "samples"}


def test_a_cost_that_was_recorded_with_the_name_of_a_text_stays(
    alone: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    study = Study(str(alone), out, data=str(text), **SHORT)
    Recording(study).run()
    path = out / "records" / "overhead.npz"
    assert "data" not in record.read(path).header["settings"]
    change(path, lambda s: s | {"data": "elsewhere"})
    before = path.stat().st_mtime_ns
    Recording(study).run()
    assert path.stat().st_mtime_ns == before
    change(path, lambda s: s | {"solver": "sde"})
    with pytest.raises(ConfigError, match=r"overhead\.npz was recorded with other solver"):
        Recording(study).run()


@pytest.mark.parametrize("what", ["missing", "foreign"])
def test_text_that_cannot_be_used_is_refused_before_anything_is_recorded(
    what: str, alone: Path, foreign: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    for name in ("trace_sequences", "recording_cost", "quality_rows"):
        monkeypatch.setattr(study_module, name, lambda *a, **k: pytest.fail("recorded"))
    data = foreign if what == "foreign" else tmp_path / "none"
    out = tmp_path / "out"
    line = refused(
        capsys, "--model", str(alone), "--data", str(data), "--out", str(out), "--device", "cpu"
    )
    assert str(data) in line
    why = {"missing": "holds no prepared data", "foreign": "prepared with another tokenizer"}
    assert why[what] in line
    assert not list(out.rglob("*.npz"))


def test_a_finished_study_is_drawn_without_its_text(
    alone: Path, text: Path, tmp_path: Path
) -> None:
    out, copied = tmp_path / "out", tmp_path / "text"
    shutil.copytree(text, copied)
    study = Study(str(alone), out, data=str(copied), **SHORT)
    Recording(study).run()
    shutil.rmtree(copied)
    again = Recording(study)
    again.run()
    assert again.notes == []
    assert "schedule" in parts(out)


def test_text_without_held_out_windows_gives_the_frequencies(
    alone: Path, nothing_held_out: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    study = Study(str(alone), out, data=str(nothing_held_out), **SHORT)
    for _ in range(2):
        recording = Recording(study)
        recording.run()
        (note,) = recording.notes
        assert "0 held-out tokens, fewer than one sequence of 16" in note
        assert "no loss curve and no continuations" in note
        assert parts(out) == {"overhead", "frequency"}
        assert Drawing.load(out).index["notes"] == [note]


@pytest.mark.parametrize("what", ["foreign", "damaged"])
def test_what_lies_by_chance_where_the_models_text_was_is_noted(
    what: str, small_run: Path, foreign: Path, text: Path, tmp_path: Path, monkeypatch
) -> None:
    """A model folder names its text by a path that may be relative."""
    monkeypatch.chdir(tmp_path)
    model = exported(small_run, tmp_path / "m", data="shards")
    out = tmp_path / "out"
    shutil.copytree(text, "shards")
    Recording(Study(str(model), out, **SHORT)).run()
    there = parts(out)
    assert "schedule" in there
    shutil.rmtree("shards")
    if what == "foreign":
        shutil.copytree(foreign, "shards")
    else:
        Path("shards").mkdir()
        Path("shards/index.json").write_text("{}")
    Recording(Study(str(model), out, **SHORT)).run()
    assert parts(out) == there  # what was recorded of the model's own text stays
    recording = Recording(Study(str(model), tmp_path / "new", **SHORT))
    recording.run()
    (note,) = recording.notes
    assert note.startswith("the text where the model's was cannot be used (")
    assert "shards" in note
    assert "--data" in note
    assert parts(tmp_path / "new") == {"overhead"}
