"""The picture of an evaluation, read back from its SVG."""

import re
from itertools import pairwise

import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'ddlm[plots]'")

from ddlm.analysis.curves import draw_curves


def estimate(value, half=None):
    ends = (None, None) if half is None or value is None else (value - half, value + half)
    return {"value": value, "low": ends[0], "high": ends[1], "over": "seeds"}


def row(name, diversity, quality, half=0.05):
    metrics = {"dist_2": estimate(diversity, half), "nll": estimate(quality, half)}
    return {"name": name, "task": "unconditional", "metrics": metrics, "facts": {"samples": 250}}


def record(curves, rows=()):
    settings = {"steps": 50, "solver": "euler", "noise_scale": 1.0, "temperature": 1.0}
    return {
        "config": {"model": "models/small", "protocol": {"settings": settings}},
        "results": {
            "curves": curves,
            "rows": list(rows),
            "facts": {"judge": {"judge": "models/reader"}},
        },
    }


def words(path):
    """Text of an SVG, in order."""
    return re.findall(r"<text[^>]*>([^<]*)<", path.read_text())


def test_every_point_is_labelled_and_real_text_marked(tmp_path):
    curves = [row("noise scale 0.55", 0.3, 2.4), row("noise scale 1.25", 0.9, 4.8)]
    curves += [row("temperature 0.73", 0.7, 3.3), row("temperature 1.15", 0.95, 5.0, half=None)]
    made = record(curves, [row("small", 0.9, 4.3), row("real text", 0.93, 3.3)])
    assert draw_curves(made, tmp_path / "curves")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "curves.svg"]
    found = words(tmp_path / "curves.svg")
    for label in ("0.55", "1.25", "0.73", "1.15", "noise scale", "temperature", "real text"):
        assert found.count(label) == 1, label
    text = " ".join(found)
    assert "small: 250 unconditional samples a point, 50 euler steps" in text
    assert "judge reader" in text
    # Equal data, equal file.
    before = (tmp_path / "curves.svg").read_bytes()
    assert draw_curves(made, tmp_path / "curves")
    assert (tmp_path / "curves.svg").read_bytes() == before


def test_what_is_not_finite_or_not_there_is_left_out(tmp_path):
    curves = [row("temperature 0.73", 0.7, None), row("temperature 1.15", 0.95, 5.0)]
    assert draw_curves(record(curves), tmp_path / "curves")
    found = words(tmp_path / "curves.svg")
    assert ("0.73" in found, "1.15" in found, "real text" in found) == (False, True, False)
    # An autoregressive model has no solver.
    assert "euler" not in " ".join(found)


def test_nothing_is_drawn_without_a_judge(tmp_path):
    made = record([row("temperature 1", 0.7, 3.3)])
    del made["results"]["curves"][0]["metrics"]["nll"]
    made["results"]["facts"]["judge"] = None
    assert not draw_curves(made, tmp_path / "curves")
    assert list(tmp_path.iterdir()) == []


def test_labels_of_points_that_nearly_meet_do_not_lie_on_each_other(tmp_path):
    near = [row(f"noise scale 7.1{i}", 0.9 + i / 1e4, 4.8 + i / 1e4) for i in range(4)]
    assert draw_curves(record([*near, row("noise scale 0.5", 0.3, 2.4)]), tmp_path / "curves")
    svg = (tmp_path / "curves.svg").read_text()
    places = re.findall(r'y="(-?[\d.]+)"[^>]*>7\.1\d<', svg)
    heights = sorted(float(y) for y in places)
    assert len(heights) == 4
    assert all(b - a > 8.5 for a, b in pairwise(heights))
