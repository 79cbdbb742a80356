"""The figures of the paper (DDLM, Figures 1 to 3), drawn from records.

S sequences, n steps. Bands reach one standard deviation over the sequences to each side of the mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from ddlm.analysis.figures import LINES, PALETTE, curve, panels, shades, smoothed
from ddlm.analysis.trajectories import Trajectories, nll_half_width
from ddlm.types import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]


SOLVERS = {"euler": "Euler", "heun": "Heun", "dpmpp_2m": "DPM-Solver++(2M)", "sde": "SDE"}
WINDOW = 5  # steps over which switches are averaged in the picture
MOST_BANDS = 5
"""Curves by checkpoint that are drawn with bands: those of more would hide each other."""


def what_was_run(t: Trajectories, label: bool = True) -> str:
    """One line for the small print: model, sequences, steps, solver, temperature, noise."""
    h = t.header
    parts = [t.label] if label else []
    parts += [
        f"{h['sequences']} sequences of {t.tokens.shape[2]} tokens",
        f"{h['steps']} {solver_of(t)} steps on a {h['grid']} grid",
        f"t from {h['t_max']:g} to {h['t_min']:g}",
    ]
    return ", ".join([*parts, *temperature_of(t), "no early exit"])


def solver_of(t: Trajectories) -> str:
    """Name of the solver, as it is printed."""
    name = str(t.header["solver"])
    return SOLVERS.get(name, name)


def temperature_of(t: Trajectories) -> list[str]:
    """The temperature as a part of the small print; none where a record does not say."""
    # A record from before the temperature was named has it in the configuration.
    sample = t.header.get("config", {}).get("sample", {})
    value = t.header.get("temperature", sample.get("temperature"))
    return [] if value is None else [f"temperature {value:g}"]


def draw_checkpoints(runs: Sequence[Trajectories], path: Path, note: str = "") -> None:
    """Figure 1, left: token switches and entropy per step, one line a checkpoint.

    Args:
        runs: Of each checkpoint, oldest first.
        path: Without suffix.
        note: Small print instead of what the header of the last one says.
    """
    labels = [
        (
            "Tokens that switch at a step",
            "sampling step",
            f"switched tokens (%), mean of {WINDOW} steps",
        ),
        ("Uncertainty about the tokens", "sampling step", "entropy (nats per token)"),
    ]
    note = note or what_was_run(runs[-1], label=len(runs) == 1)
    spread = len(runs) <= MOST_BANDS
    with panels(path, labels, note=note) as (left, right):
        colors = shades(len(runs)) if len(runs) > 1 else [PALETTE[0]]
        for i, (t, color) in enumerate(zip(runs, colors, strict=True)):
            line = LINES[i % len(LINES)]
            switched = smoothed(100 * t.switches[:, 1:], WINDOW)
            how: dict[str, Any] = {"color": color, "line": line, "spread": spread}
            curve(left, t.steps[1:], switched, t.label, **how)
            curve(right, t.steps, t.values("entropy"), t.label, **how)
        for axes in (left, right):
            axes.set_xlim(1, len(runs[0].steps))
            axes.set_ylim(bottom=0)


def draw_quality(rows: Rows, path: Path, note: str) -> None:
    """Figure 1, right: quality against the steps allowed and the steps performed, for several n_p.

    The measure is the judge's NLL where there is one, with 95% intervals over the texts; else the share of tokens
    that equal those of the same sequence followed to its last step.
    """
    judged = all(r.get("nll") is not None for r in rows)
    if not rows:
        raise DataError("the record of quality holds no row: record again with --overwrite")
    y = "AR-NLL (nats per judge token)" if judged else "tokens as without early exit (%)"
    labels = [
        ("Steps allowed", "steps allowed, n", y),
        ("Steps performed", "steps performed, mean over the sequences", y),
    ]
    kinds = sorted({r["patience"] for r in rows}, key=lambda p: np.inf if p is None else p)
    with panels(path, labels, note=note) as axes:
        for i, kind in enumerate(kinds):
            chosen = [r for r in rows if r["patience"] == kind]
            value = [r["nll"] if judged else 100 * r["agreement"] for r in chosen]
            error = [nll_half_width(r) or 0.0 for r in chosen] if judged else None
            color = "#000000" if kind is None else shades(len(kinds))[i]
            name = "no early exit" if kind is None else f"$n_p$ = {kind}"
            for panel, key in zip(axes, ("steps", "performed"), strict=True):
                panel.errorbar(
                    [r[key] for r in chosen],
                    value,
                    error,
                    color=color,
                    linestyle=LINES[i % len(LINES)],
                    marker="osD^v<>p"[i % 8],
                    markersize=4.5,
                    capsize=2,
                    label=name,
                )
        for panel in axes:
            panel.set_xscale("log")
            ticks = sorted({r["steps"] for r in rows})
            panel.set_xticks(ticks, [str(n) for n in ticks], minor=False)
            panel.minorticks_off()
            if not judged:
                panel.set_ylim(0, 101)  # a share: nothing is above 100%


def draw_geometry(t: Trajectories, path: Path) -> None:
    """Figure 2: norms of the estimate and of the state, cosines to the final score and the final state."""
    labels = [
        ("Norm of the estimate $\\hat{x}_0$", "sampling step", "L2 norm, mean over positions"),
        ("Norm of the state $x$", "sampling step", "L2 norm, mean over positions"),
        ("Score against the final score", "sampling step", "cosine"),
        ("State against the final state", "sampling step", "cosine"),
    ]
    with panels(path, labels, note=what_was_run(t)) as axes:
        for panel, name in zip(axes, ("x0_norm", "x_norm"), strict=False):
            curve(panel, t.steps, t.values(name), "mean, ± one deviation", color=PALETTE[0])
            panel.axhline(
                t.radius, color="#000000", linestyle=":", linewidth=1.2, label=f"√D = {t.radius:g}"
            )
            panel.set_ylim(bottom=0)
        # x_t = x_0 + t eps has E||x||^2 = D (1 + t^2): where a path of perfect estimates would be
        axes[1].plot(
            t.steps,
            t.radius * np.sqrt(1 + t.times**2),
            color="#000000",
            linestyle="--",
            linewidth=1.2,
            label="noised text, √(D(1 + t²))",
        )
        for panel, name in zip(axes[2:], ("score_cosine", "x_cosine"), strict=True):
            curve(panel, t.steps, t.values(name), "position by position", color=PALETTE[2])
            curve(
                panel,
                t.steps,
                t.values(f"sequence_{name}"),
                "whole sequence",
                color=PALETTE[3],
                line="--",
            )
            panel.set_ylim(top=1.02)
        for panel in axes:
            panel.set_xlim(1, len(t.steps))


def draw_noise_scales(runs: Sequence[Trajectories], path: Path) -> None:
    """Figure 3, left: norm of the state for several scales of the initial noise; the whole path and its end."""
    labels = [
        (
            "Norm of the state by initial noise",
            "sampling step",
            "L2 norm of $x$, mean over positions",
        ),
        ("The same near the sphere", "sampling step", "L2 norm of $x$, mean over positions"),
    ]
    with panels(path, labels, note=what_was_run(runs[0])) as axes:
        lowest, highest = [], []
        for i, (t, color) in enumerate(zip(runs, shades(len(runs)), strict=True)):
            values = t.values("x_norm")
            lowest.append(float(values.mean(0).min()))
            highest.append(float(values.mean(0)[-1]))
            name = f"noise {t.header['noise_scale']:g}"
            for panel in axes:
                curve(panel, t.steps, values, name, color=color, line=LINES[i % len(LINES)])
        for panel in axes:
            panel.axhline(
                runs[0].radius,
                color="#000000",
                linestyle=":",
                linewidth=1.2,
                label=f"√D = {runs[0].radius:g}",
            )
            panel.set_xlim(1, len(runs[0].steps))
        axes[0].set_ylim(bottom=0)
        near = runs[0].radius
        axes[1].set_ylim(0.9 * min(*lowest, near), 1.35 * max(*highest, near))


def timed(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The measurements of what ``ddlm benchmark sample`` wrote.

    Raises:
        DataError: when there is none.
    """
    found = record.get("results") or {}
    cases = [c for c in found.get("cases", []) if c.get("seconds_per_sequence") is not None]
    if not cases:
        raise DataError("the speed record holds no case: run `ddlm benchmark sample` again")
    return cases


