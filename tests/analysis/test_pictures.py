"""What the figures of a study show and say: lines, axes, captions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddlm.analysis import beyond, figures, gallery, paper
from ddlm.analysis.record import Record
from ddlm.analysis.trajectories import EVERY_KL, Trajectories

STEPS = 40


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of the last figure, which is not written."""
    seen: list[Any] = []

    @contextmanager
    def watched(path: Path, labels: Any, **options: Any) -> Iterator[list[Any]]:
        with figures.panels(path, labels, **options) as drawn:
            yield drawn
            seen[:] = drawn

    monkeypatch.setattr(figures, "save", lambda *a, **k: [])
    for module in (beyond, paper):
        monkeypatch.setattr(module, "panels", watched)
    return seen


def trajectories(norm: float = 30.0, **header: Any) -> Trajectories:
    """Two sequences of eight tokens, of which one settles every fourth step; the norm falls to ``norm``."""
    settle = 4 * np.arange(1, 9)
    tokens = (np.arange(1, STEPS + 1)[:, None] >= settle).astype(np.int64)  # (n, T)
    falling = np.linspace(2 * norm, norm, STEPS)
    arrays = {
        "tokens": np.stack([tokens, tokens]),
        "generated": np.ones((2, 8), dtype=bool),
        "times": np.linspace(5, 1, STEPS),
        # at once below 1 nat, and below a tenth of it in the last steps only
        "mean_entropy": np.stack([np.where(np.arange(STEPS) < 30, 0.5, 0.01)] * 2),
        "mean_kl": np.stack([np.geomspace(1, 1e-6, STEPS)] * 2),
        "mean_x_norm": np.stack([falling, falling]),
    }
    named = {
        "label": "step 1", "sequences": 2, "steps": STEPS, "solver": "euler", "grid": "uniform",
        "t_max": 5.0, "t_min": 1.0, "temperature": 1.0, "embedding_width": 64, "noise_scale": 1.0,
        "settings": {"kl": EVERY_KL},
    }  # fmt: skip
    return Trajectories(Record("trajectories", named | header, arrays))


def test_distant_thresholds_are_not_joined(axes: list[Any], tmp_path: Path) -> None:
    beyond.draw_halting(trajectories(), tmp_path / "halting")
    for panel in axes:
        lines = {line.get_label(): line for line in panel.get_lines()}
        assert set(lines) == {"fixed step", "patience", "entropy", "KL"}
        assert np.isfinite(lines["fixed step"].get_xdata()).all()
        x = np.asarray(lines["entropy"].get_xdata(), dtype=float)
        # the exits are at steps 1, 31 and 40: each is a marker of its own
        assert set(x[np.isfinite(x)]) == {1.0, 31.0, 40.0}
        assert lines["entropy"].get_marker() != "None"
        for line in lines.values():
            gaps = np.abs(np.diff(np.asarray(line.get_xdata(), dtype=float)))
            assert np.nanmax(gaps) <= beyond.APART * STEPS


def test_neighbouring_steps_are_joined_however_few_there_are() -> None:
    assert beyond.joined([(1, 5), (2, 6), (4, 7)], 1.0)[0] == pytest.approx(
        [1, 2, np.nan, 4], nan_ok=True
    )
    assert beyond.joined([], 1.0) == ([], [])


def test_a_share_is_drawn_from_0_to_100(axes: list[Any], tmp_path: Path) -> None:
    rows = [
        {"steps": n, "patience": p, "performed": float(n), "agreement": 1.0}
        for n in (20, 40)
        for p in (5, None)
    ]
    paper.draw_quality(rows, tmp_path / "quality", "")
    assert [panel.get_ylim() for panel in axes] == [(0, 101)] * 2
    judged = [r | {"nll": 6.0, "nll_error": 0.1} for r in rows]
    paper.draw_quality(judged, tmp_path / "quality", "")
    assert all(5 < panel.get_ylim()[0] < 6 < panel.get_ylim()[1] < 7 for panel in axes)


def test_the_sphere_is_on_the_axis_near_it(axes: list[Any], tmp_path: Path) -> None:
    runs = [trajectories(norm, noise_scale=s) for norm, s in ((11.0, 0.5), (12.0, 1.0))]
    paper.draw_noise_scales(runs, tmp_path / "noise")
    low, high = axes[1].get_ylim()
    assert low < runs[0].radius == 8 < 12 < high


def captions(monkeypatch: pytest.MonkeyPatch, folder: Path, **parts: Any) -> dict[str, str]:
    """Of a study with these parts, drawn in name only."""
    for module in (beyond, paper):
        for name in [n for n in vars(module) if n.startswith("draw_")]:
            monkeypatch.setattr(module, name, lambda *a, **k: None)
    t = trajectories()
    study = {
        "folder": folder, "index": {}, "checkpoints": [t], "main": t, "noise": [t], "quality": {},
        "others": {},
    }  # fmt: skip
    return {d.name: d.caption for d in gallery.draw_all(gallery.Study(**study | parts))}


def test_captions_say_what_a_study_has_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def speed(*lengths: int) -> dict[str, Any]:
        cases = [{"length": n, "seconds_per_sequence": 1.0} for n in lengths]
        return {"command": "c", "date": "2026-01-01", "results": {"cases": cases}}

    def quality(steps: int) -> dict[str, Any]:
        return {"settings": {"judge": None}, "rows": [{"steps": steps}]}

    few = captions(monkeypatch, tmp_path, speed=speed(64, 64), quality=quality(200))
    assert "for step 1, the only checkpoint of the study." in few["checkpoints"]
    assert "n is at most 200, not the paper's 500." in few["quality"]
    assert "for each number of Euler steps, temperature 1." in few["quality"]
    assert "a sequence of 64 tokens, the only length that was measured," in few["speed"]
    assert "KL" not in few["halting"]
    t = trajectories()
    many = captions(
        monkeypatch, tmp_path, checkpoints=[t, t], speed=speed(16, 64), quality=quality(500),
        main=trajectories(settings={}),
    )  # fmt: skip
    assert "only" not in many["checkpoints"]
    assert many["quality"].startswith("Share of the tokens")
    assert "n is at most 500. " in many["quality"]
    assert "a sequence against its length," in many["speed"]
    assert "KL is left out" in many["halting"]
