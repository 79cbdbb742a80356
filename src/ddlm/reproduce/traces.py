"""Sampling paths of the main model and of its checkpoints, and the record of the figures that are drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddlm.record import make_record, write_record
from ddlm.reproduce.figures import draw_traces
from ddlm.reproduce.recipes import Recipe
from ddlm.reproduce.speed import speed_part
from ddlm.reproduce.workshop import Workshop
from ddlm.reproduce.writing import settings_of

if TYPE_CHECKING:
    from ddlm.analysis.trajectories import Trajectories

STEPS = 200
"""Of every path, as in the paper."""
SEQUENCES = 32
MOST_CHECKPOINTS = 8
"""More curves could not be told apart in one picture."""


def traces_item(recipe: Recipe, shop: Workshop, speed: Path | None = None) -> list[str]:
    """Figures 2 and 3: norms and cosines along the path, and beside those of figure3 the speed; returns the files.

    Args:
        recipe: The figure.
        shop: Where everything of the scale lies.
        speed: Record of ``ddlm benchmark sample`` for figure3; None: measured here where that takes seconds.
    """
    shop.train(recipe)
    runs = {
        f"{scale:g}": trace(shop, shop.main_folder, scale, f"noise scale {scale:g}")
        for scale in recipe.raw["noise_scales"]
    }
    curves = {scale: means(run) for scale, run in runs.items()}
    first = next(iter(runs.values()))
    note = f"{one_line(first)}."
    results: dict[str, Any] = {
        "curves": curves,
        "sampling": sampling(first) | {"noise_scales": list(recipe.raw["noise_scales"])},
    }
    drawn: list[str] = []
    if recipe.name == "figure3":
        results["speed"], why, drawn = speed_part(recipe, shop, speed)
        note += f" {why}"
    config = settings_of(shop)
    config["protocol"]["settings"] = asdict(_used(shop))
    record = make_record(f"reproduce-{recipe.name}", config, results, seed=shop.protocol.seed)
    write_record(shop.folder / f"{recipe.name}.json", record)
    return [f"{recipe.name}.json", *draw_traces(recipe, shop, curves, note), *drawn]


def trace_checkpoints(shop: Workshop) -> tuple[list[Trajectories], str]:
    """Paths of every checkpoint of the main model's run folder, oldest first, and in words what they are of.

    Where the training kept milestones, they and the last checkpoint are taken. Of more than
    :data:`MOST_CHECKPOINTS` as many are taken, evenly spaced. A model that is no run folder with several checkpoints
    has one path.
    """
    from ddlm.checkpoint import checkpoints, find_model
    from ddlm.reproduce.milestones import milestones
    from ddlm.study import labels_of
    from ddlm.types import local

    run = local(shop.weights.path) if shop.weights else shop.main_folder
    found = checkpoints(run)
    if kept := milestones(run):
        found = [*(k for k in kept if k.name != found[-1].name), found[-1]] if found else kept
    if len(found) > 1:
        chosen = _spaced(found)
        count = f"{len(chosen)} of {len(found)}" if len(chosen) < len(found) else f"{len(found)}"
        what = f"Curves: {count} checkpoints of the run folder {run.name}"
    else:
        chosen = found or [find_model(shop.main_folder)]
        what = "One curve: the model alone; a run folder with several checkpoints has one for each"
    labels = labels_of(chosen)
    return [trace(shop, folder, 1.0, labels[folder]) for folder in chosen], what


def trace(shop: Workshop, folder: Path, noise_scale: float, label: str) -> Trajectories:
    """Write sequences from nothing and keep their paths.

    Args:
        shop: Seed and precision. The sampler is the protocol's, as in the tables, whatever the model's own defaults.
        folder: The model.
        noise_scale: Of the initial noise.
        label: Name of the curve.
    """
    import numpy as np

    from ddlm.analysis.record import Record
    from ddlm.analysis.trajectories import Trajectories
    from ddlm.device import find_device, resolve_precision
    from ddlm.lm import load

    lm = load(folder, precision=resolve_precision(shop.model_precision or "auto", find_device()))
    used = _used(shop)
    header = {
        "label": label,
        "sequences": SEQUENCES,
        "steps": used.steps,
        "solver": used.solver,
        "grid": used.grid_name,
        "temperature": used.temperature,
        "noise_scale": noise_scale,
        "t_min": lm.process.t_min,
        "t_max": lm.process.t_max,
        "embedding_width": lm.config.model.embedding_width,
    }
    shop.say(f"tracing {label}: {_sampler(header)}")
    made = lm.generate(
        f"{{{lm.length}}}",
        samples=SEQUENCES,
        steps=used.steps,
        solver=used.solver,
        grid=used.grid_name,
        temperature=used.temperature,
        noise_scale=noise_scale,
        seed=shop.protocol.seed,
        trace=True,
        refine=0,  # no path shows it
    )
    paths = [g.traces[0] for g in made]
    arrays = {
        "tokens": np.stack([p.tokens.numpy() for p in paths]),
        "generated": np.stack([p.generated.numpy() for p in paths]),
        "times": paths[0].times.numpy(),
    }
    for name in ("entropy", "x0_norm", "x_norm"):
        arrays[f"mean_{name}"] = np.stack([p.mean(name)[0].numpy() for p in paths])
    for name in ("sequence_score_cosine", "sequence_x_cosine"):
        arrays[name] = np.stack([getattr(p, name).numpy() for p in paths])
    return Trajectories(Record("trajectories", header | {"sequences": len(paths)}, arrays))


def means(run: Trajectories) -> dict[str, list[float]]:
    """Every quantity at every step, the mean over positions and sequences; the first step has no switches."""

    def mean(name: str) -> list[float]:
        values: list[float] = run.values(name).mean(0).tolist()
        return values

    return {
        "t": run.times.tolist(),
        "switches": [float("nan"), *run.switches[:, 1:].mean(0).tolist()],
        "entropy": mean("entropy"),
        "x0_norm": mean("x0_norm"),
        "x_norm": mean("x_norm"),
        "score_cosine": mean("sequence_score_cosine"),
        "x_cosine": mean("sequence_x_cosine"),
    }


def sampling(run: Trajectories) -> dict[str, Any]:
    """How a path was sampled, for the record."""
    keys = ("steps", "solver", "temperature", "grid")
    return {k: run.header[k] for k in keys} | {"samples": run.header["sequences"]}


def one_line(run: Trajectories) -> str:
    """How a path was sampled, for the small print."""
    return f"Mean over {run.header['sequences']} sequences; {_sampler(run.header)}"


def _sampler(header: dict[str, Any]) -> str:
    return (
        f"{header['steps']} {header['solver']} steps on a {header['grid']} grid, temperature "
        f"{header['temperature']:g}, no early exit"
    )


def _used(shop: Workshop) -> Any:
    return replace(shop.protocol.settings, steps=STEPS, halt=None)


def _spaced(found: Sequence[Path]) -> list[Path]:
    count = min(MOST_CHECKPOINTS, len(found))
    return [found[round(i * (len(found) - 1) / (count - 1))] for i in range(count)]
