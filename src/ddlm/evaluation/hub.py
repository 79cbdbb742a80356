"""Where models of others come from: a local folder or the hub, with one clear line when neither has them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from ddlm.evaluation.extras import missing_extra
from ddlm.evaluation.packaged import SMOLLM2, smollm2_folder
from ddlm.files import CheckpointError, content_hash
from ddlm.types import ConfigError, local

DEFAULT_JUDGE = "EleutherAI/gpt-neo-1.3B"
"""The judge of the paper; 5.3 GB."""

DEFAULT_FEATURES = "openai-community/gpt2-large"
"""The paper's MAUVE features; 3.2 GB."""

_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


def cache_folder(folder: Path | None = None) -> Path:
    """The cache: ``folder``, else the variable ``DDLM_CACHE``, else ``~/.cache/ddlm``."""
    if folder is not None:
        return Path(folder)
    base = (
        os.environ.get("DDLM_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ddlm"
    )
    return local(base)


def local_folder(name: str, *, what: str, flag: str) -> tuple[Path, str | None]:
    """Folder of a model: ``name`` itself, or a snapshot of the hub's.

    Args:
        name: A folder, a hub id, ``id@revision`` to pin it, or ``smollm2`` (:mod:`ddlm.evaluation.packaged`).
        what: What the model is for, for the message.
        flag: The option that would name a local folder, for the message.

    Returns:
        The folder and the hub's revision (None for a local folder).

    Raises:
        ConfigError: if there is no such folder and the hub does not give one, or it holds a diffusion model.
    """
    if name == SMOLLM2:
        return smollm2_folder(cache_folder()), None
    folder, revision = _find(name, what, flag)
    if _is_diffusion(folder):
        raise ConfigError(
            f"the {what} {name} is a diffusion model: {flag} needs an autoregressive one in transformers' format, which"
            " `ddlm baseline` trains"
        )
    return folder, revision


def _is_diffusion(folder: Path) -> bool:
    """Whether a folder holds an exported diffusion model; one that cannot be read is named by what loads it."""
    try:
        return bool(json.loads((folder / "config.json").read_text("utf-8"))["model_type"] == "ddlm")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _find(name: str, what: str, flag: str) -> tuple[Path, str | None]:
    folder = local(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"the {what} folder {name} holds no config.json: give a folder in transformers' format"
            )
        return folder, None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"no {what} folder at {name}")
    repo, _, revision = name.partition("@")
    hub = missing_extra("huggingface_hub", "eval")
    try:
        path = Path(hub.snapshot_download(repo, revision=revision or None, allow_patterns=_FILES))
    except Exception as error:  # offline, unknown, refused: each has its own class
        raise ConfigError(
            f"the {what} {name} is neither a local folder nor to be had from the hub ({type(error).__name__}):"
            f" copy the model to this machine and give its folder, {flag} PATH, install one from the package index"
            f" ({flag} {SMOLLM2}), or train one with `ddlm baseline`"
        ) from error
    return path, path.name


def fingerprint(folder: Path, cache: Path) -> str:
    """Hash of a model's files (weights, configuration, tokenizer; not its card), remembered while they stay."""
    files = sorted({f for pattern in _FILES for f in folder.glob(pattern) if f.is_file()})
    state = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    key = hashlib.sha256(json.dumps([str(folder.resolve()), state]).encode()).hexdigest()[:32]
    note = cache / "fingerprints" / key
    if note.is_file() and len(known := note.read_text("utf-8").strip()) == 64:
        return known
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        if file.name == "manifest.json":  # lists the card, too, which may be edited
            with contextlib.suppress(CheckpointError):  # another program's
                inner = content_hash(folder)
        digest.update(f"{file.name} {inner}\n".encode())
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(digest.hexdigest(), "utf-8")
    return digest.hexdigest()