def draw_speed(record: Mapping[str, Any], path: Path, source: str = "") -> None:
    """Figure 3, right: seconds to write a sequence against its length, beside autoregressive models.

    A vertical line marks the length at which diffusion is level with the fastest autoregressive model, if it ever is.
    Where one length was measured, the candidates are rows instead and the seconds are across.

    Args:
        record: What ``ddlm benchmark sample`` wrote.
        path: Without suffix.
        source: Small print in front of the record's own, as wide as the picture.

    Raises:
        DataError: when the record holds no measurement.
    """
    cases = timed(record)
    batches = sorted({c["batch"] for c in cases})
    names = list(dict.fromkeys(c["candidate"] for c in cases))
    lengths = sorted({c["length"] for c in cases})
    titles = [f"{b} sequences at once" if b > 1 else "One sequence at a time" for b in batches]
    machine = record["hardware"]["gpus"] or [record["hardware"]["cpu"]]
    note = (
        f"{machine[0]}, {record['results'].get('precision', '')}, medians; bars: fastest to slowest"
    )
    levels = {b: _levels([c for c in cases if c["batch"] == b]) for b in batches}
    if any(levels.values()):
        note += "; vertical: level with the fastest autoregressive model"
    if source:
        note = fill(f"{source} {note}", 95 if len(batches) == 1 else 70 * min(len(batches), 3))
    few = len(names) <= 4
    wide = 5.6 if source and len(batches) == 1 else 3.9  # a column of small print is hard to read
    if len(lengths) == 1:
        labels = [(f"{title}, {lengths[0]} tokens", "seconds a sequence", "") for title in titles]
        with panels(
            path, labels, note=note, columns=3, size=(wide, 1.2 + 0.3 * len(names))
        ) as axes:
            for panel, batch in zip(axes, batches, strict=True):
                of_batch = {c["candidate"]: c for c in cases if c["batch"] == batch}
                _rows(panel, of_batch, names, named=batch == batches[0])
        return
    labels = [(title, "tokens", "seconds a sequence") for title in titles]
    size = (wide, 3.4 if few else 4.2)
    with panels(path, labels, note=note, columns=3, size=size) as axes:
        for panel, batch in zip(axes, batches, strict=True):
            # a longer legend takes room of its own, in the first panel
            titled = few or batch == batches[0]
            for i, name in enumerate(names):
                mine = sorted(
                    (c for c in cases if c["candidate"] == name and c["batch"] == batch),
                    key=lambda c: c["length"],
                )
                middle, ends = _middle_and_ends(mine)
                panel.errorbar(
                    [c["length"] for c in mine],
                    middle,
                    ends,
                    color=PALETTE[i % len(PALETTE)],
                    linestyle=("-." if _EXIT in name else "-") if _ours(name) else "--",
                    marker="osD^v<>p"[i % 8],
                    markersize=4.5,
                    capsize=2,
                    label=_candidate(name) if titled else None,
                )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(lengths, [str(n) for n in lengths], minor=False)
            low, high = _with_decades(panel.get_ylim())
            # a decade for what is written at the marks, one for a long legend
            low, high = low / (10 if levels[batch] else 1), high * (10 if titled and not few else 1)
            panel.set_ylim(low, high)
            for name, (length, seconds) in levels[batch].items():
                _mark(panel, length, low, seconds, PALETTE[names.index(name) % len(PALETTE)])
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("")


