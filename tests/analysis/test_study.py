"""The command from end to end, resumed, refused; what recording costs in memory."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.conftest import STEPS, findings
from ddlm.analysis import paper, record
from ddlm.analysis.gallery import Study as Study_
from ddlm.analysis.trajectories import Trajectories
from ddlm.checkpoint import find_model
from ddlm.cli import main
from ddlm.config import read_config
from ddlm.data.shards import TokenShards
from ddlm.sampling import make_request
from ddlm.sampling.engine import Engine
from ddlm.study import Recording, Study
from sampling.models import LENGTH, PROCESS, network

FIGURES = (
    "training", "checkpoints", "quality", "geometry", "noise", "settling", "bands", "halting", "schedule",
)  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["analyze", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.slow
def test_a_study_leaves_records_figures_findings_and_a_report(studied: Path) -> None:
    for name in FIGURES:
        assert (studied / "figures" / f"{name}.png").stat().st_size > 5_000
        assert (studied / "figures" / f"{name}.svg").read_text("utf-8").startswith("<?xml")
    record_ = json.loads((studied / "findings.json").read_text("utf-8"))
    assert record_["kind"] == "analyze"
    assert [f["name"] for f in record_["results"]["figures"]] == list(FIGURES)
    assert len(findings(studied)) == 7
    assert not [p for p in studied.rglob("*") if ".tmp" in p.name or ".part" in p.name]


def test_numbers_of_the_findings_follow_from_the_records(studied: Path) -> None:
    index = record.read(studied / "records" / "study.npz", "study").header
    t = Trajectories.load(studied / "records" / index["main"])
    assert t.tokens.shape == (6, STEPS, 16)
    rows = findings(studied)
    assert rows[0]["numbers"]["last_switch_median"] == float(np.median(t.last_switch))
    x = t.record.arrays["mean_x_norm"].mean(0)
    assert rows[2]["numbers"]["lowest_step"] == int(x.argmin()) + 1
    # noise of scale s begins at s * t_max * sqrt(D)
    for row in rows[4]["numbers"]["rows"]:
        assert row["start"] == pytest.approx(row["noise_scale"] * 5 * 4, rel=0.15)
    assert t.values("sequence_score_cosine")[:, -1] == pytest.approx(1, abs=1e-5)


def test_quality_is_what_the_judge_says_about_the_tokens_at_the_exit(
    studied: Path, judge: Path
) -> None:
    rows = record.read(studied / "records" / "quality.npz", "quality").header["rows"]
    assert [(r["steps"], r["patience"]) for r in rows] == [
        (8, None), (8, 2), (8, 5), (STEPS, None), (STEPS, 2), (STEPS, 5),
    ]  # fmt: skip
    from ddlm.evaluation.judges import Judge, mean_nll

    index = record.read(studied / "records" / "study.npz", "study").header
    t = Trajectories.load(studied / "records" / index["main"])
    whole = mean_nll(Judge(str(judge)).score([x for x in t.header["texts"] if x.strip()]))
    assert rows[3]["nll"] == pytest.approx(whole.nll, rel=0.05)  # the end of a document aside
    assert all(r["performed"] <= r["steps"] and 0 <= r["agreement"] <= 1 for r in rows)


@pytest.mark.slow
def test_the_same_command_records_nothing_twice(arguments, studied: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (studied / "records").glob("step-*.npz")}
    assert len(before) == 3 + 2 + 1  # checkpoints, noise scales, the other number of steps
    assert main(["analyze", *arguments, "--out", str(studied)]) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before


def study_of(small_run: Path, judge: Path, out: Path) -> Study:
    """What the command records that has the fixture's arguments; it draws besides, which takes seconds."""
    return Study(
        str(small_run), out, judge=str(judge), sequences=6, steps=STEPS, step_counts=(8, STEPS),
        patience=(2, 5), noise_scales=(0.5, 1.2), device="cpu",
    )  # fmt: skip


