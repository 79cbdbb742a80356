"""Figures beyond the paper: where and in which order text settles, what halting saves, what the time warp learned.

S sequences, n steps, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddlm.analysis.figures import LINES, PALETTE, curve, heat_map, panels, shades
from ddlm.analysis.paper import what_was_run
from ddlm.analysis.record import Array, Record
from ddlm.analysis.trajectories import Trajectories, frequency_bands

THRESHOLDS: dict[str, list[float] | None] = {
    "fixed": None,  # every step
    "patience": [*range(1, 10), *range(10, 30, 2), *range(30, 200, 10)],
    "entropy": np.geomspace(10, 1e-6, 64).tolist(),
    "kl": np.geomspace(10, 1e-8, 64).tolist(),
}
"""What is tried of each halting criterion: steps, nats."""
APART = 0.05
"""Share of the steps above which two exits are too far apart to be joined by a line."""


def settled_map(t: Trajectories) -> Array:
    """Share of the sequences in which each position has settled by each step, ``(T, n)``; NaN where all was given."""
    settled = (t.settled_step[:, :, None] <= t.steps) & t.generated[:, :, None]  # (S, T, n)
    count = t.generated.sum(0)[:, None]
    return np.where(count > 0, settled.sum(0) / np.maximum(count, 1), np.nan)


def draw_settling(t: Trajectories, path: Path) -> None:
    """Heat map of when each position settles: its argmax has its final token and keeps it."""
    labels = [
        ("When each position settles", "sampling step", "position in the sequence"),
        ("Uncertainty at each position", "sampling step", "position in the sequence"),
    ]
    extent = (1.0, float(len(t.steps)), 0.5, t.tokens.shape[2] + 0.5)
    with panels(path, labels, note=what_was_run(t), size=(5.2, 3.6)) as (left, right):
        heat_map(left, settled_map(t), extent, "settled (share of the sequences)")
        entropy = t.record.arrays["position_entropy"].T  # (T, n)
        top = float(np.nanmax(entropy)) or 1.0
        heat_map(right, entropy / top, extent, f"entropy (share of the highest, {top:.2f} nats)")


def band_masks(t: Trajectories, frequency: Record, bands: int = 4) -> list[tuple[str, Array]]:
    """Label and positions ``(S, T)`` of each frequency band of the final tokens."""
    tokens, counts = t.tokens[:, -1].astype(np.int64), frequency.arrays["counts"]
    # a model may have more outputs than its tokenizer has entries: no text holds those
    counts = np.pad(counts, (0, max(0, int(tokens.max()) + 1 - len(counts))))
    band, names = frequency_bands(counts, bands)
    final = band[tokens]
    return [(name, (final == b) & t.generated) for b, name in enumerate(names)]


def draw_bands(t: Trajectories, frequency: Record, path: Path) -> None:
    """The order of commitment: settled tokens over the steps, and the step of settling, by frequency of the token."""
    labels = [
        ("Settled tokens by their frequency", "sampling step", "settled (% of the band's tokens)"),
        ("Step at which they settle", "", "step (quartiles; whiskers: 5% to 95%)"),
    ]
    counted = frequency.header["tokens"]
    note = f"{what_was_run(t)}; bands hold equal shares of {counted:,} training tokens"
    with panels(path, labels, note=note) as (left, right):
        masks = [(name, m) for name, m in band_masks(t, frequency) if m.any()]
        boxes = []
        for i, ((name, mask), color) in enumerate(zip(masks, shades(len(masks)), strict=True)):
            share = t.settled_share(mask)
            left.plot(
                t.steps,
                100 * share,
                color=color,
                linestyle=LINES[i % 4],
                label=f"{name}, {mask.sum():,} tokens",
            )
            boxes.append(t.settled_step[mask])
        left.set_xlim(1, len(t.steps))
        left.set_ylim(0, 140)  # room for the legend above the curves, which end at 100
        left.set_yticks(range(0, 101, 20))
        drawn = right.boxplot(
            boxes, whis=(5, 95), showfliers=False, patch_artist=True, widths=0.6, showmeans=True
        )
        for box, color in zip(drawn["boxes"], shades(len(masks)), strict=True):
            box.set(facecolor=color, alpha=0.75)
        for line in drawn["medians"]:
            line.set(color="#FFFFFF", linewidth=2)
        names = [name.replace("ranks ", "ranks\n") for name, _ in masks]
        right.set_xticks(range(1, len(masks) + 1), names, fontsize=8.5)
        right.set_ylim(bottom=0)


def exit_points(t: Trajectories, criterion: str) -> list[tuple[float, float, float]]:
    """Threshold, mean step of exit and share of the tokens that are final there, for every threshold tried.

    None for the KL of a record that holds too little of it.
    """
    if criterion == "kl" and not t.has_kl:
        return []
    tried = THRESHOLDS[criterion] or t.steps.tolist()
    points = []
    for threshold in tried:
        if criterion == "patience" and threshold >= len(t.steps):
            break
        exits = t.exit_steps(criterion, threshold)
        points.append((float(threshold), float(exits.mean()), float(t.agreement(exits).mean())))
    return points


def joined(points: Sequence[tuple[float, float]], widest: float) -> tuple[list[float], list[float]]:
    """x and y of a curve that breaks where neighbouring points are more than ``widest`` apart in x: NaN there."""
    xs, ys = [], []
    for i, (x, y) in enumerate(points):
        if i and abs(x - points[i - 1][0]) > widest:
            xs.append(np.nan)
            ys.append(np.nan)
        xs.append(x)
        ys.append(y)
    return xs, ys


def draw_halting(t: Trajectories, path: Path) -> None:
    """Tokens that are final at the exit against the steps spent, a curve for each halting criterion.

    Points further apart than :data:`APART` of the steps are not joined: no threshold in between was tried, or none
    ends a sequence there.
    """
    labels = [
        (
            "Final tokens at the exit",
            "steps performed, mean over the sequences",
            "final tokens (%)",
        ),
        (
            "The same, what is lost",
            "steps performed, mean over the sequences",
            "tokens not final (%)",
        ),
    ]
    with panels(path, labels, note=what_was_run(t)) as (left, right):
        for i, criterion in enumerate(THRESHOLDS):
            points = exit_points(t, criterion)
            if not points:
                continue
            name = {"fixed": "fixed step", "entropy": "entropy", "kl": "KL"}.get(
                criterion, criterion
            )
            style: dict[str, Any] = {
                "color": "#000000" if criterion == "fixed" else PALETTE[i - 1],
                "linestyle": LINES[i % 4],
                "marker": None if criterion == "fixed" else "xosD"[i % 4],
                "markersize": 3,
                "label": name,
            }
            widest = max(1.0, APART * len(t.steps))  # neighbouring steps have nothing between them
            left.plot(*joined([(x, 100 * y) for _, x, y in points], widest), **style)
            right.plot(*joined([(x, 100 * (1 - y)) for _, x, y in points], widest), **style)
        least = (
            50 / t.generated.sum()
        )  # half a token of all that were written: the axis reaches below one
        right.set_yscale("symlog", linthresh=max(0.1, 2 * least))
        right.set_ylim(bottom=0)
        left.set_ylim(top=101)
        for panel in (left, right):
            panel.set_xlim(0, len(t.steps))


def draw_schedule(schedule: Record, path: Path, note: str) -> None:
    """The held-out loss over t, and where the learned time warp spends the steps of training."""
    a = schedule.arrays
    warped = "warp_density" in a
    labels = [
        ("Held-out loss by noise level", "t (noise level σ)", "cross-entropy (nats per token)")
    ]
    if warped:
        labels.append(("Density of t in training", "t (noise level σ)", "p(t), per unit of t"))
    with panels(path, labels, note=note) as axes:
        curve(axes[0], a["times"], a["cross_entropy"].T, "held out, ± one deviation over texts")
        axes[0].set_ylim(bottom=0)
        if warped:
            axes[0].plot(
                a["warp_times"],
                a["warp_fit"],
                color=PALETTE[3],
                linestyle="--",
                label="fit of the time warp",
            )
            slope = np.gradient(a["cross_entropy"].mean(1), a["times"]).clip(min=0)
            area = float(np.trapezoid(slope, a["times"])) or 1.0
            axes[1].plot(
                a["warp_times"],
                a["warp_density"],
                color=PALETTE[3],
                linestyle="--",
                label="learned",
            )
            axes[1].plot(
                a["times"],
                slope / area,
                color=PALETTE[0],
                marker="o",
                markersize=3,
                label="slope of the held-out loss",
            )
            axes[1].axhline(
                1 / float(a["times"][-1] - a["times"][0]),
                color="#000000",
                linestyle=":",
                linewidth=1.2,
                label="uniform",
            )
            axes[1].set_ylim(bottom=0)
