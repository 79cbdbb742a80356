"""Going on with a run: from which checkpoint, and what no longer holds because settings or data have changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddlm.checkpoint import architecture_differences, checkpoints
from ddlm.config import Config, read_config
from ddlm.files import CheckpointError, read_manifest, verify_files
from ddlm.training.distributed import World
from ddlm.training.saving import DIVERGED
from ddlm.training.state import TrainState
from ddlm.types import ConfigError


def find_resumable(run: Path, config: Config, warn: Callable[[str], None]) -> Path | None:
    """The latest checkpoint of a run whose files are whole, or None for a run that has none yet.

    Raises:
        ConfigError: when the run has another architecture, the differences named, or all checkpoints are damaged.
    """
    damage: CheckpointError | None = None
    for folder in _in_order(run, warn):
        try:
            verify_files(folder, training=True)
        except CheckpointError as error:
            warn(f"{error}; going back to the one before it")
            damage = error
            continue
        trained = read_config(folder / "config.yaml")
        differences = architecture_differences(trained, config)
        if trained.time.warp and config.time.warp and trained.time.bins != config.time.bins:
            differences.append(f"time.bins {trained.time.bins} -> {config.time.bins}")
        if differences:
            raise ConfigError(
                f"{run} was trained with another architecture ({'; '.join(differences)}): "
                "give its own settings or another run folder"
            )
        if reordered := _reordered(trained, config):
            warn(
                f"going on with {', '.join(reordered)}: the texts come in another order from here on, some of this "
                "epoch again and some not at all"
            )
        return folder
    if damage is not None:
        raise damage
    return None


def check_same(run: Path, resumed: Path | None, world: World) -> None:
    """Make sure that all processes go on from the same step: two that do not would wait for each other for ever.

    Raises:
        ConfigError: in every process, when they have found different checkpoints.
    """
    step = -1 if resumed is None else int(resumed.name.removeprefix("step-"))
    most, less = world.agree(step, -step)
    if most != -less:
        raise ConfigError(
            f"the processes do not see the same checkpoints of {run}: --out must be a folder that all machines see, "
            "or have its last checkpoint on each"
        )


def _reordered(trained: Config, config: Config) -> list[str]:
    """Changed settings that decide which texts a step takes: it is found from its number alone."""
    pairs = {
        "train.batch": (trained.train.batch, config.train.batch),
        "train.seed": (trained.train.seed, config.train.seed),
    }
    return [f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]


def _in_order(run: Path, warn: Callable[[str], None]) -> list[Path]:
    """Checkpoints in the order in which they are tried: the latest first, those of a run that diverged last."""
    found = checkpoints(run)[::-1]
    try:
        failed = int(json.loads((run / DIVERGED).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return found
    sound = [f for f in found if int(f.name[5:]) < failed]
    passed = [f for f in found if f not in sound]
    if sound and passed:
        warn(
            f"passing over {', '.join(f.name for f in passed[::-1])}: no update after step {failed} had a finite "
            "gradient"
        )
    return sound + passed


def settle(
    state: TrainState,
    resumed: Path,
    config: Config,
    provenance: Mapping[str, Any],
    evaluates: bool,
    warn: Callable[[str], None],
) -> None:
    """Say what changed since a checkpoint, and drop its best evaluation where later ones do not compare with it.

    Args:
        state: Restored from the checkpoint; its ``best`` may be dropped.
        resumed: The checkpoint.
        config: What the run goes on with.
        provenance: Facts about the data that it goes on with.
        evaluates: Whether there will be evaluations.
        warn: Where to say it.
    """
    trained = read_config(resumed / "config.yaml")
    before = (read_manifest(resumed).get("provenance") or {}).get("data")
    now = provenance.get("data")
    changes = [
        f"mask.{name} {old} -> {getattr(config.mask, name)}"
        for name, old in vars(trained.mask).items()
        if old != getattr(config.mask, name)
    ]
    if before and now and before != now:
        changes.append("the held-out text of other shards")
        warn(
            f"going on with other shards ({now[:12]}) than before ({before[:12]}): the texts of this epoch come in "
            "another order, some again and some not at all"
        )
    if not state.best:
        return
    best = f"step {state.best['step']:.0f} ({state.best['cross_entropy']:.4f} nats)"
    if changes:
        warn(
            f"the best evaluation so far, {best}, does not compare with later ones ({'; '.join(changes)}) and no "
            "longer counts"
        )
        state.best = {}
    elif not evaluates:
        warn(
            f"no evaluations from here on: whoever loads this run folder gets the best one so far, {best}"
        )