def test_an_interrupted_study_goes_on(
    studied: Path, small_run: Path, judge: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(studied / "records", out / "records")
    lost = next((out / "records").glob("*noise0.5.npz"))
    kept = (studied / "records" / lost.name).read_bytes()
    lost.unlink()

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Recording(study_of(small_run, judge, out), interrupt).run()
    assert not lost.exists()
    Recording(study_of(small_run, judge, out)).run()
    mine, first = record.read(lost), record.read(studied / "records" / lost.name)
    assert kept
    for name, array in first.arrays.items():
        assert np.array_equal(array, mine.arrays[name], equal_nan=True), name


def test_other_settings_are_not_mixed_in(arguments, studied: Path, capsys) -> None:
    line = refused(capsys, *arguments, "--seed", "7", "--out", str(studied))
    assert "was recorded with other seed" in line
    assert "--overwrite" in line


def test_what_was_recorded_of_other_text_is_not_mixed_in(
    arguments, studied: Path, small_run: Path, judge: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    shutil.copytree(studied / "records", out / "records")
    path = read_config(find_model(small_run) / "config.yaml").data.path
    for name in ("schedule", "frequency", "samples"):
        file = out / "records" / f"{name}.npz"
        found = record.read(file)
        assert found.header["settings"]["text"] == {"path": path, "hash": TokenShards(path).hash}
        # as if the folder had been prepared anew since, then as before the text was named
        for text in ({"path": path, "hash": "of other shards"}, None):
            settings = {k: v for k, v in found.header["settings"].items() if k != "text"}
            settings |= {"text": text} if text else {}
            record.write(file, found.kind, found.header | {"settings": settings}, found.arrays)
            if text:
                line = refused(capsys, *arguments, "--out", str(out))
                assert f"{name}.npz was recorded with other text" in line
    before = file.stat().st_mtime_ns
    Recording(study_of(small_run, judge, out)).run()
    assert file.stat().st_mtime_ns == before


def test_no_such_model(tmp_path, capsys) -> None:
    line = refused(capsys, "--model", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    assert "does not exist" in line
    assert not (tmp_path / "out").exists()


def test_a_run_without_checkpoints(tmp_path, capsys) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    line = refused(capsys, "--model", str(tmp_path / "run"), "--out", str(tmp_path / "out"))
    assert "has no checkpoint yet" in line


def test_a_damaged_record_and_one_of_another_version(arguments, studied, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    shutil.copytree(studied / "records", out / "records")
    victim = next((out / "records").glob("*noise1.2.npz"))
    victim.write_bytes(victim.read_bytes()[:300])
    assert "is damaged" in refused(capsys, *arguments, "--out", str(out))
    old = record.read(studied / "records" / victim.name)
    head = json.dumps(old.header | {"format": 99}).encode()
    np.savez_compressed(victim, header=np.frombuffer(head, dtype=np.uint8), **old.arrays)
    assert "version 99" in refused(capsys, *arguments, "--out", str(out))


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--checkpoints", "11"], "has no checkpoint of step 11; it has 10, 20, 30"),
        (["--sequences", "0"], "needs at least 1"),
        (["--judge", "nowhere/at-all"], "judge"),
        (["--template", "all is given"], "has nothing to generate"),
        (["--noise_scales", "-1"], "noise_scales"),
        (["--page", "missing.md"], "cannot read the page"),
        (["--speed", "missing.json"], "no speed record at missing.json"),
    ],
)
def test_arguments_that_cannot_work(arguments, tmp_path, capsys, extra, message) -> None:
    line = refused(capsys, *arguments, *extra, "--out", str(tmp_path / "out"))
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    arguments, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(Recording, "run", lambda self: pytest.fail("recorded"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "figures").write_text("mine")
    for out, blocked, why in (
        (tmp_path / "file", tmp_path / "file", "is no folder: name another"),
        (tmp_path / "file" / "a" / "b", tmp_path / "file", "is no folder: name another"),
        (tmp_path / "out", tmp_path / "out" / "figures", "is no folder: name another"),
        (Path("/proc/ddlm/out"), Path("/proc"), ""),  # nobody may write there, root included
    ):
        line = refused(capsys, *arguments, "--out", str(out))
        assert f"{blocked} {why}" in line or f"nothing can be written in {blocked} (" in line
        assert "--out" in line
    assert (tmp_path / "file").read_text() == "mine"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["figures"]


def test_a_speed_record_is_drawn_and_another_file_refused(
    arguments, studied: Path, tmp_path: Path, capsys
) -> None:
    from ddlm.record import make_record, write_record

    cases = [
        {"candidate": name, "length": n, "batch": b, "seconds_per_sequence": s * n, "spread": None}
        for name, s in (("ddlm 50", 0.1), ("gpt2", 0.2))
        for n in (16, 64)
        for b in (1, 8)
    ]
    speed = tmp_path / "speed.json"
    write_record(speed, make_record("benchmark-sample", {}, {"cases": cases, "precision": "bf16"}))
    study = Study_.load(studied, speed=speed)
    paper.draw_speed(study.speed, tmp_path / "speed")
    svg = (tmp_path / "speed.svg").read_text("utf-8")
    for text in ("ddlm 50 steps", "GPT-2 (autoregressive)", "seconds a sequence", "8 sequences at"):
        assert text in svg
    for content in ('{"kind": "evaluate"}', "[1]", "no JSON"):
        speed.write_text(content)
        line = refused(capsys, *arguments, "--out", str(studied), "--speed", str(speed))
        assert "a record of `ddlm benchmark sample` is needed" in line
    speed.write_text('{"kind": "benchmark-sample", "results": {"cases": []}}')
    line = refused(capsys, *arguments, "--out", str(studied), "--speed", str(speed))
    assert "holds no case" in line


def _live_bytes(without: set[int]) -> int:
    """Bytes of all tensors of the process, each storage once, except those named."""
    seen: dict[int, int] = {}
    for x in gc.get_objects():
        # what a compiler has left behind are tensors without data
        if type(x) in (torch.Tensor, torch.nn.Parameter) and not torch._is_functional_tensor(x):
            storage = x.untyped_storage()
            if storage.data_ptr() not in without:
                seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def test_nothing_but_the_pages_on_the_host_grows_with_the_steps() -> None:
    engine = Engine(network(), PROCESS, slots=4, length=LENGTH)
    for seed in range(4):
        tokens = torch.zeros(LENGTH, dtype=torch.int64)
        noised = torch.ones(LENGTH, dtype=torch.bool)
        engine.submit(make_request(tokens, noised, PROCESS, steps=80, seed=seed, trace=True))
    sizes, pages = [], []
    for step in range(1, 61):
        engine.step()
        if step in (10, 60):
            assert engine._recorder is not None
            kept = [p for rows in engine._recorder._pages.values() for r in rows for p in r[1:]]
            storages = {p.untyped_storage().data_ptr() for p in kept}
            sizes.append(_live_bytes(storages))
            pages.append(len(storages))
    assert pages[1] > 5 * pages[0]  # the pages did grow
    assert abs(sizes[1] - sizes[0]) < 4096, sizes


@pytest.mark.gpu
def test_device_memory_does_not_depend_on_the_steps() -> None:
    def peak(steps: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        engine = Engine(network().to("cuda"), PROCESS, slots=4, length=LENGTH)
        for seed in range(4):
            tokens = torch.zeros(LENGTH, dtype=torch.int64)
            noised = torch.ones(LENGTH, dtype=torch.bool)
            engine.submit(make_request(tokens, noised, PROCESS, steps=steps, seed=seed, trace=True))
        while engine.busy:
            engine.step()
        return torch.cuda.max_memory_allocated()

    peak(10)
    assert peak(200) <= peak(20) * 1.01
