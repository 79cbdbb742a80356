"""The figure of an evaluation: quality against diversity over noise scale and temperature, from its record."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddlm.analysis.figures import LINES, PALETTE, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_QUALITY = "nll"
# Entropy of all tokens together grows with their number, and real text is measured on more samples than a point of a
# curve. Distinct-2 is within groups of five samples whatever their number: there real text and points compare.
_DIVERSITY = "dist_2"
_REAL = "real text"
_SIZE = 8.5  # of the labels, points


@dataclass(frozen=True)
class _Kind:
    """How one curve is drawn."""

    name: str
    color: str
    line: str
    marker: str
    shift: tuple[
        float, float
    ]  # of the labels, points: to different sides, because the curves meet where both are 1


_KINDS = (
    _Kind("noise scale", PALETTE[0], LINES[0], "o", (-7, 7)),
    _Kind("temperature", PALETTE[3], LINES[1], "s", (7, -13)),
)


def draw_curves(record: Mapping[str, Any], path: Path) -> bool:
    """AR-NLL against distinct-2, a line for each setting that was varied, and real text where it was measured.

    Args:
        record: Of ``ddlm evaluate``.
        path: Where, without suffix; ``.png`` and ``.svg`` are written.

    Returns:
        Whether there was a point to draw: without a judge there is none.
    """
    results = record["results"]
    curves = {kind: _points(results["curves"], kind.name) for kind in _KINDS}
    if not any(curves.values()):
        return False
    labels = [
        (
            "Quality against diversity",
            "distinct-2 (share of the 2-grams of five samples; higher: more diverse)",
            "AR-NLL (nats per judge token; lower: likelier)",
        )
    ]
    note = textwrap.fill(_what_was_run(record), 104)
    with panels(path, labels, note=note, size=(6.4, 4.4)) as (axes,):
        for kind, points in curves.items():
            if points:
                _draw(axes, kind, points)
        real = [r for r in results["rows"] if r["name"] == _REAL]
        for row in real[:1]:
            if (point := _point(row)) is not None:
                _bars(axes, [point], color=PALETTE[7], fmt="*", markersize=10, label=_REAL)
        axes.margins(0.12)
        _label(axes, curves)
    return True


def _points(rows: Sequence[Mapping[str, Any]], kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Label and place of every point of a curve that has finite numbers, in the order of its setting."""
    found = [
        (row["name"].removeprefix(f"{kind} "), _point(row))
        for row in rows
        if row["name"].startswith(kind)
    ]
    return sorted(((v, p) for v, p in found if p is not None), key=lambda point: float(point[0]))


def _point(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Both estimates of a row, or None where one is missing or not finite (null in a record)."""
    pair = {"x": row["metrics"].get(_DIVERSITY), "y": row["metrics"].get(_QUALITY)}
    return pair if all(e is not None and e["value"] is not None for e in pair.values()) else None


def _draw(axes: Axes, kind: _Kind, points: Sequence[tuple[str, dict[str, Any]]]) -> None:
    _bars(
        axes,
        [p for _, p in points],
        color=kind.color,
        fmt=kind.marker,
        linestyle=kind.line,
        markersize=5,
        label=kind.name,
    )


def _label(axes: Axes, curves: Mapping[_Kind, Sequence[tuple[str, dict[str, Any]]]]) -> None:
    """The setting at every point; a label that would lie on an earlier one moves further from the curve."""
    canvas = axes.get_figure()
    assert canvas is not None
    axes.autoscale_view()
    taken: list[tuple[float, float, float]] = []  # left, bottom, right; all of one height
    for kind, points in curves.items():
        left = kind.shift[0] < 0
        for value, point in points:
            place = (point["x"]["value"], point["y"]["value"])
            x, y = axes.transData.transform(place) * 72 / canvas.dpi  # points
            width = 0.62 * _SIZE * len(value)
            start = x + kind.shift[0] - (width if left else 0)
            up = kind.shift[1]
            while any(
                start < r and b < start + width and abs(y + up - bottom) < 1.15 * _SIZE
                for b, bottom, r in taken
            ):
                up += 1 if left else -1
            taken.append((start, y + up, start + width))
            axes.annotate(
                value,
                place,
                xytext=(kind.shift[0], up),
                textcoords="offset points",
                color=kind.color,
                fontsize=_SIZE,
                ha="right" if left else "left",
            )


def _bars(axes: Axes, points: Sequence[dict[str, Any]], **style: Any) -> None:
    """Points with their intervals to both sides."""
    axes.errorbar(
        [p["x"]["value"] for p in points],
        [p["y"]["value"] for p in points],
        xerr=_reach([p["x"] for p in points]),
        yerr=_reach([p["y"] for p in points]),
        elinewidth=0.8,
        capsize=2,
        **style,
    )


def _reach(estimates: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Distances to the lower and upper ends of the intervals; zero where there is none."""
    low = [e["value"] - (e["value"] if e["low"] is None else e["low"]) for e in estimates]
    high = [(e["value"] if e["high"] is None else e["high"]) - e["value"] for e in estimates]
    return [low, high]


def _what_was_run(record: Mapping[str, Any]) -> str:
    settings, curves = record["config"]["protocol"]["settings"], record["results"]["curves"]
    name, judge = (
        Path(path).name
        for path in (record["config"]["model"], record["results"]["facts"]["judge"]["judge"])
    )
    number = " or ".join(f"{n:,}" for n in sorted({row["facts"]["samples"] for row in curves}))
    kinds = [k.name for k in _KINDS if _points(curves, k.name)]
    steps = fixed = ""
    if "noise scale" in kinds:  # an autoregressive model has neither solver steps nor initial noise
        steps = f", {settings['steps']} {settings['solver']} steps"
        fixed = (
            f" (noise scale {settings['noise_scale']:g} and temperature {settings['temperature']:g}"
            " where the other varies)"
        )
    return (
        f"{name}: {number} unconditional samples a point{steps}; numbers at the points: {', '.join(kinds)}{fixed};"
        f" judge {judge}; bars: 95% intervals."
    )
