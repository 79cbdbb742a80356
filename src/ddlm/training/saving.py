"""Checkpoints of a run: written by one process, the last few and the best kept, damaged ones passed over."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddlm.checkpoint import best_checkpoint, checkpoints, save_model
from ddlm.config import Config, dump_config
from ddlm.files import finish_renames, locked, write_text
from ddlm.training.distributed import World
from ddlm.training.metrics import remove_events
from ddlm.training.sharded import is_sharded, write_shards
from ddlm.training.state import TrainState, write_training
from ddlm.types import ConfigError

DIVERGED = "checkpoints/diverged.json"
"""In a run folder: the step from which on the weights gave no finite gradient any more."""


def save_checkpoint(
    state: TrainState,
    config: Config,
    run: Path,
    world: World,
    tokenizer_from: Path | None,
    provenance: dict[str, Any],
    keep_all: bool = False,
) -> str | None:
    """Write ``checkpoints/step-N`` and remove those no longer kept. Collective.

    Args:
        state: What is written.
        config: Resolved configuration.
        run: Run folder.
        world: The processes.
        tokenizer_from: Folder whose tokenizer goes in, or None.
        provenance: Facts for the manifest.
        keep_all: Remove none of the earlier ones: this one may be no good.

    Returns:
        Why it could not be written (a full disk), the same in every process, or None; the earlier ones stay then.
    """
    folder = run / "checkpoints" / f"step-{state.step}"
    weights = state.inference_weights()
    tensors = state.resume_tensors()
    shards, problem = None, None
    if is_sharded(tensors):
        # Beside the checkpoint first, so that a process that cannot write is known before the folder is begun.
        shards = folder.with_name(f".{folder.name}.shards.tmp")
        problem = _write_shards(shards, tensors, world)
    if world.is_main and problem is None:
        try:
            _write(
                folder, run, state, config, weights, shards or tensors, tokenizer_from, provenance
            )
            if not keep_all:
                prune(run, config.train.keep, state.step)
                (run / DIVERGED).unlink(missing_ok=True)
        except (OSError, ConfigError) as error:  # no room, or somebody else's files in its place
            problem = str(getattr(error, "strerror", None) or error)
    if world.is_main and shards is not None:
        shutil.rmtree(shards, ignore_errors=True)
    # All processes go the same way afterwards: the next save gathers tensors from all of them.
    failed = world.agree(float(problem is not None))[0]
    return (problem or "the first process could not write it") if failed else None


def _write_shards(folder: Path, tensors: Mapping[str, Tensor], world: World) -> str | None:
    """Every process its own file; why it could not be done, or None, the same in all processes. Collective."""
    problem = None
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt at this step
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            problem = str(error.strerror or error)
    world.barrier()
    # What a process writes where the first one does not see it would be missing, and the older checkpoints removed.
    if world.agree(float(not folder.is_dir()))[0]:
        return problem or (
            f"not every process sees {folder.parent}: --out must be a folder that all machines see"
        )
    try:
        write_shards(folder, tensors)
    except OSError as error:
        return str(error.strerror or error)
    return None


def _write(
    folder: Path,
    run: Path,
    state: TrainState,
    config: Config,
    weights: dict[str, Tensor],
    tensors: dict[str, Tensor] | Path,
    tokenizer_from: Path | None,
    provenance: dict[str, Any],
) -> None:
    save_model(
        folder,
        weights,
        config,
        tokenizer_from=tokenizer_from,
        time_warp=state.warp,
        step=state.step,
        provenance=provenance,
        extra=lambda temporary: write_training(temporary, tensors, state.counters()),
    )
    if state.best.get("step") == state.step:
        write_text(run / "checkpoints" / "best.json", json.dumps(state.best) + "\n")


def prune(run: Path, keep: int, step: int) -> None:
    """Keep the last ``keep`` checkpoints up to ``step`` and the best one.

    Those of later steps are damaged: the run went back to an earlier one because of that.
    """
    best = best_checkpoint(run)
    found = checkpoints(run)
    sound = [f for f in found if int(f.name[5:]) <= step]
    kept = {*sound[-max(keep, 1) :], best}
    for folder in found:
        if folder not in kept:
            doomed = folder.with_name(
                f".{folder.name}.old"
            )  # never seen half-removed under its name
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(run: Path) -> None:
    """Put back what a killed process had just moved aside, and remove what it left half-written."""
    finish_renames(run / "checkpoints")
    for path in (run / "checkpoints").glob(".*"):
        if path.name.endswith((".tmp", ".old")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def held(run: Path, world: World) -> Iterator[None]:
    """Keep a second training out of the run folder; the lock goes with the process, however it ends.

    Raises:
        ConfigError: when another process trains there, or the folder cannot be made.
    """
    if not world.is_main:
        yield
        return
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run} is a file: name a folder for the run")
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    refusal = (
        f"another process is training in {run}: wait for it, stop it, or name another run folder"
    )
    with locked(run, refusal):
        yield


def check_fresh(run: Path, fresh: bool, overwrite: bool) -> None:
    """Refuse a fresh run that would destroy an existing one, unless that was asked for.

    Raises:
        ConfigError: naming the ways out.
    """
    if overwrite and not fresh:
        raise ConfigError(
            f"--overwrite goes with --fresh: add that to delete the run in {run}, or leave --overwrite out to go on "
            "with it"
        )
    if fresh and checkpoints(run) and not overwrite:
        raise ConfigError(
            f"{run} already holds a run: resume it without --fresh, name another folder, or add --overwrite"
        )


def begin(run: Path, config: Config, state: TrainState, fresh: bool) -> None:
    """Write the resolved configuration; a fresh run first removes what an earlier one left.

    The last thing before the first step: whatever refuses a command has done so by now.
    """
    was_run = bool(checkpoints(run))
    if fresh and (was_run or (run / "metrics.jsonl").exists()):
        remove_events(run)  # also those of a run that was killed before its first checkpoint
    if fresh and was_run:
        for name in ("checkpoints", "samples", "skipped"):
            shutil.rmtree(run / name, ignore_errors=True)
        (run / "metrics.jsonl").unlink(missing_ok=True)
        (run / "checkpoints").mkdir()
    best = run / "checkpoints" / "best.json"
    if (run / "checkpoints" / f"step-{state.best.get('step')}").is_dir():
        write_text(best, json.dumps(state.best) + "\n")
    else:  # the run went back behind it
        best.unlink(missing_ok=True)
    write_text(run / "config.yaml", dump_config(config))
