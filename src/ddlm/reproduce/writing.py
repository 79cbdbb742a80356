"""What every item writes: its table, its record with all settings, and the facts about its models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddlm.evaluation.measure import Row
from ddlm.files import write_text
from ddlm.record import make_record, write_record
from ddlm.reproduce import tables
from ddlm.reproduce.recipes import MAIN, Recipe, configuration, run_name
from ddlm.reproduce.subjects import read_subject
from ddlm.reproduce.workshop import Workshop


def write_item(recipe: Recipe, shop: Workshop, results: Any, page: str, tex: str) -> list[str]:
    """Write the page, the LaTeX table and the record of an item; returns their names."""
    record = make_record(
        f"reproduce-{recipe.name}", settings_of(shop), results, seed=shop.protocol.seed
    )
    write_record(shop.folder / f"{recipe.name}.json", record)
    write_text(shop.folder / f"{recipe.name}.md", page)
    write_text(shop.folder / f"{recipe.name}.tex", tex)
    if not shop.quiet:
        print(page)
    return [f"{recipe.name}.{kind}" for kind in ("md", "tex", "json")]


def measured(
    recipe: Recipe, rows: Mapping[tuple[str, str], Row], sanity: Sequence[Row], facts: Any
) -> dict[str, Any]:
    """What the record of a table of numbers holds."""
    return {
        "rows": [
            {"label": label, "task_key": task, **asdict(row)} for (label, task), row in rows.items()
        ],
        "sanity": sanity,
        "paper": {line.label: list(line.paper) for line in recipe.lines},
        "facts": facts,
    }


def model_facts(recipe: Recipe, shop: Workshop) -> dict[str, Any]:
    """What a table of numbers says about its models."""
    given = shop.weights
    return {
        "scale": shop.scale,
        "weights": None if given is None else given.describe(),
        "parameters": parameters(main_configuration(shop)),
        "training_tokens": _training_tokens(recipe, shop),
        "trainings": [_training(shop, t) for t in recipe.trainings()] if given is None else [],
    }


def settings_of(shop: Workshop) -> dict[str, Any]:
    """The options of the command, as a record keeps them."""
    return {
        "scale": shop.scale,
        "data": shop.data,
        "held_out_text": shop.held_out_text,
        "steps": shop.steps,
        "budget": shop.budget,
        "judge": shop.judge,
        "features": shop.features,
        "precision": shop.precision,
        "model_precision": shop.model_precision,
        "weights": None if shop.weights is None else shop.weights.describe(),
        "baseline": shop.baseline,
        "protocol": asdict(shop.protocol),
    }


def main_configuration(shop: Workshop) -> Any:
    """What the main model was or will be trained with."""
    if shop.weights is not None:
        return shop.weights.config
    return configuration(shop.scale, MAIN, shop.data, shop.steps, shop.budget)


def origin(shop: Workshop) -> str:
    """Small print of what has no table: which weights."""
    if shop.weights is None:
        return f"Scale {shop.scale};"
    return tables.weights_note(shop.weights.describe())


def parameters(config: Any) -> int:
    """Parameters of the network, counted without making their memory."""
    import torch

    from ddlm.diffusion.process import NoiseProcess
    from ddlm.network.denoiser import DDLM

    with torch.device("meta"):
        model = DDLM(config.model, NoiseProcess(config.process.t_min, config.process.t_max))
    return sum(p.numel() for p in model.parameters())


def _training(shop: Workshop, train: dict[str, Any]) -> dict[str, Any]:
    file = shop.folder / "models" / run_name(train) / "finished.json"
    return {"model": run_name(train), **json.loads(file.read_text("utf-8"))}


def _training_tokens(recipe: Recipe, shop: Workshop) -> float | None:
    """Mean over the models of an item; they differ where a wall-clock budget ended them."""
    if shop.weights is not None:
        return read_subject(Path(), str(shop.weights.folder)).values.get("tokens")
    tokens = [_training(shop, t)["tokens"] for t in recipe.trainings()]
    return sum(tokens) / len(tokens) if tokens else None
