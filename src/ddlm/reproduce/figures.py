"""Pictures of the figures: curves along the sampling path, of one model or by checkpoint, and quality against steps."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from ddlm.evaluation.measure import Row
from ddlm.evaluation.report import half_width
from ddlm.reproduce.recipes import Recipe, settings
from ddlm.reproduce.workshop import Workshop
from ddlm.reproduce.writing import origin

if TYPE_CHECKING:
    from ddlm.analysis.trajectories import Trajectories

_PANELS = {
    "x0_norm": "norm of x0_hat (mean over positions)",
    "x_norm": "norm of x (mean over positions)",
    "score_cosine": "cosine of the score to the final score",
    "x_cosine": "cosine of x to the final x",
}


def draw_traces(
    recipe: Recipe,
    shop: Workshop,
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    note: str,
) -> list[str]:
    """Draw the curves of Figures 2 and 3; returns the files.

    Args:
        recipe: The figure.
        shop: Where it is written, and whose it is.
        curves: Noise scale to the mean of each quantity at every step.
        note: How the sequences were sampled, for the small print.
    """
    from ddlm.analysis.figures import panels

    shown = _PANELS if recipe.name == "figure2" else {"x_norm": _PANELS["x_norm"]}
    written = []
    note = fill(f"{origin(shop)} {note}", 110)
    for key, label in shown.items():
        name = f"{recipe.name}-{key}"
        labels = [(f"{recipe.title} ({shop.label})", "step", label)]
        with panels(shop.folder / name, labels, note=note, size=(6.4, 3.8)) as (axes,):
            for scale, curve in curves.items():
                axes.plot(range(1, len(curve[key]) + 1), curve[key], label=f"noise scale {scale}")
        written += [f"{name}.png", f"{name}.svg"]
    return written


def draw_paths(
    recipe: Recipe, shop: Workshop, runs: Sequence[Trajectories], note: str
) -> list[str]:
    """Draw switches and entropy over the solver's steps (Figure 1, left); returns the files.

    Without matplotlib there is no picture, and a line says why: the numbers are in the record.

    Args:
        recipe: Figure 1.
        shop: Where it is written, and whose it is.
        runs: One for each curve, in the order of the training.
        note: What they are of and how they were sampled, for the small print.
    """
    name = f"{recipe.name}-paths"
    files = _fresh(shop, name)
    if not _can_draw(recipe, shop):
        return []
    from ddlm.analysis.paper import MOST_BANDS, draw_checkpoints

    if len(runs) <= MOST_BANDS:
        note += " Bands: one standard deviation over the sequences."
    draw_checkpoints(runs, shop.folder / name, fill(f"{origin(shop)} {note}", 150))
    return files


def _fresh(shop: Workshop, name: str) -> list[str]:
    """Files of a picture of two panels; earlier ones would show other numbers than the record beside them."""
    files = [f"{name}.png", f"{name}.svg", f"{name}-narrow.svg"]
    for file in files:
        (shop.folder / file).unlink(missing_ok=True)
    return files


def _can_draw(recipe: Recipe, shop: Workshop) -> bool:
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    shop.say(f"no picture of {recipe.name}: matplotlib is missing, pip install 'ddlm[plots]'")
    return False


def draw_steps(recipe: Recipe, shop: Workshop, rows: Mapping[tuple[str, str], Row]) -> list[str]:
    """Draw AR-NLL against the steps allowed and performed (Figure 1, right); returns the files.

    Without a judge or without matplotlib there is no picture, and a line says why: the numbers are written already.
    """
    name = f"{recipe.name}-quality"
    files = _fresh(shop, name)
    points = [
        _point(shop, line.sample, row)
        for line in recipe.lines
        if (row := rows.get((line.label, line.task or ""))) is not None
    ]
    if not points or any(p["nll"] is None for p in points):
        shop.say(f"no picture of {recipe.name}: without a judge there is no AR-NLL to draw")
        return []
    if not _can_draw(recipe, shop):
        return []
    from ddlm.analysis.paper import draw_quality

    judge, _ = shop.open_judges()
    used = shop.protocol.settings
    note = fill(
        f"{origin(shop)} {used.solver} steps, temperature {used.temperature:g}, judge "
        f"{judge.name if judge else 'none'}; bars: 95% intervals over sampling seeds.",
        110,
    )
    draw_quality(points, shop.folder / name, note)
    return files


def _point(shop: Workshop, sample: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """A row as :func:`ddlm.analysis.paper.draw_quality` takes it."""
    used = settings(shop.protocol.settings, sample)
    patience = int(used.halt.removeprefix("patience:")) if used.halt else None
    nll = row.metrics.get("nll")
    return {
        "steps": used.steps,
        "patience": patience,
        "performed": row.metrics["mean_steps"].value,
        "nll": None if nll is None else nll.value,
        "nll_half_width": None if nll is None else half_width(nll),
        "agreement": None,
    }
