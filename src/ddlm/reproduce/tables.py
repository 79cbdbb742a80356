"""Results in the paper's layout: our number with its interval, the paper's beside it, marked as another scale."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ddlm.evaluation.measure import Estimate, Row
from ddlm.evaluation.report import cell, latex, markdown, to_markdown
from ddlm.reproduce.recipes import Recipe

_STYLE = """body{font:16px/1.6 Georgia,serif;max-width:44em;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.4em}.given{color:#777}p{margin:1.2em 0;padding-left:1em;border-left:3px solid #ddd}
.r1{background:#ffe9a8}.r2{background:#ffc46b}.r3{background:#f58a5b}small{color:#666}"""


def grid(recipe: Recipe, rows: Mapping[tuple[str, str], Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: label, our numbers, the paper's numbers."""
    has_paper = any(line.paper for line in recipe.lines)
    heads = [recipe.name, *(c.head for c in recipe.columns)]
    if has_paper:
        heads += [f"{c.head} (paper)" for c in recipe.columns]
    lines = []
    for line in recipe.lines:
        ours = []
        for column in recipe.columns:
            row = rows.get((line.label, column.task or line.task or ""))
            ours.append(cell(_estimate(row, column.metric)))
        paper = [paper_cell(v) for v in line.paper] if line.paper else ["-"] * len(recipe.columns)
        lines.append([line.label, *ours, *(paper if has_paper else [])])
    return heads, lines


def _estimate(row: Row | None, metric: str) -> Estimate | None:
    return None if row is None else row.metrics.get(metric)


def paper_cell(value: Any) -> str:
    """A number of the paper as it is printed there."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"{value:g}"
    return str(value)


def page(
    recipe: Recipe,
    rows: Mapping[tuple[str, str], Row],
    sanity: Sequence[Row],
    scale: str,
    facts: Mapping[str, Any],
) -> str:
    """The Markdown page of a measured item."""
    heads, lines = grid(recipe, rows)
    return "".join(
        [
            f"# {_title(recipe)}\n\n",
            f"**Another scale than the paper's**: {scale_note(scale, facts)}\n\n",
            f"{weights_note(facts['weights'])}\n\n" if facts.get("weights") else "",
            markdown(heads, lines, left=1),
            f"\n{reading_note(facts)} {recipe.notes}".rstrip() + "\n",
            f"\n## Sanity rows\n\n{to_markdown(sanity)}" if sanity else "",
        ]
    )


def tex(
    recipe: Recipe, rows: Mapping[tuple[str, str], Row], scale: str, facts: Mapping[str, Any]
) -> str:
    """The LaTeX table of a measured item."""
    heads, lines = grid(recipe, rows)
    given = f" {weights_note(facts['weights'])}" if facts.get("weights") else ""
    return (
        f"% {_title(recipe)}. Another scale than the paper's: {scale_note(scale, facts)}{given}\n"
        + latex(heads, lines, left=1)
    )


def _title(recipe: Recipe) -> str:
    kind, number = recipe.name[:-1].capitalize(), recipe.name[-1]
    return f"{kind} {number}: {recipe.title}"


def scale_note(scale: str, facts: Mapping[str, Any]) -> str:
    """What the numbers were made with, in a sentence."""
    # The scale says what is trained; with given weights it only says how much is sampled.
    parts = [f"the protocol of scale `{scale}`" if facts.get("weights") else f"scale `{scale}`"]
    if facts.get("parameters"):
        parts.append(f"{facts['parameters'] / 1e6:.1f}M parameters (paper: 147.0M)")
    if facts.get("training_tokens"):
        millions = facts["training_tokens"] / 1e6
        # Two figures below ten: half a million is no 1M.
        shown = f"{millions:.2g}" if millions < 10 else f"{millions:,.0f}"
        parts.append(f"{shown}M training tokens a model (paper: 65,536M)")
    judge = facts.get("judge")
    if judge:
        own = judge.get("trained_here_on")
        parts.append(
            "judged by a model trained on the same kind of text, so AR-NLL is not in the paper's units"
            if own
            else f"judged by {judge['judge']}"
        )
    return ", ".join(parts) + "."


def weights_note(weights: Mapping[str, Any]) -> str:
    """Which weights were given, and where their recipe is not that of the paper's main model."""
    step = "unknown step" if weights["step"] is None else f"step {weights['step']:,}"
    note = f"Weights given, not trained for this: {weights['path']}, {step}, hash {weights['hash'][:12]}."
    if weights["departures"]:
        note += f" Not the paper's main recipe (the paper's in brackets): {'; '.join(weights['departures'])}."
    return note


def reading_note(facts: Mapping[str, Any]) -> str:
    """How to read the numbers."""
    over, seed = "sampling seeds or prompts", "training seed"
    if facts.get("fine_tuned"):
        over, seed = "seeds of fine-tuning", "seed of pretraining"
    note = f"± is half of the 95% interval over {over}; it does not cover another {seed}."
    if facts.get("archives"):
        note = f"Our scores come from GLUE's server, which takes {', '.join(facts['archives'])}."
    if facts.get("diverged"):
        note += f" Seeds that diverged: {'; '.join(facts['diverged'])}; those without a score are not in the mean."
    if facts.get("prompts"):
        note += f" {facts['prompts']} prompts, {facts['continuations']} continuations each."
    if facts.get("baseline") == "none":
        note += " The autoregressive rows were left out."
    elif facts.get("baseline"):
        note += f" The autoregressive rows are of {facts['baseline']}."
    if facts.get("judge_is_baseline"):
        note += " It is the judge as well: its own samples are likely to it."
    return note


def configuration_table(recipe: Recipe, values: Mapping[str, Any], scale: str) -> tuple[str, str]:
    """Markdown and LaTeX of Table 1."""
    heads = [recipe.name, scale, "paper"]
    lines = [
        [row["label"], paper_cell(values[row["field"]]), paper_cell(row["paper"])]
        for row in recipe.raw["rows"]
    ]
    title = f"# {_title(recipe)}\n\n"
    return title + markdown(heads, lines, left=1), latex(heads, lines, left=1)


def repeats(tokens: Sequence[int]) -> list[int]:
    """How often each token occurred before, in its sequence."""
    seen: dict[int, int] = {}
    out = []
    for token in tokens:
        out.append(seen.get(token, 0))
        seen[token] = out[-1] + 1
    return out


def sample_page(
    title: str, samples: Sequence[tuple[list[str], list[bool], list[int]]], note: str
) -> str:
    """One HTML page without external requests: generated tokens that repeat an earlier one are marked.

    Args:
        title: Heading.
        samples: Pieces, which of them were generated, and how often each token occurred before.
        note: Small print.
    """
    body = []
    for pieces, generated, counts in samples:
        spans = []
        for piece, made, count in zip(pieces, generated, counts, strict=True):
            text = html.escape(piece).replace("\n", "<br>")
            kind = "given" if not made else f"r{min(count, 3)}" if count else ""
            spans.append(f'<span class="{kind}">{text}</span>' if kind else text)
        body.append(f"<p>{''.join(spans)}</p>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        '<p class="given">Grey: the prompt. Marked: a token that occurred before in its text, darker each time.</p>'
        f"{''.join(body)}<small>{html.escape(note)}</small></html>\n"
    )


def sample_lines(samples: Sequence[tuple[list[str], list[bool], list[int]]]) -> list[Any]:
    """The same for the terminal, one rich text a sample."""
    from rich.text import Text

    colours = ("", "black on #ffe9a8", "black on #ffc46b", "black on #f58a5b")
    out = []
    for pieces, generated, counts in samples:
        text = Text()
        for piece, made, count in zip(pieces, generated, counts, strict=True):
            text.append(piece, style="dim" if not made else colours[min(count, 3)])
        out.append(text)
    return out
