"""Records of different models, runs and samplers: none is taken for another's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from analysis.test_study import refused
from ddlm.analysis import record
from ddlm.analysis.figures import smoothed
from ddlm.analysis.findings import early_exit
from ddlm.analysis.gallery import Study as Drawing
from ddlm.analysis.gallery import draw_all
from ddlm.analysis.paper import draw_checkpoints, what_was_run
from ddlm.analysis.trajectories import EVERY_KL
from ddlm.checkpoint import load_model, save_model
from ddlm.study import Recording, Study, identity, labels_of
from ddlm.types import ConfigError, DataError

SHORT = {
    "sequences": 2, "steps": 6, "step_counts": (6,), "noise_scales": (1.0,), "patience": (2,),
    "device": "cpu",
}  # fmt: skip


@pytest.fixture
def small(small_run: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint's model, whose files may be changed."""
    return exported(small_run, tmp_path / "small")


def exported(run: Path, folder: Path, *, data: str | None = None, scale: float = 1.0) -> Path:
    """The last checkpoint as a model folder, with other text or other weights where wanted."""
    loaded = load_model(run / "checkpoints" / "step-30")
    if data is not None:
        loaded.config.data.path = data
    for p in loaded.model.parameters():
        p.data.mul_(scale)
    return save_model(
        folder, loaded.model, loaded.config, tokenizer_from=loaded.folder, step=loaded.step
    )


