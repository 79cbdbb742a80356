"""What a model folder itself tells of a model: its size, and what its training cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddlm.config import Config, read_config
from ddlm.files import read_json, read_manifest, weight_files
from ddlm.types import ConfigError


@dataclass(frozen=True)
class Subject:
    """A model of the table.

    Attributes:
        name: Name of its folder.
        kind: ``diffusion``, ``autoregressive``, or ``unknown`` where the folder is not there.
        values: ``parameters``, ``tokens`` and ``flops`` of the training, as far as they are known.
        missing: Why the others are not.
        architecture: Of an autoregressive model.
        sizes: Of an autoregressive model, by the names of :class:`ddlm.config.ModelConfig`.
    """

    name: str
    kind: str
    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    architecture: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)


def read_subject(root: Path, model: str) -> Subject:
    """Read what is known of a model.

    Args:
        root: What relative folders are relative to.
        model: Folder as the record names it.

    Raises:
        ConfigError: when the folder is damaged.
    """
    folder, name = root / model, Path(model).name
    if (folder / "plan.json").is_file():
        return _baseline(folder, name)
    if (folder / "manifest.json").is_file():
        return _diffusion(folder, name)
    reason = f"The folder {name} is not among the published models."
    return Subject(name, "unknown", {}, dict.fromkeys(("parameters", "tokens", "flops"), reason))


def count_parameters(folder: Path) -> int:
    """Numbers in the weight files of a folder, from their headers alone.

    Raises:
        ConfigError: naming a file that is damaged, missing or of another model.
    """
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                total += sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError(f"{file} is damaged ({error}): copy it again") from None
    return total


def _diffusion(folder: Path, name: str) -> Subject:
    from ddlm.training.flops import run_flops

    manifest, config = read_manifest(folder), read_config(folder / "config.yaml")
    values: dict[str, float] = {"parameters": count_parameters(folder)}
    missing: dict[str, str] = {}
    step = manifest.get("step")
    before: Mapping[str, Any] = (manifest.get("provenance") or {}).get("initial") or {}
    if step is None:
        missing |= dict.fromkeys(
            ("tokens", "flops"), f"{name} does not say how many updates it had."
        )
        return Subject(name, "diffusion", values, missing)
    known = {
        "tokens": step * config.train.batch * config.model.length,
        "flops": run_flops(config, step),
    }
    for key, value in known.items():
        earlier = _earlier(before, "tokens_seen" if key == "tokens" else "flops")
        if earlier is None:
            missing[key] = f"{name} began from weights whose training is not known."
        else:
            values[key] = value + earlier
    return Subject(name, "diffusion", values, missing)


def _earlier(before: Mapping[str, Any], key: str) -> float | None:
    """What the trainings before this one add up to; None when one of them is not known."""
    total = 0.0
    while before:
        if before.get(key) is None:
            return None
        total += before[key]
        before = before.get("initial") or {}
    return total


def _baseline(folder: Path, name: str) -> Subject:
    """A folder of ``ddlm baseline``."""
    from ddlm.evaluation.judges import TRAINED_ON
    from ddlm.training.flops import peer_flops

    needed = {"model": dict, "architecture": str, "context": int, "batch": int}
    plan = read_json(folder / "plan.json", **needed)
    values: dict[str, float] = {"parameters": count_parameters(folder)}
    missing: dict[str, str] = {}
    note = folder / TRAINED_ON
    if note.is_file():
        values["tokens"] = read_json(note, tokens=int)["tokens"]
        config = Config()
        for key, value in plan["model"].items():
            setattr(config.model, key, value)
        config.model.length, config.train.batch = plan["context"], plan["batch"]
        updates = values["tokens"] / (plan["batch"] * plan["context"])
        values["flops"] = peer_flops(config, plan["architecture"]) * updates
    else:
        missing |= dict.fromkeys(("tokens", "flops"), f"{name} has no {TRAINED_ON}.")
    return Subject(
        name, "autoregressive", values, missing, plan["architecture"], dict(plan["model"])
    )
