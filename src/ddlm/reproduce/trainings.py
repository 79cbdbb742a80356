"""What a finished training was made with, and the refusal of one that was made otherwise than is wanted now."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddlm.config import Config
from ddlm.reproduce.recipes import Recipe
from ddlm.settings import field_values
from ddlm.types import ConfigError

if TYPE_CHECKING:
    from ddlm.reproduce.workshop import Workshop

DONE = "finished.json"
"""In the folder of a training: its result and, under ``wanted``, what it was made with. Written last."""

Training = tuple[str, Mapping[str, Any] | None]
"""``model``, ``baseline`` or ``judge``, and what a model's training departs from the scale's in."""

_ROUNDED = 0.06  # the notes of budgets have one digit after the point
# Not of the training's outcome, or told under a name of its own.
_LEFT_OUT = ("data.path", "train.budget", "train.steps", "train.threads", "train.device")


def begun_note(folder: Path) -> Path:
    """File with what a training was begun with, in the form of ``finished.json``."""
    return folder.with_name(f"{folder.name}.begun.json")


def is_begun(folder: Path) -> bool:
    """Whether a training has left something to go on from."""
    return any((folder / "checkpoints").glob("*-[0-9]*"))


def budget_note(folder: Path) -> Path:
    """File with the seconds that a training was begun with."""
    return folder.with_name(f"{folder.name}.budget")


def kept_budget(folder: Path) -> float | None:
    """Seconds that a training is gone on with; None where nothing is there to go on from, or none were given."""
    note = budget_note(folder)
    return float(note.read_text("utf-8")) if is_begun(folder) and note.is_file() else None


def describe(
    shop: Workshop, what: str, train: Mapping[str, Any] | None, share: float | None
) -> dict[str, Any]:
    """What a training is made with, as ``finished.json`` keeps it."""
    from ddlm.data.shards import TokenShards

    config = shop.configuration(what, train, share)
    return {
        "steps": shop.steps,
        "budget": shop.budget,
        "share": share,
        "data": TokenShards(shop.data).hash,
        "config": _values(config),
    }


def refuse_others(shop: Workshop, recipes: Sequence[Recipe]) -> None:
    """Refuse trainings that are finished or begun and were made with other steps, data, budget or settings.

    The models that a table compares must have had equal shares of the budget. A judge, and a model that stands alone,
    may come from another item of the same budget. Items are gone through in their order, so that one that would meet a
    model of an earlier one with another share is refused before anything is trained.

    Raises:
        ConfigError: naming the folder, what differs and what to change.
    """
    shares: dict[Path, float] = {}
    for recipe in recipes:
        wanted, share = shop.wanted(recipe), shop.share(recipe)
        compared = [w for w in wanted if w[0] != "judge"]
        for what, train in wanted:
            folder = shop.training_folder(what, train)
            alone = what == "judge" or len(compared) < 2
            file = folder / DONE
            if not file.is_file() and is_begun(folder):
                file = begun_note(folder)
            if file.is_file() and not _refuse_other(
                file, folder, describe(shop, what, train, share), alone
            ):
                continue
            if share is None or shop.steps is not None:
                continue
            if folder not in shares:
                kept = kept_budget(folder)
                shares[folder] = share if kept is None else kept
            if not alone and abs(shares[folder] - share) > _ROUNDED:
                raise ConfigError(
                    f"{recipe.name} gives each training {share:.1f} s of --budget, {folder} has {shares[folder]:.1f} s"
                    " for another item or budget: name another --out, make the items one by one, or use --steps"
                )


def _refuse_other(file: Path, folder: Path, wanted: dict[str, Any], alone: bool) -> bool:
    """False where the file is from before it said what the training was made with: it is used as it is."""
    try:
        found = json.loads(file.read_text("utf-8")).get("wanted")
    except (ValueError, AttributeError):
        raise ConfigError(
            f"{file} is damaged: remove it to finish the training again, or name another --out"
        ) from None
    if found is None:
        return False
    names = {"steps": "--steps", "budget": "--budget", "data": "--data (its hash)"}
    for key, name in names.items():
        if key == "budget" and wanted["steps"] is not None:
            continue  # with --steps there is no budget
        if key == "budget" and not alone:
            continue  # the shares are compared, which may be equal for another item
        if found.get(key) != wanted[key]:
            raise ConfigError(_other(folder, name, found.get(key), wanted[key]))
    was, now = found.get("share"), wanted["share"]
    same = was == now or (None not in (was, now) and abs(was - now) <= _ROUNDED)
    if not same and not alone and wanted["steps"] is None:
        raise ConfigError(_other(folder, "seconds of --budget", was, now))
    # A setting that one of the two does not know was added or removed since.
    for key, value in wanted["config"].items():
        if key in found["config"] and found["config"][key] != value:
            raise ConfigError(_other(folder, key, found["config"][key], value))
    return True


def _other(folder: Path, what: str, found: Any, wanted: Any) -> str:
    found, wanted = (_plain(x) for x in (found, wanted))
    return (
        f"{folder} was trained with {what} {found}, wanted is {wanted}: name another --out, or ask for what is"
        " there"
    )


def _plain(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, float):
        return f"{value:g}"
    return value[:12] if isinstance(value, str) else str(value)


def _values(config: Config) -> dict[str, Any]:
    """Settings by name, as JSON reads them back."""
    known = {k: v for k, v in field_values(config) if k not in _LEFT_OUT}
    found: dict[str, Any] = json.loads(json.dumps(known))
    return found
