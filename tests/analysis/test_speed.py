"""The figure of speed marks where diffusion is level with the fastest autoregressive model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddlm.analysis.paper import draw_speed

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (16, 32, 64, 128, 256)


def drawn(folder: Path, seconds: dict[str, list[float | None]], batch: int = 1) -> str:
    cases = [
        {"candidate": name, "length": n, "batch": batch, "seconds_per_sequence": each}
        for name, line in seconds.items()
        for n, each in zip(LENGTHS, line, strict=True)
    ]
    record: dict[str, Any] = {
        "hardware": {"gpus": [], "cpu": "a CPU"},
        "results": {"precision": "fp32", "cases": cases},
    }
    draw_speed(record, folder / "speed")
    assert (folder / "speed.png").stat().st_size > 10_000
    return (folder / "speed.svg").read_text("utf-8")


def test_the_crossing_is_marked_with_its_length(tmp_path: Path) -> None:
    """Straight lines on logarithmic axes: seconds that grow with the length meet one second at 100 tokens."""
    seconds: dict[str, list[float | None]] = {
        "ddlm 50": [1.0] * 5,
        "ddlm 50 patience 6": [0.5] * 4 + [None],
        "ddlm 200": [4.0] * 5,
        "gpt_neox": [n / 100 for n in LENGTHS],
        "gpt2": [n / 80 for n in LENGTHS],  # the slower one marks nothing
    }
    svg = drawn(tmp_path, seconds)
    assert [f">{n} tokens<" in svg for n in (100, 50, 80, 40)] == [True, True, False, False]
    assert svg.count(" tokens<") == 2  # with 200 steps it is slower everywhere
    assert "ddlm 50 steps, patience 6" in svg
    assert "level with the fastest autoregressive model" in svg


def test_the_last_of_several_crossings_counts(tmp_path: Path) -> None:
    svg = drawn(tmp_path, {"ddlm 50": [1.0, 3.0, 3.0, 4.0, 4.0], "gpt2": [2.0, 2.0, 4.0, 2.0, 8.0]})
    assert f">{128 * 2**0.5:.0f} tokens<" in svg
    assert svg.count(" tokens<") == 1


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_nothing_is_marked_where_there_is_no_crossing(tmp_path: Path, factor: float) -> None:
    svg = drawn(tmp_path, {"ddlm 50": [factor * n for n in LENGTHS], "gpt2": [*LENGTHS]})
    assert " tokens<" not in svg
    assert "level with" not in svg


def test_candidates_of_one_length_are_rows(tmp_path: Path) -> None:
    """Above one another at that length they would hide each other."""
    record = json.loads((ROOT / "benchmarks/sample-ddlm-small-h200.json").read_text())
    draw_speed(record, tmp_path / "speed")
    svg = (tmp_path / "speed.svg").read_text("utf-8")
    assert svg.count(", 64 tokens<") == 2  # in the titles
    assert svg.count(">seconds a sequence<") == 2
    assert ">tokens<" not in svg
    assert svg.count(">GPT-2 (autoregressive)<") == 1  # beside its row, of the first panel alone


@pytest.mark.parametrize(
    "record", ["sample-base.json", "results-earlier/ddlm-tiny-speed.json", "early-exit.json"]
)
def test_records_from_before_early_exit_took_part_are_drawn(tmp_path: Path, record: str) -> None:
    draw_speed(json.loads((ROOT / "benchmarks" / record).read_text()), tmp_path / "speed")
    svg = (tmp_path / "speed.svg").read_text("utf-8")
    assert "ddlm 200 steps" in svg
    assert "level with" not in svg
