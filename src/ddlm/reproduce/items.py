"""One function for each kind of item: make what is missing, then write the table or figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ddlm.evaluation.progress import progress_bar
from ddlm.files import write_text
from ddlm.record import make_record, write_record
from ddlm.reproduce import tables
from ddlm.reproduce.figures import draw_steps, draw_traces
from ddlm.reproduce.glue import glue_item
from ddlm.reproduce.recipes import SIZES, Recipe, recipes
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

_TRACE_STEPS = 200
_TRACE_SAMPLES = 32


def reproduce_item(
    recipe: Recipe,
    shop: Workshop,
    glue: dict[str, Any] | None = None,
    counts: Mapping[str, int] | None = None,
) -> list[str]:
    """Make an item; returns the files that were written, relative to the workshop's folder.

    Args:
        recipe: The item.
        shop: Where everything of the scale lies.
        glue: Options of `ddlm finetune` for the GLUE tables.
        counts: ``prompts`` and ``continuations`` that were asked for, for the page of samples, which shows fewer than
            the protocol measures.
    """
    if recipe.kind == "glue":
        return glue_item(recipe, shop, glue or {})
    if recipe.kind == "samples":
        return _samples(recipe, shop, **(counts or {}))
    makers: dict[str, Callable[[Recipe, Workshop], list[str]]] = {
        "configuration": _configuration,
        "measure": _measure,
        "traces": _traces,
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
    written = write_item(
        recipe,
        shop,
        measured(recipe, rows, sanity, facts),
        tables.page(recipe, rows, sanity, shop.scale, facts),
        tables.tex(recipe, rows, shop.scale, facts),
    )
    return written + (draw_steps(recipe, shop, rows) if recipe.name == "figure1" else [])


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
        f"reproduce-{recipe.name}", settings_of(shop), {"samples": [asdict(s) for s in made]}
    )
    write_record(shop.folder / f"{recipe.name}.json", record)
    return [f"{recipe.name}.html", f"{recipe.name}.json"]


def _traces(recipe: Recipe, shop: Workshop) -> list[str]:
    """Figures 2 and 3: norms and cosines along 200 steps, mean over positions and sequences."""
    import torch

    from ddlm.lm import load

    shop.train(recipe)
    lm = load(shop.main_folder, precision=shop.model_precision)
    # The protocol's sampler, as in the tables, whatever the model's own defaults; the figure's number of steps.
    used = replace(shop.protocol.settings, steps=_TRACE_STEPS, halt=None)
    sampling = {
        "steps": used.steps,
        "solver": used.solver,
        "temperature": used.temperature,
        "grid": lm.config.sample.grid,
        "samples": _TRACE_SAMPLES,
        "noise_scales": list(recipe.raw["noise_scales"]),
    }
    how = (
        f"{used.steps} {used.solver} steps on a {sampling['grid']} grid, temperature {used.temperature:g}, "
        "no early exit"
    )
    curves: dict[str, dict[str, list[float]]] = {}
    for scale in recipe.raw["noise_scales"]:
        shop.say(f"tracing {_TRACE_SAMPLES} sequences at noise scale {scale:g}, {how}")
        made = lm.generate(
            f"{{{lm.length}}}",
            samples=_TRACE_SAMPLES,
            steps=used.steps,
            solver=used.solver,
            temperature=used.temperature,
            noise_scale=scale,
            seed=shop.protocol.seed,
            trace=True,
        )
        traces = [g.traces[0] for g in made]

        def mean(name: str, traces: list[Any] = traces) -> list[float]:
            stacked = torch.stack([getattr(t, name) for t in traces]).float()
            values: list[float] = (
                stacked.flatten(2).mean((0, 2)).tolist()
                if stacked.dim() > 2
                else stacked.mean(0).tolist()
            )
            return values

        tokens = torch.stack([t.tokens for t in traces])  # (S, n, T)
        switches = (tokens[:, 1:] != tokens[:, :-1]).float().mean((0, 2)).tolist()
        curves[f"{scale:g}"] = {
            "t": traces[0].times.tolist(),
            "switches": [float("nan"), *switches],
            "entropy": mean("entropy"),
            "x0_norm": mean("x0_norm"),
            "x_norm": mean("x_norm"),
            "score_cosine": mean("sequence_score_cosine"),
            "x_cosine": mean("sequence_x_cosine"),
        }
    config = settings_of(shop)
    config["protocol"]["settings"] = asdict(used)
    record = make_record(
        f"reproduce-{recipe.name}",
        config,
        {"curves": curves, "sampling": sampling},
        seed=shop.protocol.seed,
    )
    write_record(shop.folder / f"{recipe.name}.json", record)
    return [f"{recipe.name}.json", *draw_traces(recipe, shop, curves, how, _TRACE_SAMPLES)]


def _judge_is_baseline(shop: Workshop) -> bool:
    """Whether the autoregressive rows are judged by the model that wrote them."""
    from ddlm.evaluation.hub import cache_folder, fingerprint

    judge, _ = shop.open_judges()
    if judge is None or shop.baseline in (None, "none"):
        return False
    return bool(judge.fingerprint == fingerprint(Path(str(shop.baseline)), cache_folder()))


def listing(scale: str) -> tuple[list[str], list[list[str]]]:
    """What every item needs: headings and lines."""
    size = SIZES[scale]
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
        lines.append(
            [
                recipe.name,
                recipe.title,
                runs,
                size.hours if total else "-",
                f"{total * size.gib:g} GiB",
                ", ".join(hub) or "-",
            ]
        )
    return ["item", "shows", "trainings", "hours each", "disk", "hub files"], lines
