"""The folder a preparation writes to: whose it is, when it is finished, and who may write."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddlm.data.shards import (
    FORMAT,
    INDEX,
    STATE,
    VERSION,
    Split,
    TokenShards,
    id_dtype,
    index_sha256,
    sync_folder,
    write_json,
)
from ddlm.data.tokenizer import Tokenizer
from ddlm.types import ConfigError

_PIECE = re.compile("piece-[0-9]{5,}-of-[0-9]{5,}")


def piece_name(rank: int, world_size: int) -> str:
    """Folder of one machine's piece, inside the data set's."""
    return f"piece-{rank:05d}-of-{world_size:05d}"


def check_place(folder: Path) -> None:
    """Raise ConfigError unless a preparation may write to ``folder``: new, empty, or begun by a preparation.

    Writing replaces a tokenizer.json and deletes shards, so nothing of somebody else's may lie there. Hidden files do
    not count: none is ever written or deleted.
    """
    for place in (folder, *folder.parents):
        if os.path.lexists(place) and not place.is_dir():
            what = "is a file" if place.exists() else "is a link to nothing"
            raise ConfigError(f"{place} {what}, shards need a folder: choose another one")
    names = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in names if not name.startswith(".")]
    # Looked for after the listing and in the order of a preparation's life: another process may be writing there.
    begun = (
        not names
        or names == [f"{STATE}.part"]
        or (folder / STATE).is_file()
        or any(_PIECE.fullmatch(name) for name in names)
        or (folder / INDEX).is_file()
    )
    if not begun:
        raise ConfigError(
            f"{folder} holds something else than prepared data ({_few(names)}): choose a new or an empty folder"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_state(folder: Path) -> dict[str, Any] | None:
    """What an unfinished preparation left in ``folder`` to go on from; None if there is none.

    Raises:
        ConfigError: if the file of that name is damaged or somebody else's.
    """
    path = folder / STATE
    try:
        state = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:  # no JSON or no text
        state = None
    if not isinstance(state, dict) or not isinstance(state.get("request"), dict):
        raise ConfigError(
            f"{path} is not the state of an unfinished preparation: choose another folder or delete this one"
        )
    return state


def is_finished(folder: Path, request: dict[str, Any]) -> bool:
    """Whether ``folder`` already holds the data set asked for.

    Raises:
        ConfigError: if it holds another.
    """
    if not (folder / INDEX).is_file():
        return False
    check_same(folder, TokenShards(folder).index["request"], request)
    return True


def check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ConfigError, naming the first difference, unless ``folder`` was begun with the same request."""
    for key, value in wanted.items():
        if key == "sources" or found.get(key) == value:
            continue  # the corpus entry says what the sources resolve to
        if key == "content" and key not in found:
            continue  # begun by a version that compared names and sizes only
        label, values = key, f" ({found.get(key)} there, {value} now)"
        if key in ("corpus", "content"):
            label, values = "corpus or one that has changed", ""
        raise ConfigError(
            f"{folder} holds data prepared with another {label}{values}:"
            " choose another folder or delete this one"
        )


def write_index(
    folder: Path, state: dict[str, Any], tokenizer: Tokenizer, splits: dict[Split, Any]
) -> None:
    """Make the data set usable: the index is written last, in one step."""
    index: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": id_dtype(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "end_id": tokenizer.end_id,
        "tokenizer": tokenizer.hash,
        "threshold": state["threshold"],
        "nbytes": state["nbytes"],
        "empty_documents": state["cursor"]["empty"],
        "request": state["request"],
        "splits": splits,
    }
    sync_folder(folder)
    write_json(folder / INDEX, index | {"sha256": index_sha256(index)})
    (folder / STATE).unlink(missing_ok=True)


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make ``folder``; if what follows fails before anything is in it, it and its parent go again."""
    missing = [f for f in (folder, folder.parent) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: what was saved stays
            for place in missing:
                place.rmdir()
        raise


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or a refused access into one line."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        reason = f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
        raise ConfigError(
            f"preparing {folder} stopped ({reason}): what was saved stays, run again to go on"
        ) from error
