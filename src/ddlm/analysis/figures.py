"""Figures from recorded results: the only importer of matplotlib.

Every figure is written as PNG and SVG, tells its units on the axes, and uses the palette of Okabe and Ito, which
readers with any colour vision can tell apart; lines differ in style as well, so that a print in grey stays readable.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ddlm.analysis.record import Array
from ddlm.types import DataError

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
"""Okabe and Ito's colours, the easiest to tell apart first."""
LINES = ("-", "--", "-.", ":")
_NOTE_LINE = 0.125  # height of a line of small print, inches
STYLE: Any = {
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 160,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "ddlm",  # equal data, equal file
}


@contextmanager
def figure(path: Path, title: str, x: str, y: str) -> Iterator[Axes]:
    """One pair of axes in the house style, saved as ``path`` with .png and .svg when the block ends.

    Args:
        path: Without suffix (one that is there is replaced).
        title: What is seen.
        x: Name and unit of the horizontal axis.
        y: Name and unit of the vertical axis.
    """
    with mpl.rc_context(STYLE):
        canvas = Figure(figsize=(6.4, 3.8))
        axes = canvas.subplots()
        axes.set(title=title, xlabel=x, ylabel=y)
        yield axes
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend()
        save(canvas, path)


@contextmanager
def panels(
    path: Path,
    labels: Sequence[tuple[str, str, str]],
    *,
    note: str = "",
    columns: int = 2,
    size: tuple[float, float] = (4.6, 3.3),
) -> Iterator[list[Axes]]:
    """Several axes side by side in the house style, saved when the block ends.

    Args:
        path: Without suffix.
        labels: Title, horizontal and vertical label of each panel.
        note: What was run, in small print under the figure, so that a copied picture still tells it.
        columns: Panels in a row.
        size: Width and height of one panel in inches.
    """
    columns = min(columns, len(labels))
    rows = math.ceil(len(labels) / columns)
    beside = 0.15 + _NOTE_LINE * note.count(
        "\n"
    )  # a long note must not take its room from the panels
    with mpl.rc_context(STYLE):
        canvas = Figure(figsize=(size[0] * columns, size[1] * rows + beside))
        grid = list(canvas.subplots(rows, columns, squeeze=False).flat)
        for axes, (title, x, y) in zip(grid, labels, strict=False):
            axes.set(title=title, xlabel=x, ylabel=y)
        for axes in grid[len(labels) :]:
            axes.set_axis_off()
        if note:
            canvas.supxlabel(note, x=0.012, ha="left", fontsize=7.5, color="#555555")
        yield grid[: len(labels)]
        for axes in grid[: len(labels)]:
            if len(axes.get_legend_handles_labels()[0]) > 1:
                axes.legend(fontsize=8.5)
        save(canvas, path)
        if columns > 1:  # once more with the panels below each other, for narrow screens
            stack = canvas.add_gridspec(len(labels), 1)
            for i, axes in enumerate(grid[: len(labels)]):
                axes.set_subplotspec(stack[i])
            for axes in grid[len(labels) :]:
                axes.remove()
            note = textwrap.fill(note, 72)
            beside = 0.15 + _NOTE_LINE * note.count("\n")
            canvas.set_size_inches(size[0], size[1] * len(labels) + beside)
            if note:
                canvas.supxlabel(note, x=0.02, ha="left", fontsize=7.5, color="#555555")
            save(canvas, path.with_name(f"{path.name}-narrow"), (".svg",))


def shades(count: int) -> list[Any]:
    """Colours for things that have an order, light to dark, equally far apart for any colour vision."""
    return [mpl.colormaps["cividis"](0.78 * (1 - i / max(count - 1, 1))) for i in range(count)]


def curve(
    axes: Axes,
    x: Array,
    values: Array,
    label: str | None = None,
    *,
    color: Any = PALETTE[0],
    line: str = "-",
    spread: bool = True,
) -> None:
    """Mean of ``values (S, n)`` over the sequences, with a band of one standard deviation to each side."""
    known = np.isfinite(values).any(0)
    x, values = np.asarray(x)[known], values[:, known]
    mean, deviation = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    axes.plot(x, mean, color=color, linestyle=line, label=label)
    if spread and len(values) > 1:
        low = mean - deviation
        if float(values.min(initial=0, where=np.isfinite(values))) >= 0:
            low = np.maximum(low, 0)  # a band below zero would show what cannot be
        axes.fill_between(x, low, mean + deviation, color=color, alpha=0.15, linewidth=0)


def smoothed(values: Array, window: int) -> Array:
    """Running mean of ``values (S, n)`` over ``window`` steps, shorter at the ends."""
    # Of a longer window numpy would return as many values as the window has.
    kernel = np.ones(min(window, values.shape[1]))
    count = np.convolve(np.ones(values.shape[1]), kernel, mode="same")
    return np.stack([np.convolve(row, kernel, mode="same") for row in values]) / count


