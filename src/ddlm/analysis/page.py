"""A page of the documentation that is filled from a study, so that its numbers cannot drift from the record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddlm.files import write_text
from ddlm.types import DataError

BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
RECORD = "findings.json"


def check_page(page: Path) -> str:
    """The text of a page that can be filled.

    Raises:
        DataError: when it is missing or lacks the marks.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read the page {page}: {error.strerror}") from None
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(
            f"{page} cannot be filled: it needs one line {BEGIN} and one {END} after it"
        )
    return text


def fill_page(page: Path, study: Path) -> None:
    """Copy a study's findings and figures beside a page and write the part between its marks anew.

    Args:
        page: A Markdown file with the marks; assets go to ``assets/NAME`` beside it.
        study: Folder of the study, drawn.
    """
    text = check_page(page)
    assets = page.parent / "assets" / page.stem
    assets.mkdir(parents=True, exist_ok=True)
    record = read_findings(study / RECORD)
    names = [f["name"] for f in record["results"]["figures"]]
    for old in assets.glob("*.svg"):
        old.unlink()
    for name in names:
        shutil.copyfile(study / "figures" / f"{name}.svg", assets / f"{name}.svg")
    shutil.copyfile(study / RECORD, assets / RECORD)
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    write_text(page, f"{before}{BEGIN}\n{render(record, f'assets/{page.stem}')}{END}{after}")


def read_findings(path: Path) -> dict[str, Any]:
    """The record that ``ddlm analyze`` wrote.

    Raises:
        DataError: when it is missing or something else.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert record["kind"] == "analyze"
    except FileNotFoundError:
        raise DataError(f"no findings at {path}: `ddlm analyze` writes them") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise DataError(f"{path} is no record of `ddlm analyze`: write it again") from None
    return record


def render(record: Mapping[str, Any], assets: str) -> str:
    """The findings and figures as Markdown; a function of the record alone.

    Args:
        record: Of ``ddlm analyze``.
        assets: Folder of the pictures, as the page reaches it.
    """
    # A record from before its parts said where they come from tells only when it was last drawn.
    recorded = record["results"].get("recorded")
    lines = [
        line
        for made in recorded or [record]
        for line in _provenance("Recorded" if recorded else "Drawn", made)
    ]
    lines += [
        f"Studied: {record['results']['studied']}. The numbers are those of [{RECORD}]({assets}/{RECORD}).",
        "",
    ]
    drawn = {f["name"]: f for f in record["results"]["figures"]}
    shown: list[str] = []
    for finding in record["results"]["findings"]:
        lines += [
            f"### {finding['question']}",
            "",
            finding["answer"],
            "",
            f"The paper: {finding['paper']}.",
            "",
        ]
        name = finding["figure"]
        if name in drawn and name not in shown:
            lines += _figure(drawn[name], assets)
        elif name in drawn:
            lines += [f"({drawn[name]['title']}, above.)", ""]
        shown.append(name)
    rest = [f for name, f in drawn.items() if name not in shown]
    if rest:
        lines += ["### Further figures", ""]
    for figure in rest:
        lines += _figure(figure, assets)
    return "\n".join(lines)


def _provenance(verb: str, made: Mapping[str, Any]) -> list[str]:
    machine = made["hardware"]["gpus"] or [made["hardware"]["cpu"]]
    return [
        f"{verb} on {made['date'][:10]} on {', '.join(machine)} (torch {made['versions']['torch']}, "
        f"commit {(made['commit'] or 'unknown')[:12]}) with",
        "",
        "```bash",
        made["command"],
        "```",
        "",
    ]


def _figure(figure: Mapping[str, Any], assets: str) -> list[str]:
    return [
        f"![{figure['title']}]({assets}/{figure['name']}.svg)",
        "",
        f"*{figure['title']}.* {figure['caption']}",
        "",
    ]