def _rows(
    panel: Axes, cases: Mapping[str, Mapping[str, Any]], names: Sequence[str], *, named: bool
) -> None:
    """One row a candidate, the first at the top: the median in seconds and how far it spreads."""
    for i, name in enumerate(names):
        if name in cases:
            middle, ends = _middle_and_ends([cases[name]])
            panel.errorbar(
                middle,
                [i],
                xerr=ends,
                color=PALETTE[i % len(PALETTE)],
                marker="osD^v<>p"[i % 8],
                markersize=4.5,
                capsize=2,
            )
    panel.set_yticks(range(len(names)), [_candidate(n) if named else "" for n in names])
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xscale("log")
    panel.set_xlim(*_with_decades(panel.get_xlim()))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("")


def _middle_and_ends(cases: Rows) -> tuple[list[float], list[list[float]]]:
    """Medians, and the lengths of the bars below and above them."""
    middle = [c["seconds_per_sequence"] for c in cases]
    spread = [c.get("spread") or (m, m) for c, m in zip(cases, middle, strict=True)]
    below = [m - low for m, (low, _) in zip(middle, spread, strict=True)]
    return middle, [below, [high - m for m, (_, high) in zip(middle, spread, strict=True)]]


def _levels(cases: Rows) -> dict[str, tuple[float, float]]:
    """For each of our candidates the length at which it is level with the fastest autoregressive one, and the seconds.

    Between two lengths seconds are taken as powers of the length: straight lines, as the axes show them. Where they
    cross more than once it is the last time, from which on the order stays.
    """
    seconds: dict[str, dict[int, float]] = {}
    fastest: dict[int, float] = {}
    for c in cases:
        each = c["seconds_per_sequence"]
        if _ours(c["candidate"]):
            seconds.setdefault(c["candidate"], {})[c["length"]] = each
        else:
            fastest[c["length"]] = min(each, fastest.get(c["length"], math.inf))
    found = {}
    for name, own in seconds.items():
        gaps = [(n, math.log(own[n] / fastest[n])) for n in sorted(own.keys() & fastest.keys())]
        for (short, before), (long, after) in pairwise(gaps):
            if (before > 0) != (after > 0):
                share = before / (before - after)
                found[name] = (
                    short * (long / short) ** share,
                    own[short] * (own[long] / own[short]) ** share,
                )
    return found


