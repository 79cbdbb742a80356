"""One function for each kind of item: make what is missing, then write the table or figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ddlm.evaluation.progress import progress_bar
from ddlm.files import write_text
from ddlm.record import make_record, write_record
from ddlm.reproduce import costs, tables
from ddlm.reproduce.figures import draw_paths, draw_steps
from ddlm.reproduce.glue import glue_item
from ddlm.reproduce.milestones import gib
from ddlm.reproduce.recipes import MAIN, SIZES, Recipe, configuration, recipes
from ddlm.reproduce.traces import means, one_line, sampling, trace_checkpoints, traces_item
from ddlm.reproduce.workshop import Workshop
from ddlm.reproduce.writing import (
    main_configuration,
    measured,
    model_facts,
    origin,
    parameters,
    settings_of,
    write_item,
)


def reproduce_item(
    recipe: Recipe,
    shop: Workshop,
    glue: dict[str, Any] | None = None,
    counts: Mapping[str, int] | None = None,
    speed: Path | None = None,
) -> list[str]:
    """Make an item; returns the files that were written, relative to the workshop's folder.

    Args:
        recipe: The item.
        shop: Where everything of the scale lies.
        glue: Options of `ddlm finetune` for the GLUE tables.
        counts: ``prompts`` and ``continuations`` that were asked for, for the page of samples, which shows fewer than
            the protocol measures.
        speed: Record of ``ddlm benchmark sample`` for the right part of figure3; None: measured here where that takes
            seconds.
    """
    if recipe.kind == "glue":
        return glue_item(recipe, shop, glue or {})
    if recipe.kind == "samples":
        return _samples(recipe, shop, **(counts or {}))
    if recipe.kind == "traces":
        return traces_item(recipe, shop, speed)
    makers: dict[str, Callable[[Recipe, Workshop], list[str]]] = {
        "configuration": _configuration,
        "measure": _measure,
    }
    return makers[recipe.kind](recipe, shop)


def _measure(recipe: Recipe, shop: Workshop) -> list[str]:
    shop.train(recipe)
    with progress_bar() as progress:
        rows, sanity = shop.measure(recipe, progress)
    judge, features = shop.open_judges()
    facts = model_facts(recipe, shop) | {
        "baseline": shop.baseline if recipe.needs_baseline() else None,
        "judge": None if judge is None else judge.describe(),
        "judge_is_baseline": recipe.needs_baseline() and _judge_is_baseline(shop),
        "features": None if features is None else features.describe(),
        "prompts": max((r.facts["samples"] for r in rows.values()), default=0)
        // shop.protocol.continuations,
        "continuations": shop.protocol.continuations,
        "held_out": shop.held_out_text,
    }
    results = measured(recipe, rows, sanity, facts)
    drawn: list[str] = []
    if recipe.name == "figure1":
        runs, what = trace_checkpoints(shop)
        results["curves"] = {run.label: means(run) for run in runs}
        results["sampling"] = sampling(runs[0])
        note = f"{what}. {one_line(runs[0])}."
        drawn = [*draw_paths(recipe, shop, runs, note), *draw_steps(recipe, shop, rows)]
    written = write_item(
        recipe,
        shop,
        results,
        tables.page(recipe, rows, sanity, shop.scale, facts),
        tables.tex(recipe, rows, shop.scale, facts),
    )
    return written + drawn


def _configuration(recipe: Recipe, shop: Workshop) -> list[str]:
    from ddlm.settings import field_values

    config = main_configuration(shop)
    values = {**dict(field_values(config)), "parameters": round(parameters(config) / 1e6, 1)}
    page, tex = tables.configuration_table(recipe, values, shop.label)
    if shop.weights is not None:
        page += f"\n{tables.weights_note(shop.weights.describe())}\n"
    return write_item(recipe, shop, values, page, tex)


def _samples(recipe: Recipe, shop: Workshop, prompts: int = 8, continuations: int = 1) -> list[str]:
    """Table 4: a few prefix continuations on a page and on the terminal."""
    from rich.console import Console

    from ddlm.commands.evaluate import load_generator
    from ddlm.evaluation.protocol import draw, held_out

    shop.train(recipe)
    generator, tokenizer, length, _ = load_generator(str(shop.main_folder), shop.model_precision)
    windows = held_out(shop.held_out_text, tokenizer, length, prompts)

    protocol = replace(shop.protocol, prompts=prompts, continuations=continuations, length=length)
    made = draw(
        protocol,
        "prefix",
        generator,
        tokenizer,
        windows,
        shop.folder / "samples",
        protocol.settings,
    )
    shown = [
        (tokenizer.pieces(s.tokens or []), list(s.is_noised or []), tables.repeats(s.tokens or []))
        for s in made
    ]
    steps = f"{protocol.settings.steps} {protocol.settings.solver} steps"
    note = f"{origin(shop)} {steps}; prompts from held-out text."
    page = tables.sample_page(f"Table 4: {recipe.title}", shown, note)
    write_text(shop.folder / f"{recipe.name}.html", page)
    if not shop.quiet:
        for text in tables.sample_lines(shown):
            Console().print(text, end="\n\n")
    record = make_record(
        f"reproduce-{recipe.name}",
        settings_of(shop) | {"protocol": asdict(protocol)},
        {"samples": [asdict(s) for s in made]},
        seed=protocol.seed,
    )
    write_record(shop.folder / f"{recipe.name}.json", record)
    return [f"{recipe.name}.html", f"{recipe.name}.json"]


def _judge_is_baseline(shop: Workshop) -> bool:
    """Whether the autoregressive rows are judged by the model that wrote them."""
    from ddlm.evaluation.hub import cache_folder, fingerprint

    judge, _ = shop.open_judges()
    if judge is None or shop.baseline in (None, "none"):
        return False
    return bool(judge.fingerprint == fingerprint(Path(str(shop.baseline)), cache_folder()))


def listing(scale: str) -> tuple[list[str], list[list[str]]]:
    """What every item needs: headings and lines. Of what the hours are: :func:`ddlm.reproduce.costs.explanation`."""
    size = SIZES[scale]
    kept = gib(parameters(configuration(scale, MAIN, "", None, None)))
    lines = []
    for recipe in recipes().values():
        trainings = len(recipe.trainings())
        extra = []
        if recipe.needs_baseline():
            extra.append("1 autoregressive")
        hub = []
        if recipe.kind == "measure":
            if size.judged_here:
                extra.append("1 judge")
            else:
                hub = ["gpt-neo-1.3B 5.3 GB", "gpt2-large 3.2 GB"]
        if recipe.kind == "glue":
            hub = ["nyu-mll/glue", *(line.model for line in recipe.lines if "/" in line.model)]
        runs = " + ".join([f"{trainings} diffusion"] * bool(trainings) + extra) or "none"
        total = trainings + len(extra)
        beside = costs.hours(recipe, scale)
        disk = total * size.gib + (kept if MAIN in recipe.trainings() else 0)
        most = "at most " if recipe.kind == "glue" else ""
        lines.append(
            [
                recipe.name,
                "; ".join([recipe.title, *filter(None, [recipe.raw.get("also")])]),
                runs,
                size.hours if total else "-",
                f"{most}{costs.shown(beside)}" if beside else "-",
                f"{disk:.1f}" if total else "-",
                ", ".join(hub) or "-",
            ]
        )
    heads = [
        "item",
        "shows",
        "trainings",
        "hours of each training",
        "hours of fine-tuning or sampling",
        "GiB disk",
        "hub files",
    ]
    return heads, lines
