"""Where sample files come from: they are kept and measured again, by later programs and on other machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ddlm.files import write_text
from ddlm.record import commit, commit_of, hardware, machine_of, versions

UNKNOWN: dict[str, Any] = {"commit": None, "versions": {}, "hardware": None}
"""Of files from before this was written beside them."""


def write_origin(file: Path) -> None:
    """Write the commit, versions and hardware of this process beside ``file``."""
    here = {"commit": commit(), "versions": versions(), "hardware": hardware()}
    write_text(_beside(file), json.dumps(here, indent=1) + "\n")


def read_origin(file: Path) -> dict[str, Any]:
    """What stands beside ``file``, or :data:`UNKNOWN`."""
    try:
        found = json.loads(_beside(file).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return UNKNOWN
    return UNKNOWN | found if isinstance(found, dict) else UNKNOWN


def distinct(origins: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of them once, in the order in which they appear."""
    out: list[dict[str, Any]] = []
    for one in origins:
        if one not in out:
            out.append(one)
    return out


def elsewhere(origins: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines that say which samples were not drawn by this commit on this machine."""
    here = commit(), machine_of({"hardware": hardware()})
    lines = []
    for one in origins:
        if one["hardware"] is None:
            lines.append(
                "Samples that were there already do not say by which commit and on what they were drawn."
            )
            continue
        if (one["commit"], machine_of(one)) != here:
            lines.append(
                f"Samples that were there already were drawn at commit {commit_of(one)} on {machine_of(one)}."
            )
    return list(dict.fromkeys(lines))


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.origin.json")
