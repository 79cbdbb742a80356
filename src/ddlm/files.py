"""Files and folders that appear whole or not at all, with a manifest of hashes that is checked when they are read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddlm.types import ConfigError

if TYPE_CHECKING:  # `ddlm prepare` and its processes start without torch
    from torch import Tensor

FORMAT = 1  # of a folder; raised when older programs could no longer read it
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # which shard holds which tensor
SHARD_BYTES = 16 * 2**20  # largest file of weights that are handed on: what a repository bears


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used: missing, damaged, of another format or of another architecture."""


def check_folder(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be made or written, before hours of work for it; nothing is left there.

    Args:
        folder: It need not be there.
        option: The option that names it, for the message.

    Raises:
        ConfigError: naming what is in its way.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except NotADirectoryError:
        raise ConfigError(f"{option} {folder}: {place} is no folder: name another") from None
    except OSError as error:
        raise ConfigError(
            f"{option} {folder}: nothing can be written in {place} ({error.strerror}): name another"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def read_json(path: Path, **needed: type) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        path: The file.
        **needed: Fields it must have, and their types.

    Raises:
        ConfigError: when it is damaged, or a field is missing or of another type.
    """
    why = "it is no JSON object"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        wrong = [k for k, kind in needed.items() if not isinstance(found.get(k), kind)]
        if not wrong:
            return found
        why = f"'{wrong[0]}' is missing or not of type {needed[wrong[0]].__name__}"
    raise ConfigError(f"{path} is damaged ({why}): copy the file again or make its folder anew")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors and fsync.

    Raises:
        OSError: when the disk is full or not writable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(ready, path)
        path.chmod(mode)  # safetensors writes for the owner alone, whatever the umask
    except SafetensorError as error:
        code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        raise OSError(code, str(error), str(path)) from None
    _sync(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: for a file that is missing or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing from the checkpoint") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}): use another checkpoint") from None


def tensor_room(names: Iterable[str], file_bytes: int) -> int:
    """Bytes of tensors that a safetensors file of ``file_bytes`` has room for beside the header.

    Args:
        names: Of the tensors that may be in it.
        file_bytes: Largest size of the file.
    """
    # An entry beside its name: type, shape and two offsets, less than 128 bytes up to four dimensions. Before them
    # stand a length and transformers' note of the format.
    return max(1, file_bytes - 128 - sum(len(name.encode()) + 128 for name in names))


def weight_files(folder: Path) -> list[Path]:
    """Files of a folder's weights: ``model.safetensors``, or the shards of the index; none where there are neither.

    Raises:
        CheckpointError: naming a shard that is missing, or one of another export, which other programs might read.
        ConfigError: when the index is damaged.
    """
    index, whole = folder / INDEX, folder / WEIGHTS
    shards = {p.name for p in folder.glob("model-?????-of-?????.safetensors")}
    if whole.is_file():
        named, others = {WEIGHTS}, shards | ({INDEX} if index.is_file() else set())
    elif index.is_file():
        named = {str(file) for file in read_json(index, weight_map=dict)["weight_map"].values()}
        others = shards - named
        for missing in sorted(named - shards):
            raise CheckpointError(
                f"{folder / missing} is missing: the checkpoint is incomplete, use another"
            )
    elif shards:
        raise CheckpointError(f"{index} is missing: the checkpoint is incomplete, use another")
    else:
        return []
    for other in sorted(others):
        raise CheckpointError(
            f"{folder / other} does not belong to the weights beside it: remove it or use another checkpoint"
        )
    return [folder / name for name in sorted(named)]


def write_folder(
    folder: Path, fill: Callable[[Path], None], manifest: Mapping[str, Any] | None = None
) -> None:
    """Make ``folder`` appear whole or not at all.

    ``fill`` writes into a temporary folder beside it, every file is hashed into ``manifest.json`` and fsynced, then one
    rename puts it in place. An older folder of that name is moved aside first and removed afterwards, but for files
    that its manifest does not list and the new one does not have: they move over. A link stays what it is: all this
    happens to the folder that it leads to.

    Raises:
        ConfigError: when the older folder was not made here: it holds files and no manifest.
        OSError: when writing fails (for instance a full disk); nothing is left behind, an older folder stays.
    """
    folder = folder.resolve()
    foreign_files(folder)  # refuses before anything is written
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        fill(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        hashes = {p.relative_to(temporary).as_posix(): _sha256(p) for p in files}
        for path in files:
            _sync(path)
        content = {"format": FORMAT, **(manifest or {}), "files": hashes}
        write_text(temporary / "manifest.json", json.dumps(content, indent=1) + "\n")
        for path in [p for p in temporary.rglob("*") if p.is_dir()]:
            _sync(path)
        if folder.exists():
            others = foreign_files(folder)
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            folder.rename(old)
            temporary.rename(folder)
            for name in others:
                if not (folder / name).exists():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (old / name).rename(folder / name)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def foreign_files(folder: Path) -> list[Path]:
    """Files in a folder that :func:`write_folder` did not write, relative to it; none where the manifest is damaged.

    Raises:
        ConfigError: when it has no manifest and holds more than hidden files.
    """
    if not folder.exists():
        return []
    visible = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    listed: set[str] = set()
    if "manifest.json" in visible:
        try:
            listed = {"manifest.json", *read_manifest(folder)["files"]}
        except CheckpointError:
            return []
    elif visible:
        raise ConfigError(
            f"{folder} holds something else than a model ({', '.join(visible[:3])}): choose a new or an empty folder"
        )
    found = [p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()]
    return [n for n in (p.relative_to(folder) for p in found) if n.as_posix() not in listed]


@contextlib.contextmanager
def locked(folder: Path, refusal: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder against other processes that ask for it; the lock goes with the process, however it ends.

    Where the system or the file system has no locks there is none.

    Raises:
        ConfigError: saying ``refusal``, if another process holds it, unless ``wait``.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ConfigError(refusal) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def finish_renames(parent: Path) -> None:
    """Put back what a kill between the two renames of :func:`write_folder` left without its name."""
    for old in parent.glob(".*.old"):
        found = re.fullmatch(r"\.(.+)\.\d+\.old", old.name)
        if found and not (parent / found[1]).exists():
            old.rename(parent / found[1])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read ``manifest.json``.

    Raises:
        CheckpointError: when it is missing, damaged or of a later format.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"]
        assert isinstance(files, dict)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a model folder: it has no manifest.json") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise CheckpointError(f"{path} is damaged: use another checkpoint") from None
    if manifest.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{folder} has format {manifest['format']}, this version reads up to {FORMAT}: update ddlm"
        )
    return typing.cast(dict[str, Any], manifest)


def content_hash(folder: Path) -> str:
    """Hash of what a model folder's manifest lists, but its card and the copies of our code: neither changes a result.

    Raises:
        CheckpointError: when there is no manifest that can be read.
    """
    listed = read_manifest(folder)["files"]
    kept = {k: v for k, v in listed.items() if not k.endswith((".md", ".py"))}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def verify_files(folder: Path, *, training: bool = False) -> dict[str, Any]:
    """Compare every file with the manifest's sha256 and return the manifest.

    A model card may be edited: README.md is not compared.

    Args:
        folder: A model folder.
        training: Check the files under ``training/`` too.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or altered.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        if name == "README.md" or (name.startswith("training/") and not training):
            continue
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, use another")
        if _sha256(path) != expected:
            raise CheckpointError(
                f"{path} is damaged (its sha256 is not the manifest's): use another checkpoint"
            )
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
