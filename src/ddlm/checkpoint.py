"""Model folders: safetensors and text files, no pickled code, written atomically, verified when loaded.

A model folder holds ``config.yaml``, ``model.safetensors`` (or shards with an index), the tokenizer's files, an
optional ``time_warp.safetensors`` and ``manifest.json`` with the sha256 of every file. A training checkpoint is a model
folder with a folder ``training/`` inside; a run folder stands for its best checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddlm.config import Config, dump_config, read_config
from ddlm.diffusion.process import NoiseProcess
from ddlm.diffusion.time_warp import TimeWarp
from ddlm.files import (
    INDEX,
    WEIGHTS,
    CheckpointError,
    read_manifest,
    read_tensors,
    tensor_room,
    verify_files,
    weight_files,
    write_folder,
    write_tensors,
    write_text,
)
from ddlm.network.denoiser import DDLM
from ddlm.types import ConfigError, local

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "spiece.model",
)
TIME_WARP = "time_warp.safetensors"
FINETUNED = "finetuned"
"""What the manifest of a fine-tuned classifier says of its kind."""
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_DRAWING = threading.Lock()
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model read from a folder.

    Attributes:
        model: The network in evaluation mode, float32.
        config: The configuration it was trained with.
        time_warp: The learned distribution of t, or None.
        folder: Where it was read from (the checkpoint itself, also when a run folder was named).
        step: Updates of the weights made so far, or None when unknown.
        provenance: Whatever was recorded about the origin (data, command, versions).
    """

    model: DDLM
    config: Config
    time_warp: TimeWarp | None
    folder: Path
    step: int | None
    provenance: dict[str, Any]


def save_model(
    folder: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    config: Config,
    *,
    tokenizer_from: Path | None,
    time_warp: TimeWarp | None = None,
    step: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    shard_bytes: int | None = None,
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write a model folder atomically.

    Args:
        folder: Where; an older model there is replaced only when the new one is complete. Other files that lie beside
            it stay, but for those that have the name of a new one.
        model: The network, or its state dict.
        config: Resolved configuration.
        tokenizer_from: Folder whose tokenizer files are copied, or None.
        time_warp: Learned distribution of t, or None.
        step: Updates made so far.
        provenance: JSON-able facts about the origin.
        dtype: float32, bfloat16 or float16: precision of the stored weights.
        shard_bytes: Largest size of a weight file; larger models become shards with an index, and a tensor that is
            larger by itself has a file of its own, since no index can cut it. None: one file.
        extra: Writes further files into the folder before it appears (training state).

    Returns:
        The folder.

    Raises:
        ConfigError: when the folder holds something else than a model, or the network has other settings than the
            configuration that it would be loaded with.
        OSError: when writing fails; nothing half-written is left.
    """
    if isinstance(model, DDLM):
        process = NoiseProcess(config.process.t_min, config.process.t_max)
        pairs = (("model", model.config, config.model), ("process", model.process, process))
        if differences := _differences(*pairs):
            raise ConfigError(
                f"the network differs from its configuration ({'; '.join(differences)}), with which it would be "
                "loaded: save it with its own"
            )
    state = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    state = {k: v.to(_DTYPES[dtype]) if v.is_floating_point() else v for k, v in state.items()}

    def fill(temporary: Path) -> None:
        write_text(temporary / "config.yaml", dump_config(config))
        _write_weights(temporary, state, shard_bytes)
        if time_warp is not None:
            write_tensors(temporary / TIME_WARP, time_warp.state_dict())
        for name in TOKENIZER_FILES:
            if tokenizer_from is not None and (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, temporary / name)
        if extra is not None:
            extra(temporary)

    write_folder(Path(folder), fill, {"step": step, "provenance": dict(provenance or {})})
    return Path(folder)


def _write_weights(folder: Path, state: Mapping[str, Tensor], shard_bytes: int | None) -> None:
    """One file, or the shards and the index of transformers and the hub."""
    if shard_bytes is None:
        write_tensors(folder / WEIGHTS, state)
        return
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        dict(state),
        # Each tensor is written by itself, also one that shares its memory with others.
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        filename_pattern=WEIGHTS.replace(".", "{suffix}."),
        max_shard_size=tensor_room(state, shard_bytes),
    )
    for file, names in plan.filename_to_tensors.items():
        write_tensors(folder / file, {name: state[name] for name in names})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Weights of a model folder in float32, from one file or from shards.

    Raises:
        CheckpointError: when there are none, not all of them, or only pickles.
    """
    files = weight_files(folder)
    if not files:
        _refuse_pickles(folder)
        raise CheckpointError(f"{folder} has no {WEIGHTS}: it is not a model folder of ddlm")
    tensors = ((k, v) for file in files for k, v in read_tensors(file).items())
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors}