def heat_map(
    axes: Axes, values: Array, extent: tuple[float, float, float, float], label: str
) -> None:
    """A picture of ``values (rows, columns)`` from 0 to 1, the first row at the bottom, with its colour bar."""
    image = axes.imshow(
        values,
        aspect="auto",
        origin="lower",
        extent=extent,
        cmap="cividis",
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    axes.grid(visible=False)
    canvas = axes.get_figure()
    assert canvas is not None
    # A part of the axes, so that it moves with them.
    canvas.colorbar(image, cax=axes.inset_axes((1.02, 0.0, 0.035, 1.0)), label=label)


def save(canvas: Figure, path: Path, suffixes: Sequence[str] = (".png", ".svg")) -> list[Path]:
    """Write a figure, as PNG and SVG if not told otherwise; each file appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix in suffixes:
        metadata = {"Date": None} if suffix == ".svg" else {}
        target = path.with_suffix(suffix)
        part = target.with_name(f".{target.name}.part")
        canvas.savefig(part, format=suffix[1:], metadata=metadata)
        written.append(part.replace(target))
    return written


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a ``metrics.jsonl``; a last line that was cut off by a kill is left out.

    Raises:
        DataError: when the file is missing or holds no line.
    """
    if not path.is_file():
        raise DataError(f"no metrics at {path}: give the folder of a training run")
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    if not rows:
        raise DataError(f"{path} holds no metrics yet: train some steps first")
    return rows


def draw_loss(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training loss and held-out cross-entropy over the steps.

    Args:
        metrics: Rows of metrics.jsonl, see :func:`read_metrics`.
        path: Where, without suffix.
    """
    title = "Cross-entropy at the noised positions"
    with figure(path, title, "training step", "cross-entropy (nats per token)") as axes:
        train = [(r["step"], r["loss"]) for r in metrics if r["kind"] == "train"]
        held_out = [(r["step"], r["cross_entropy"]) for r in metrics if r["kind"] == "validation"]
        if len(train) > 60:
            axes.plot(*_columns(train), color=PALETTE[0], alpha=0.25, linewidth=1)
            train = _smoothed(train)
        dots = "o" if len(train) < 3 else ""
        axes.plot(*_columns(train), dots + "-", color=PALETTE[0], label="training (times as drawn)")
        if held_out:
            axes.plot(
                *_columns(held_out),
                color=PALETTE[3],
                linestyle=LINES[1],
                marker="o",
                markersize=4,
                label="held out (times uniform)",
            )
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_switches(
    trajectories: Sequence[Mapping[str, Any]], path: Path, exits: Sequence[int] = ()
) -> None:
    """Share of the tokens that switch at each sampling step (DDLM, Figure 1).

    Args:
        trajectories: Each with ``switches`` (tokens a step) and ``generated`` (how many tokens can switch).
        path: Where, without suffix.
        exits: Steps at which sequences would have left early.
    """
    # nothing can have switched at the first look: the line begins with the second
    lines = [[100 * s / t["generated"] for s in t["switches"][1:]] for t in trajectories]
    with figure(
        path, "Tokens that switch at each step", "sampling step", "switched tokens (%)"
    ) as axes:
        _bundle(axes, lines, exits, first=2)


def draw_entropy(
    trajectories: Sequence[Mapping[str, Any]], path: Path, exits: Sequence[int] = ()
) -> None:
    """Entropy of the posterior at each sampling step, mean over the generated positions (DDLM, Figure 1).

    Args:
        trajectories: Each with ``entropy``, nats a step.
        path: Where, without suffix.
        exits: Steps at which sequences would have left early.
    """
    lines = [list(t["entropy"]) for t in trajectories]
    with figure(
        path, "Uncertainty about the tokens", "sampling step", "entropy (nats per token)"
    ) as axes:
        _bundle(axes, lines, exits)


def _bundle(
    axes: Axes, lines: Sequence[Sequence[float]], exits: Sequence[int], first: int = 1
) -> None:
    """Every sequence thin, their mean thick, and where they left; values begin at step ``first``."""
    for line in lines:
        axes.plot(
            range(first, len(line) + first), line, color=PALETTE[0], alpha=0.15, linewidth=0.8
        )
    longest = max(map(len, lines))
    columns = [[line[i] for line in lines if i < len(line)] for i in range(longest)]
    mean = [math.fsum(c) / len(c) for c in columns]
    axes.plot(
        range(first, longest + first),
        mean,
        color=PALETTE[0],
        label=f"mean of {len(lines)} sequences",
    )
    if exits:
        middle = math.fsum(exits) / len(exits)
        axes.axvspan(min(exits), max(exits), color=PALETTE[1], alpha=0.18, linewidth=0)
        axes.axvline(
            middle,
            color=PALETTE[3],
            linestyle=LINES[1],
            label=f"early exit (mean step {middle:.0f})",
        )
    axes.set_xlim(1, longest + first - 1)
    axes.set_ylim(0, 1.05 * max(max(line) for line in lines) or 1)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over a window of a twentieth of the points around each one."""
    half = max(1, len(points) // 40)
    out = []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i - half) : i + half + 1]]
        out.append((x, math.fsum(window) / len(window)))
    return out
