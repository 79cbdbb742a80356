"""Initial weights: a new run that starts from a model instead of from random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ddlm.checkpoint import LoadedModel, architecture_differences, checkpoints, load_model
from ddlm.config import Config
from ddlm.files import read_manifest
from ddlm.record import make_record
from ddlm.training.data import RunData
from ddlm.training.flops import run_flops
from ddlm.training.sharded import put
from ddlm.training.state import TrainState
from ddlm.types import ConfigError


def open_initial(
    path: str | Path | None, run: Path, config: Config, data: RunData, fresh: bool
) -> LoadedModel | None:
    """Read the model that a run starts from, before anything of the run is written or removed.

    Args:
        path: A model folder, a run folder (its best checkpoint) or a hub id; None: random weights.
        run: The run; one that has a checkpoint goes on from there, and the model is not looked at.
        config: Of the run.
        data: Its data.
        fresh: Whether the run starts anew all the same.

    Returns:
        The model, or None when it is not needed.

    Raises:
        ConfigError: when there is no such model, its architecture differs (named) or its tokenizer is not the data's.
    """
    if path is None or (checkpoints(run) and not fresh):
        return None
    loaded = load_model(path)
    differences = architecture_differences(loaded.config, config)
    if differences:
        raise ConfigError(
            f"{path} has another architecture than this run ({'; '.join(differences)}): "
            f"give its own settings, as in --config {path}, or another model"
        )
    data.check_tokenizer(loaded.folder)
    return loaded


@torch.no_grad()
def start_from(state: TrainState, loaded: LoadedModel) -> None:
    """Copy the weights of a model into a new state; optimiser and counters stay at their beginning.

    The average starts at the same weights. A learned distribution of t is taken over where both have one of equal size.
    """
    weights = loaded.model.state_dict()
    for name, parameter in state.model.named_parameters():
        put(parameter, weights[name])
    if state.ema is not None:
        for (name, _), shadow in zip(state.model.named_parameters(), state.ema.shadow, strict=True):
            put(shadow, weights[name])
    if state.warp is not None and loaded.time_warp is not None:
        learned, own = loaded.time_warp.state_dict(), state.warp.state_dict()
        if all(k in learned and learned[k].shape == own[k].shape for k in own):
            state.warp.load_state_dict(learned)


def origin(path: str | Path, loaded: LoadedModel) -> dict[str, Any]:
    """What the manifest of a checkpoint says about the model that its run started from."""
    train = loaded.config.train
    known = loaded.step is not None
    tokens = (loaded.step or 0) * train.batch * loaded.config.model.length
    before = loaded.provenance.get("initial")
    return {
        "model": str(path),
        "step": loaded.step,
        "tokens_seen": tokens if known else None,
        "flops": run_flops(loaded.config, loaded.step or 0) if known else None,
        **({"initial": before} if before else {}),
    }


def trainings(resumed: Path | None, step: int, data: str | None = None) -> list[dict[str, Any]]:
    """How a run was made, for the manifest: its parts, oldest first, each with command, commit, machine and data.

    Args:
        resumed: Checkpoint that this part goes on from, or None.
        step: Update at which this part begins.
        data: Hash of the shards, or None for batches that were given.
    """
    before = (read_manifest(resumed).get("provenance") or {}) if resumed is not None else {}
    made = make_record("training", None, None)
    part = {k: made[k] for k in ("command", "commit", "versions", "hardware", "date")}
    return [*before.get("trainings", []), {"from_step": step, "data": data, **part}]


def kept_origin(checkpoint: Path) -> dict[str, Any]:
    """The entry of :func:`origin` in a checkpoint's manifest, if it has one: a resumed run keeps it."""
    provenance = read_manifest(checkpoint).get("provenance") or {}
    return {k: v for k, v in provenance.items() if k == "initial"}
