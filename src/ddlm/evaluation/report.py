"""Tables of results: short on the terminal, Markdown for pages, LaTeX for papers; every number with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ddlm.evaluation.measure import Estimate, Row


@dataclass(frozen=True)
class Column:
    """A metric and how it is headed.

    Attributes:
        key: Name in :attr:`ddlm.evaluation.measure.Row.metrics`.
        head: Heading.
        digits: Digits after the point.
    """

    key: str
    head: str
    digits: int = 2


COLUMNS = (
    Column("mauve", "MAUVE"),
    Column("nll", "AR-NLL"),
    Column("nll_reference", "real NLL"),
    Column("dist_1", "dist-1"),
    Column("dist_2", "dist-2"),
    Column("dist_3", "dist-3"),
    Column("self_bleu", "self-BLEU"),
    Column("token_entropy", "entropy"),
    Column("zipf", "Zipf"),
    Column("across_entropy", "across"),
    Column("repetition", "repetition", 3),
)
"""The paper's Table 5 and what guards it: real continuation, entropy across samples, repetition."""

SHORT = ("mauve", "nll", "dist_1", "self_bleu", "token_entropy")
"""What a narrow terminal shows; files hold everything."""

CURVE = tuple(c for c in COLUMNS if c.key not in ("mauve", "nll_reference", "zipf", "dist_3"))
"""Quality (AR-NLL) against diversity."""


def cell(estimate: Estimate | None, digits: int = 2) -> str:
    """``4.28 ±0.03``; a dash where nothing was measured, no interval where there is none."""
    if estimate is None:
        return "-"
    half = half_width(estimate)
    if half is None:
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} ±{half:.{digits}f}"


def half_width(estimate: Estimate) -> float | None:
    """Half of the 95% interval, the larger side where it is cut at 0 or 1."""
    if estimate.low is None or estimate.high is None:
        return None
    return max(estimate.high - estimate.value, estimate.value - estimate.low)


def cells(row: Row, columns: Sequence[Column]) -> list[str]:
    """The line of a row."""
    return [row.name, row.task, *(cell(row.metrics.get(c.key), c.digits) for c in columns)]


def used(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> list[Column]:
    """The columns in which at least one row has a number."""
    return [c for c in columns if any(c.key in r.metrics for r in rows)]


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int = 2) -> str:
    """A Markdown table; the first ``left`` columns are text."""
    marks = ["---" if i < left else "---:" for i in range(len(heads))]
    out = [heads, marks, *lines]
    return "".join("| " + " | ".join(_plain(c) for c in line) + " |\n" for line in out)


def latex(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int = 2) -> str:
    """A LaTeX table (package booktabs)."""
    kinds = "l" * left + "r" * (len(heads) - left)
    body = " \\\\\n".join(" & ".join(_latex(c) for c in line) for line in lines)
    head = " & ".join(_latex(h) for h in heads)
    return (
        f"\\begin{{tabular}}{{{kinds}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body} \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def heads(columns: Sequence[Column]) -> list[str]:
    """Headings of a table of rows."""
    return ["samples", "task", *(c.head for c in columns)]


def to_markdown(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> str:
    """Rows as a Markdown table."""
    shown = used(rows, columns)
    return markdown(heads(shown), [cells(r, shown) for r in rows])


def to_latex(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> str:
    """Rows as a LaTeX table."""
    shown = used(rows, columns)
    return latex(heads(shown), [cells(r, shown) for r in rows])


def page(title: str, rows: Sequence[Row], curves: Sequence[Row], notes: Sequence[str]) -> str:
    """A Markdown page: the table, the curves and what a reader must know."""
    parts = [f"# {title}\n", to_markdown(rows), "\n95% intervals. " + " ".join(notes) + "\n"]
    if curves:
        parts += ["\n## Quality against diversity\n\n", to_markdown(curves, CURVE)]
    return "".join(parts)


def show(title: str, rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> None:
    """Print rows: the few columns that fit 80 characters, all of them where the terminal is wide."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shown = used(rows, columns)
    if console.width < 24 + 12 * len(shown):
        shown = [c for c in shown if c.key in SHORT]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("samples")
    for column in shown:
        table.add_column(column.head, justify="right", no_wrap=True)
    for row in rows:
        name = row.name if row.task == "unconditional" else f"{row.name}, {row.task}"
        table.add_row(name, *cells(row, shown)[2:])
    console.print(table)


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%_#${}"}
    | {
        "\\": "\\textbackslash{}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "±": "$\\pm$",
        "×": "$\\times$",
    }
)


def _latex(text: str) -> str:
    return text.translate(_LATEX)