def _mark(panel: Axes, length: float, low: float, high: float, color: str) -> None:
    """A vertical line from the axis to where two lines cross, with the length it stands at."""
    panel.plot([length, length], [low, high], color=color, linestyle=":", linewidth=1.2)
    panel.annotate(
        f"{length:.0f} tokens",
        (length, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(2, 0),
        textcoords="offset points",
        rotation="vertical",
        color=color,
        fontsize=7.5,
        va="bottom",
    )


_EXIT = " patience "


def _ours(name: str) -> bool:
    return name.startswith("ddlm")


def _candidate(name: str) -> str:
    """``ddlm 50 patience 6`` is ``ddlm 50 steps, patience 6``."""
    steps, _, patience = name.partition(_EXIT)
    title = _CANDIDATES.get(name, f"{steps} steps")
    return f"{title}, patience {patience}" if patience else title


def _with_decades(limits: tuple[float, float]) -> tuple[float, float]:
    """Limits of a logarithmic axis widened to whole decades: labels at the powers of ten suffice, a legend fits."""
    low, high = np.log10(limits)
    return float(10 ** np.floor(low)), float(10 ** np.ceil(high))


_CANDIDATES = {"gpt_neox": "GPT-NeoX (autoregressive)", "gpt2": "GPT-2 (autoregressive)"}