def check_weights(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Compare the names and shapes of weights with those of a model.

    Raises:
        CheckpointError: naming the parameters that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    differences = [f"{k} is missing" for k in own if k not in state]
    differences += [f"{k} is unknown" for k in state if k not in own]
    differences += [
        f"{k} is {tuple(state[k].shape)}, needed {tuple(own[k].shape)}"
        for k in own
        if k in state and own[k].shape != state[k].shape
    ]
    if differences:
        more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise CheckpointError(
            f"{source} holds another architecture than its configuration: "
            + "; ".join(differences[:4])
            + more
        )


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Copy weights into a model whose architecture must be the same (:func:`check_weights`)."""
    check_weights(model, state, source)
    model.load_state_dict(state)


def architecture_differences(old: Config, new: Config) -> list[str]:
    """Settings that the weights depend on and that differ: ``model.width 512 -> 1024``."""
    return _differences(("model", old.model, new.model), ("process", old.process, new.process))


def _differences(*pairs: tuple[str, Any, Any]) -> list[str]:
    """Fields that differ between two data classes, for each name and pair of them."""
    return [
        f"{part}.{f.name} {getattr(a, f.name)!r} -> {getattr(b, f.name)!r}"
        for part, a, b in pairs
        for f in dataclasses.fields(a)
        if getattr(a, f.name) != getattr(b, f.name)
    ]


@contextlib.contextmanager
def global_draws(seed: int | None = None) -> Iterator[None]:
    """Draw from torch's global CPU generator, as new modules do, and leave it to the caller as it was.

    One thread at a time: there is one such generator in a process.

    Args:
        seed: What the draws depend on; None: whatever the state is.
    """
    with _DRAWING, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach a GPU's, too
        yield


def load_model(path: str | Path, *, verify: bool = True) -> LoadedModel:
    """Read a model from a model folder, a run folder (its best checkpoint) or a hub id.

    Args:
        path: A folder, or ``owner/name`` on the Hugging Face hub.
        verify: Compare every file with its sha256 first.

    Raises:
        CheckpointError: in one line, when there is nothing there, or it is damaged, pickled, of a later format or of
            another architecture than its configuration says.
    """
    folder = find_model(path)
    manifest = verify_files(folder) if verify else read_manifest(folder)
    config = read_config(folder / "config.yaml")
    process = NoiseProcess(config.process.t_min, config.process.t_max)
    with global_draws():  # a new module draws weights, which are overwritten
        model = DDLM(config.model, process)
    load_weights(model, read_weights(folder), folder)
    time_warp = None
    if TIME_WARP in manifest["files"]:  # one that merely lies there is another model's
        time_warp = TimeWarp(process.t_min, process.t_max, config.time.bins)
        load_weights(time_warp, read_tensors(folder / TIME_WARP), folder)
    return LoadedModel(
        model=model.eval(),
        config=config,
        time_warp=time_warp,
        folder=folder,
        step=manifest.get("step"),
        provenance=manifest.get("provenance") or {},
    )


def find_model(path: str | Path) -> Path:
    """The model folder that ``path`` stands for: itself, a run's best checkpoint, or a downloaded hub id.

    Raises:
        CheckpointError: when there is none, or another kind of model.
    """
    folder = local(path)
    if not folder.exists():
        folder = download(str(path))
        _refuse_others(folder, str(path))
        return folder
    if folder.is_file():
        _refuse_pickles(folder.parent, folder)
        raise CheckpointError(f"{folder} is a file: name the folder that holds it")
    _refuse_others(folder, str(path))
    if (folder / "manifest.json").is_file():
        return folder
    if (folder / "checkpoints").is_dir():
        chosen = best_checkpoint(folder) or latest_checkpoint(folder)
        if chosen is None:
            raise CheckpointError(f"{folder} has no checkpoint yet: train it first")
        return chosen
    _refuse_pickles(folder)
    raise CheckpointError(f"{folder} is not a model folder: it has no manifest.json")


def checkpoints(run: str | Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first."""
    found = [p for p in (local(run) / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    return next(reversed(checkpoints(run)), None)


def best_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint with the lowest held-out cross-entropy, as the run recorded it, or None."""
    folders = local(run) / "checkpoints"
    try:
        record = json.loads((folders / "best.json").read_text(encoding="utf-8"))
        folder = folders / f"step-{int(record['step'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if folder.is_dir() else None


def download(name: str) -> Path:
    """Snapshot of a hub id ``owner/name``, without pickled files.

    Raises:
        CheckpointError: for another form of name, an unknown id, and without a connection.
    """
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~")):
        raise CheckpointError(
            f"{name} does not exist: name a model folder, a run folder or a hub id owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=[f"*{s}" for s in sorted(_PICKLES)]))
    except Exception as error:  # the hub's own errors have many unrelated bases
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} is no folder here and could not be read from the hub ({reason}): "
            "check the name and the connection"
        ) from None


def _refuse_others(folder: Path, name: str) -> None:
    """Refuse what other commands write: it has no config.yaml, and that it lacks one would explain nothing."""
    has_manifest = (folder / "manifest.json").is_file()
    if has_manifest and read_manifest(folder).get("kind") == FINETUNED:
        raise CheckpointError(
            f"{name} is a fine-tuned classifier: load it with AutoModelForSequenceClassification or give it to "
            "`ddlm finetune --model`"
        )
    if not has_manifest and (folder / "plan.json").is_file():
        raise CheckpointError(
            f"{name} is an autoregressive baseline: load it with AutoModelForCausalLM, or give it to `ddlm evaluate` "
            "(as --model or --judge), `ddlm finetune --model` or `ddlm reproduce --baseline`"
        )
    if not has_manifest and (folder / "train-ends.bin").is_file():
        raise CheckpointError(
            f"{name} is prepared text, not a model: give it to `ddlm train --data.path` and name the run it makes"
        )


def _refuse_pickles(folder: Path, file: Path | None = None) -> None:
    pickles = [file] if file else sorted(folder.iterdir())
    for path in pickles:
        if path.suffix in _PICKLES:
            raise CheckpointError(
                f"{path} is a pickle, which may run code when it is read: only safetensors are loaded"
            )
