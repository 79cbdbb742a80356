"""A result as one JSON record: what was measured, by which command, code, versions and hardware, and when."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ddlm import __version__
from ddlm.files import write_text

FORMAT = 1
"""Version of the layout of a record."""

# Reported only when the run has loaded them: what was not used did not shape the result.
_PACKAGES = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "faiss": "faiss-cpu",
    "mauve": "mauve-text",
    "numpy": "numpy",
    "sacrebleu": "sacrebleu",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "transformers": "transformers",
}


def make_record(
    kind: str, config: Any, results: Any, *, seed: int | None = None, **extra: Any
) -> dict[str, Any]:
    """Wrap results with everything needed to judge and to repeat them.

    Args:
        kind: What was measured, for instance ``"evaluate"`` or ``"benchmark-sample"``.
        config: The settings: a dataclass, a mapping, or anything JSON can hold.
        results: The measurements; tensors of one element, numpy scalars and paths are converted.
        seed: Seed of the run; taken from ``config.train.seed`` or ``config.seed`` when it is not given.
        **extra: Further top-level fields.

    Returns:
        A dictionary that JSON can hold. Non-finite numbers become null and are named in ``non_finite``, so that
        no reader mistakes them for missing measurements.
    """
    missing: list[str] = []
    body = {
        "kind": kind,
        "config": _plain(config, "config", missing),
        "results": _plain(results, "results", missing),
        **{name: _plain(value, name, missing) for name, value in extra.items()},
    }
    return {
        "format": FORMAT,
        **body,
        "seed": seed if seed is not None else _seed_of(config),
        "command": command_line(),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "non_finite": missing,
    }


def write_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write ``record`` as JSON so that the file is either the old one or the whole new one."""
    write_text(Path(path), json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def command_line() -> str:
    """The command that is running, as a shell would take it; the program by its name only."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    if module is not None and module.name.startswith("ddlm.") and module.name != "ddlm.__main__":
        return shlex.join(["python", "-m", module.name, *sys.argv[1:]])
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    if program == "__main__.py":
        program = "ddlm"
    return shlex.join([program, *sys.argv[1:]])


def commit() -> str | None:
    """Commit of the source tree (``-dirty`` when it was changed), or None for an installed package."""
    home = Path(__file__).resolve().parent
    try:
        # The package may be installed inside somebody else's repository: only its own tracked files count.
        if not _git(home, "ls-files", "__init__.py"):
            return None
        changed = _git(home, "status", "--porcelain", "--untracked-files=no", ".")
        return _git(home, "rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def commit_of(record: Mapping[str, Any]) -> str:
    """The commit of a record in words: its first twelve digits, and whether the tree had changed since."""
    found = record.get("commit") or "unknown"
    return found[:12] + (", with changes" if found.endswith("-dirty") else "")


def machine_of(record: Mapping[str, Any]) -> str:
    """The hardware of a record in words: its GPUs, or its threads where it had none."""
    found = record["hardware"]
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    return ", ".join(found.get("gpus") or []) or f"{threads} of {found['cpu']}"


def versions() -> dict[str, str]:
    """Versions of Python, ddlm and the libraries this process has loaded."""
    found = {"python": platform.python_version(), "ddlm": __version__}
    for module, package in _PACKAGES.items():
        if module in sys.modules:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = str(getattr(sys.modules[module], "__version__", "unknown"))
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB, threads and accelerators."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpus": gpus,
    }


def _git(folder: Path, *arguments: str) -> str:
    run = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return run.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _seed_of(config: Any) -> int | None:
    plain = _plain(config, "config", [])
    if not isinstance(plain, dict):
        return None
    train = plain.get("train")
    seed = train.get("seed") if isinstance(train, dict) else plain.get("seed")
    return seed if isinstance(seed, int) else None


def _plain(value: Any, path: str, missing: list[str]) -> Any:
    """JSON's types only; the paths of non-finite numbers are appended to ``missing``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{path}.{k}", missing) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [_plain(v, f"{path}[{i}]", missing) for i, v in enumerate(items)]
    if hasattr(value, "tolist") and hasattr(value, "dtype") and hasattr(value, "shape"):
        return _plain(value.tolist(), path, missing)  # numpy and torch
    if isinstance(value, float) and not math.isfinite(value):
        missing.append(f"{path} = {value}")
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value)