def edit(model: Path, **sample: object) -> None:
    """Change the sampler a model folder names; its weights stay as they are."""
    config = yaml.safe_load((model / "config.yaml").read_text())
    config["sample"] |= sample
    (model / "config.yaml").write_text(yaml.safe_dump(config))
    manifest = json.loads((model / "manifest.json").read_text())
    from ddlm.files import _sha256

    manifest["files"]["config.yaml"] = _sha256(model / "config.yaml")
    (model / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_overwriting_keeps_nothing_of_the_model_before(small: Path, small_run: Path, tmp_path):
    out = tmp_path / "out"
    Recording(Study(str(small), out, **SHORT)).run()
    parts = {p.name for p in (out / "records").iterdir()}
    assert {"schedule.npz", "frequency.npz", "samples.npz"} <= parts
    # The text of the other model is not at hand: its loss curve cannot be recorded.
    other = exported(small_run, tmp_path / "other", data="nowhere", scale=0.9)
    recording = Recording(Study(str(other), out, overwrite=True, **SHORT))
    recording.run()
    assert any("not at hand" in note for note in recording.notes)
    drawing = Drawing.load(out)
    assert set(drawing.others) == {"overhead"}
    assert drawing.index["identity"] == identity(other)
    for path in (out / "records").iterdir():
        if path.name != "study.npz":
            assert record.read(path).header["settings"]["model"] == identity(other), path
    # The same model without its text: what was recorded with the text is of other settings.
    Recording(
        Study(str(other), out, data=str(small_run.parent / "data"), overwrite=True, **SHORT)
    ).run()
    assert "schedule" in Drawing.load(out).others
    Recording(Study(str(other), out, overwrite=True, **SHORT)).run()
    assert "schedule" not in Drawing.load(out).others


def test_records_of_another_model_are_not_drawn(studied: Path, tmp_path: Path) -> None:
    records = tmp_path / "records"
    shutil.copytree(studied / "records", records)
    for name in ("quality", "schedule"):
        change(records / f"{name}.npz", lambda s: s | {"model": "another"})
    drawing = Drawing.load(tmp_path)
    assert drawing.quality == {}
    assert set(drawing.others) == {"frequency", "samples", "overhead"}
    change(records / drawing.index["noise"][0], lambda s: s | {"model": "another"})
    with pytest.raises(DataError, match="is of another model than the study"):
        Drawing.load(tmp_path)


def change(path: Path, settings, **header) -> None:
    """Write a record anew with other settings."""
    old = record.read(path)
    head = {**old.header, **header, "settings": settings(old.header["settings"])}
    record.write(path, old.kind, head, old.arrays)


@pytest.mark.parametrize(
    "sample", [{"solver": "sde"}, {"temperature": 0.5}, {"grid": "karras"}], ids=str
)
def test_a_study_does_not_go_on_with_another_sampler(sample, small: Path, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    arguments = [
        "--model", str(small), "--sequences", "2", "--steps", "6", "--step_counts", "6", "--noise_scales", "1",
        "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    begin_only(small, out)
    before = identity(small)
    edit(small, **sample)
    assert identity(small) == before
    line = refused(capsys, *arguments)
    assert f"was recorded with other {next(iter(sample))}: give another --out" in line


@pytest.mark.parametrize("sample", [{"steps": 7}, {"noise_scale": 0.8}, {"refine": 2}], ids=str)
def test_continuations_of_another_sampler_are_not_gone_on_with(
    sample, small: Path, tmp_path
) -> None:
    """Their number of steps and initial noise are the model's own, which the study's options do not name."""
    out = tmp_path / "out"
    study = Study(str(small), out, **SHORT)
    folder = out / "records"
    folder.mkdir(parents=True)
    for part in ("overhead", "schedule", "frequency"):  # as if made: they do not depend on it
        recording = Recording(study)
        settings = recording._settings(small) | {"data": None}
        own = {"kl": EVERY_KL} if part == "overhead" else {"text": recording._text(small)}
        record.write(folder / f"{part}.npz", part, {"settings": settings | own}, {})
    Recording(study)._beside(small)
    assert record.read(folder / "samples.npz").header["settings"]["steps"] == 50
    Recording(study)._beside(small)
    edit(small, **sample)
    changed = f"samples.npz was recorded with other {next(iter(sample))}: give another --out"
    with pytest.raises(ConfigError, match=changed):
        Recording(study)._beside(small)


def begin_only(model: Path, out: Path, **options) -> None:
    """The trajectories and nothing beside them."""
    recording = Recording(Study(str(model), out, **SHORT | options))
    recording._labels = labels_of([model])
    recording._trajectories(model, 6, 1.0)


def test_a_study_does_not_go_on_in_another_precision(small: Path, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    begin_only(small, out)
    (path,) = (out / "records").iterdir()
    settings = record.read(path).header["settings"]
    assert settings["precision"] == "fp32"
    assert settings["process"] == [1.0, 5.0]
    change(path, lambda s: s | {"precision": "bf16"})
    line = refused(
        capsys, "--model", str(small), "--sequences", "2", "--steps", "6", "--out", str(out), "--device", "cpu"
    )  # fmt: skip
    assert "was recorded with other precision" in line
    change(path, lambda s: {k: v for k, v in s.items() if k not in ("precision", "process")})
    line = refused(
        capsys, "--model", str(small), "--sequences", "2", "--steps", "6", "--out", str(out), "--device", "cpu"
    )  # fmt: skip
    assert "does not say with which precision, process it was recorded" in line


def test_the_temperature_is_named_and_older_records_are_drawn(studied: Path, tmp_path) -> None:
    main = Drawing.load(studied).main
    assert "t from 5 to 1, temperature 1, no early exit" in what_was_run(main)
    records = tmp_path / "records"
    shutil.copytree(studied / "records", records)
    lost = ("solver", "grid", "temperature", "precision", "process")
    for path in records.glob("*.npz"):
        old = record.read(path)
        head = {
            k: v for k, v in old.header.items() if k not in ("provenance", "labels", "identities")
        }
        if "settings" in head:
            head["settings"] = {k: v for k, v in head["settings"].items() if k not in lost}
        if path.name.startswith("step-"):
            head.pop("temperature")
            head.pop("precision")
        record.write(path, old.kind, head, old.arrays)
    drawing = Drawing.load(tmp_path)
    assert drawing.recorded == []
    assert "temperature 1, " in what_was_run(drawing.main)  # from its configuration
    del drawing.main.header["config"]
    assert "temperature" not in what_was_run(drawing.main)
    assert len(drawing.findings) == 7
    draw_checkpoints(drawing.checkpoints, tmp_path / "checkpoints")
    assert drawing.quality


def test_every_record_says_when_and_by_which_command_it_was_made(studied: Path) -> None:
    for path in (studied / "records").iterdir():
        made = record.read(path).header["provenance"]
        assert set(made) == {"date", "command", "commit", "versions", "hardware"}, path
    (made,) = Drawing.load(studied).recorded
    assert made["hardware"]["cpu"]


def test_equal_steps_of_two_runs_are_two_records(small_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "second"
    exported(small_run, run / "checkpoints" / "step-30", scale=0.9)
    out = tmp_path / "out"
    chosen = [str(run / "checkpoints" / "step-30")]
    Recording(
        Study(str(small_run / "checkpoints" / "step-30"), out, checkpoints=chosen, **SHORT)
    ).run()
    drawing = Drawing.load(out)
    other, main = drawing.checkpoints
    assert [t.label for t in (other, main)] == ["step 30 of second", "step 30 of run"]
    assert not np.array_equal(other.values("entropy"), main.values("entropy"))
    # Alone, the step is enough: the same record is labelled by the study that shows it.
    Recording(Study(str(small_run / "checkpoints" / "step-30"), out, checkpoints=[], **SHORT)).run()
    assert Drawing.load(out).main.label == "step 30"


def test_labels_tell_folders_of_equal_names_apart(small_run: Path, tmp_path: Path) -> None:
    a = exported(small_run, tmp_path / "a" / "m")
    b = exported(small_run, tmp_path / "b" / "m", scale=0.9)
    found = labels_of([a, b])
    assert found[a] == f"step 30 of m ({identity(a)[:8]})"
    assert found[a] != found[b]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9])
def test_the_running_mean_of_few_steps(steps: int) -> None:
    values = np.arange(2.0 * steps).reshape(2, steps)
    found = smoothed(values, 5)
    assert found.shape == values.shape
    if steps >= 5:
        assert found[0, 2] == pytest.approx(values[0, :5].mean())
    assert np.allclose(smoothed(np.ones((2, steps)), 5), 1)


@pytest.mark.parametrize("steps", [3, 4, 5])
def test_a_study_of_few_steps_is_drawn(steps: int, small: Path, tmp_path: Path) -> None:
    options = SHORT | {"steps": steps, "step_counts": (steps,), "patience": (5,)}
    out = Recording(Study(str(small), tmp_path / "out", **options)).run()
    drawing = Drawing.load(out)
    draw_checkpoints(drawing.checkpoints, tmp_path / "checkpoints")
    assert steps > 3 or draw_all(drawing)  # once is enough, it takes seconds
    answer = next(f.answer for f in drawing.findings if f.figure == "quality")
    assert answer == (
        f"Not measured: no patience of the study is below the {steps} steps allowed, so that no sequence could end "
        "early."
    )


def test_an_early_exit_that_is_measured_is_told() -> None:
    row = {"steps": 40, "patience": None, "performed": 40.0, "agreement": 1.0}
    finding = early_exit([row, row | {"patience": 5, "performed": 20.0}])
    assert finding.answer.startswith("n = 40, n_p = 5: 20 steps (50% saved)")
