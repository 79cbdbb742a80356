"""The folder of ``ddlm demo``: what a demonstration was begun from, and what ``--fresh`` may delete."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

SHIPPED = Path("models/ddlm-tiny")  # under the working directory or the root of the checkout
NOTE = "demo.json"  # in the run folder: what the demonstration was begun from


def shipped_weights() -> str | None:
    """Folder of the weights that come with the source, None where they are not."""
    checkout = Path(__file__).resolve().parents[3]
    for folder in (SHIPPED, checkout / SHIPPED):
        if (folder / "manifest.json").is_file():
            return str(folder)
    return None


def choose(model: str | None, out: Path, seed: int = 0, *, fresh: bool = False) -> str | None:
    """The model to start from, None for none; a run that is there goes on from what it was begun from.

    Raises:
        ConfigError: when the folder is a file, cannot be written or holds something else than a demonstration, when
            the run was begun from another model than the one that was named or with another seed, or when ``fresh``
            would delete the model.
    """
    from ddlm.files import check_folder
    from ddlm.types import ConfigError

    check_folder(out, "--out")
    begun_already = (out / NOTE).is_file()
    if not begun_already and out.is_dir() and any(out.iterdir()):
        # --fresh deletes all that is in a demonstration's folder: nothing else may be in it from the beginning
        raise ConfigError(
            f"{out} holds something else than a demonstration (it has no {NOTE}): name another --out"
        )
    if fresh or not begun_already:
        chosen = model or shipped_weights() or "none"
        if fresh and Path(chosen).resolve().is_relative_to(out.resolve()) and Path(chosen).exists():
            raise ConfigError(
                f"--fresh would delete {chosen}, the model to start from: name another --out"
            )
        return None if chosen == "none" else chosen
    begun, seed_then = _read_note(out / NOTE)
    if begun == str(SHIPPED) and not SHIPPED.is_dir():  # begun at the root of the checkout
        begun = shipped_weights() or begun
    if model is not None and os.path.abspath(model) != os.path.abspath(begun):  # noqa: PTH100 - may be a hub id
        origin = "from nothing" if begun == "none" else f"from {begun}"
        raise ConfigError(
            f"{out} was begun {origin}, not from {model}: leave --model out to go on with it, "
            "name another --out, or add --fresh"
        )
    if seed_then is not None and seed != seed_then:
        raise ConfigError(
            f"{out} was begun with --seed {seed_then}, not {seed}: give that seed to go on with it, "
            "name another --out, or add --fresh"
        )
    return None if begun == "none" else begun


def write_note(out: Path, chosen: str | None, seed: int) -> None:
    """Make the folder that of a demonstration."""
    from ddlm.files import write_text

    out.mkdir(parents=True, exist_ok=True)
    write_text(out / NOTE, json.dumps({"model": chosen or "none", "seed": seed}) + "\n")


def empty(out: Path) -> None:
    """Delete a demonstration; the folder itself stays, which may be a link. :func:`choose` has looked into it."""
    if not out.is_dir():
        return
    # The note last: what an interruption leaves is still known as a demonstration's.
    for path in sorted(out.iterdir(), key=lambda path: path.name == NOTE):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _read_note(path: Path) -> tuple[str, int | None]:
    """The model that a demonstration was begun from, and its seed; None where the note is older than seeds in it.

    Raises:
        ConfigError: when the note is damaged.
    """
    from ddlm.types import ConfigError

    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        begun, seed = note["model"], note.get("seed")
        assert isinstance(begun, str)
        assert seed is None or isinstance(seed, int)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise ConfigError(
            f"{path} is damaged, it does not say what the run was begun from: name another --out, or add --fresh"
        ) from None
    return begun, seed
