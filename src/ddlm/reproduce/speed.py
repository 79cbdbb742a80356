"""The right part of figure3: seconds to write a sequence, against its length, beside GPT-NeoX and GPT-2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ddlm.reproduce.recipes import Recipe
from ddlm.reproduce.workshop import Workshop
from ddlm.reproduce.writing import main_configuration, origin, parameters

MEASURED = "speed.json"
"""The record that is measured here; its name is no item's, which are refused where they are of another model."""

MOST_PARAMETERS = 10_000_000
"""A larger model takes minutes or hours on a CPU, which a command that draws figures should not take unasked."""

_SMALL: dict[str, Any] = {
    "rounds": 2,
    "lengths": (16, 32, 64, 128),
    "batches": (1,),
    "budget": 3.0,  # seconds of one case: about a minute for all of them on a busy core
    # The benchmark's measurement over a queue is in no figure.
    "queue": 1,
    "slots": 1,
    "exit_steps": 1,
}


def speed_part(
    recipe: Recipe, shop: Workshop, given: Path | None
) -> tuple[dict[str, Any] | None, str, list[str]]:
    """Draw the speed from a record, measured here where that takes seconds and none is given.

    Args:
        recipe: Figure 3.
        shop: Where it is written, and whose it is.
        given: A record of ``ddlm benchmark sample``, or None.

    Returns:
        The record, or None; a sentence for the other part that says where this one is, or how to add it; the files.
    """
    from ddlm.analysis.gallery import read_speed
    from ddlm.analysis.paper import draw_speed

    name = f"{recipe.name}-speed"
    files = [f"{name}.png", f"{name}.svg", f"{name}-narrow.svg"]
    for file in files:  # an earlier picture would be of another record
        (shop.folder / file).unlink(missing_ok=True)
    measured: list[str] = []
    if given is None:
        if why := _too_much(shop):
            model = shop.weights.path if shop.weights else shop.main_folder
            why = (
                f"The paper's right part, seconds against length beside GPT-NeoX, is left out: {why}. "
                f"`ddlm benchmark sample --weights {model} --out speed.json` measures it, --speed speed.json adds it."
            )
            shop.say(f"{recipe.name}: {why}")
            return None, why, []
        given = _measure(shop)
        measured = [given.name]
    record = read_speed(given)
    batches = {c["batch"] for c in record["results"]["cases"]}
    draw_speed(record, shop.folder / name, source=_source(shop, record, given))
    if len(batches) < 2:
        files.pop()
    return record, f"The paper's right part, seconds against length: {name}.", measured + files


def _too_much(shop: Workshop) -> str:
    """Why it is not measured here, or nothing."""
    count = parameters(main_configuration(shop))
    if count > MOST_PARAMETERS:
        return (
            f"the model has {count / 1e6:.1f}M parameters, and measured here are at most "
            f"{MOST_PARAMETERS / 1e6:.0f}M"
        )
    if importlib.util.find_spec("transformers") is None:
        return "transformers is missing (pip install 'ddlm[eval]')"
    return ""


def _measure(shop: Workshop) -> Path:
    from ddlm.benchmark.sample import benchmark_sample

    shop.say("measuring seconds against length, about a minute")
    out = shop.folder / MEASURED

    def say(text: str) -> None:
        if text.startswith("batch"):  # the other lines are of what the figure does not show
            shop.say(text)

    benchmark_sample(
        str(shop.main_folder),
        **_SMALL,
        precision=shop.model_precision or "auto",
        out=out,
        say=say,
    )
    return out


def _source(shop: Workshop, record: dict[str, Any], file: Path) -> str:
    """What the picture was drawn from: the record may be of another model than the rest of the figure."""
    model = (record.get("config") or {}).get("model")
    whose = f"of {Path(model).name}" if model else "with random weights"
    if file == shop.folder / MEASURED:
        return (
            f"{origin(shop)} Measured for this figure, {record['date'][:10]} (record {MEASURED}); early exit and "
            f"autoregressive models up to the length that takes them {_SMALL['budget']:g} s;"
        )
    return f"Record {file.name} {whose}, by `{record['command']}` on {record['date'][:10]};"
