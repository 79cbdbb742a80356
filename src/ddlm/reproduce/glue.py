"""Tables 6 and 7: every model through `ddlm finetune`, then the paper's layout with the paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddlm.evaluation.intervals import mean
from ddlm.evaluation.measure import Row
from ddlm.reproduce import tables
from ddlm.reproduce.recipes import MAIN, Recipe, run_name
from ddlm.reproduce.workshop import Workshop
from ddlm.reproduce.writing import measured, model_facts, write_item


def glue_item(recipe: Recipe, shop: Workshop, options: Mapping[str, Any]) -> list[str]:
    """Fine-tune every row on all tasks and write the table; returns the files.

    `ddlm finetune` keeps every run in its own folder, with a table of all settings.

    Args:
        recipe: Table 6 or 7.
        shop: Where everything of the scale lies.
        options: Options of `ddlm finetune`; ``hub``: also the models of the hub.
    """
    from ddlm.commands.finetune import finetune
    from ddlm.downstream.report import read_summaries

    shop.train(recipe)
    main = shop.folder / "models" / run_name(MAIN)
    out = shop.folder / "glue"
    archives: list[str] = []
    names: dict[str, str] = {}
    for line in recipe.lines:
        chosen: dict[str, Any] = {"precision": shop.model_precision or "auto", **options}
        hub = chosen.pop("hub", False)
        if line.model == "scratch":
            chosen |= {"model": "scratch", "config": str(main), "name": "from scratch"}
        elif line.train is not None:
            folder = shop.model_folder(line)
            chosen |= {"model": str(folder), "name": folder.name}
        elif hub:
            chosen |= {"model": line.model, "name": Path(line.model).name}
        else:
            shop.say(f"{line.label} needs the hub: left out (--hub takes it)")
            continue
        names[line.label] = chosen["name"]
        if recipe.raw.get("submit"):
            archives.append(f"{recipe.name}-{chosen['name']}.zip")
            chosen["submit"] = shop.folder / archives[-1]
        finetune(**{"task": "all", "out": out, **chosen})
    # Scores on the test sets are not ours to compute: those cells stay empty.
    found = [] if recipe.raw.get("submit") else read_summaries(out)
    rows = glue_rows(recipe, names, found)
    facts = model_facts(recipe, shop) | {
        "fine_tuned": True,
        "archives": archives,
        "diverged": _diverged(rows),
    }
    table = write_item(
        recipe,
        shop,
        measured(recipe, rows, [], facts),
        tables.page(recipe, rows, [], shop.scale, facts),
        tables.tex(recipe, rows, shop.scale, facts),
    )
    return ["glue/table.md", *archives, *table]


def glue_rows(
    recipe: Recipe, names: Mapping[str, str], summaries: Sequence[Mapping[str, Any]]
) -> dict[tuple[str, str], Row]:
    """The scores of whole tasks in percent, by (label, task).

    Args:
        recipe: The table.
        names: Label of a row to the model's name in the summaries.
        summaries: Of `ddlm finetune`; those of a part of a task are no GLUE scores and are left out.
    """
    known = {(s["model"], s["task"]): s for s in summaries if s["is_glue"]}
    rows: dict[tuple[str, str], Row] = {}
    for line in recipe.lines:
        for column in recipe.columns:
            task = str(column.task)
            summary = known.get((names.get(line.label, ""), task))
            if summary is None:
                continue
            score = summary["metrics"].get(column.metric)
            metrics = (
                {column.metric: mean([100 * v for v in score["values"]], "seeds")} if score else {}
            )
            facts = {
                k: summary[k]
                for k in ("model", "setting", "searched", "pruned", "seeds")
                if k in summary
            }
            rows[line.label, task] = Row(
                line.label, task, metrics, facts | {"diverged": summary.get("diverged", 0)}
            )
    return rows


def _diverged(rows: Mapping[tuple[str, str], Row]) -> list[str]:
    """Where seeds were lost: a mean over the others has to say so."""
    return [
        f"{row.name} on {row.task}: {row.facts['diverged']} of {row.facts.get('seeds', '?')}"
        for row in rows.values()
        if row.facts["diverged"]
    ]
