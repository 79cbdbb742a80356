"""Memory-mapped token shards: the folder that `ddlm prepare` writes and training reads.

index.json                what is here: counts, hashes, split, tokenizer; written last, so a folder with it is whole
train-00000.bin ...       packed ids (uint16 or uint32, little endian), every document closed by the end token
val-00000.bin ...         the held-out documents, packed alike
{train,val}-ends.bin      uint64: for each document, the position in the packed stream just after its end token
{train,val}-hashes.bin    uint64: for each document, the 8-byte BLAKE2b hash of its text
tokenizer.json            the tokenizer (or tokenizer.model), with tokenizer_config.json
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ddlm.data.tokenizer import Tokenizer
from ddlm.types import DataError, local

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
INDEX = "index.json"
STATE = "prepare.json"
FORMAT, VERSION = "ddlm-shards", 1

# Ids are stored little endian whatever the machine.
_LITTLE: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
UINT64 = np.dtype("<u8")


def id_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class TokenShards:
    """A prepared data set, opened for reading; nothing is loaded until it is asked for.

    Opening checks the size of every file, which finds a truncated copy at no cost; :meth:`verify` reads everything
    and finds any flipped bit.

    Attributes:
        folder: Where it lies.
        vocab_size: Ids are below it.
        end_id: Id that closes every document.
        tokenizer_hash: :attr:`Tokenizer.hash` of the tokenizer that made the ids.
        hash: SHA-256 (hex) over the hashes of all files: equal for equal data.
        nbytes: Bytes of all listed files.

    Raises:
        DataError: if the folder holds no finished data set, or a file is missing or of the wrong size.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = local(folder).absolute()  # files are opened later, from wherever one is then
        self.index = _read_index(self.folder)
        self.vocab_size = int(self.index["vocab_size"])
        self.end_id = int(self.index["end_id"])
        self.tokenizer_hash = str(self.index["tokenizer"])
        self.nbytes = 0
        digest = hashlib.sha256(self.tokenizer_hash.encode())
        for name, entry in self._files():
            self._check_size(name, int(entry["bytes"]))
            self.nbytes += int(entry["bytes"])
            digest.update(f"{name} {entry['sha256']}\n".encode())
        self.hash = digest.hexdigest()
        dtype = _LITTLE[self.index["dtype"]]
        self._streams = {
            split: _Stream(
                [self.folder / s["file"] for s in self._split(split)["shards"]],
                [s["bytes"] // dtype.itemsize for s in self._split(split)["shards"]],
                dtype,
            )
            for split in SPLITS
        }

    def tokens(self, split: Split = "train") -> int:
        """Tokens of a split, end tokens included."""
        return int(self._split(split)["tokens"])

    def documents(self, split: Split = "train") -> int:
        """Documents of a split."""
        return int(self._split(split)["documents"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids, loaded from the folder.

        Raises:
            DataError: if it is not the one the index names.
        """
        tokenizer = Tokenizer.load(self.folder)
        if tokenizer.hash != self.tokenizer_hash:
            raise DataError(
                f"the tokenizer in {self.folder} is not the one its shards were made with: prepare again"
            )
        return tokenizer

    def gather(self, split: Split, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Ids at ``positions`` (any shape) of the packed stream of a split, as int64 of the same shape."""
        return self._streams[split].gather(positions)

    def read(self, split: Split, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Ids ``start`` to ``stop`` of the packed stream of a split."""
        return self.gather(split, np.arange(start, stop, dtype=np.int64))

    def document(self, split: Split, index: int) -> npt.NDArray[np.int64]:
        """Ids of one document, its end token left out."""
        ends = self.document_ends(split)
        if not 0 <= index < len(ends):
            raise IndexError(f"document {index} of {len(ends)}")
        start = int(ends[index - 1]) if index else 0
        return self.read(split, start, int(ends[index]) - 1)

    def document_ends(self, split: Split) -> npt.NDArray[np.uint64]:
        """For each document the position just after its end token, ``(documents,)``; memory-mapped."""
        return _map(self.folder / self._split(split)["ends"]["file"], UINT64)

    def document_hashes(self, split: Split) -> npt.NDArray[np.uint64]:
        """8-byte hash of each document's text (see :func:`ddlm.data.sources.document_hash`); memory-mapped."""
        return _map(self.folder / self._split(split)["hashes"]["file"], UINT64)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every file and compare it with the hash in the index.

        Args:
            progress: Called with (bytes read, bytes in all) after each file.

        Raises:
            DataError: naming the first file that differs.
        """
        done = 0
        for name, entry in self._files():
            self._check_size(name, int(entry["bytes"]))
            if file_sha256(self.folder / name) != entry["sha256"]:
                raise DataError(
                    f"{self.folder / name} is damaged: its content does not have the hash in {INDEX};"
                    " copy it again or prepare the data again"
                )
            done += int(entry["bytes"])
            if progress is not None:
                progress(done, self.nbytes)
        _ = self.tokenizer

    def _split(self, split: Split) -> dict[str, Any]:
        found: dict[str, Any] = self.index["splits"][split]
        return found

    def _files(self) -> list[tuple[str, dict[str, Any]]]:
        entries = [
            entry
            for split in SPLITS
            for entry in (
                *self._split(split)["shards"],
                self._split(split)["ends"],
                self._split(split)["hashes"],
            )
        ]
        return [(entry["file"], entry) for entry in entries]

    def _check_size(self, name: str, size: int) -> None:
        path = self.folder / name
        if not path.is_file():
            raise DataError(
                f"{path} is missing though {INDEX} lists it: copy the whole folder or prepare it again"
            )
        found = path.stat().st_size
        if found != size:
            raise DataError(
                f"{path} has {found} bytes, need {size}: it is truncated or altered; copy it or prepare it again"
            )

    def __repr__(self) -> str:
        return f"TokenShards({str(self.folder)!r}, train={self.tokens('train')}, val={self.tokens('val')})"


class _Stream:
    """The shards of one split, addressed as one long array."""

    def __init__(self, paths: list[Path], sizes: list[int], dtype: np.dtype[Any]) -> None:
        self._paths, self._dtype = paths, dtype
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])
        self._maps: dict[int, npt.NDArray[Any]] = {}

    def gather(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        total = int(self._starts[-1])
        if positions.size and (positions.min() < 0 or positions.max() >= total):
            raise IndexError(
                f"positions {positions.min()}..{positions.max()} of a stream of {total} tokens"
            )
        if len(self._paths) == 1:
            return self._shard(0)[positions].astype(np.int64)
        out = np.empty(positions.shape, np.int64)
        shard = np.searchsorted(self._starts, positions, side="right") - 1
        for index in np.flatnonzero(np.bincount(shard.ravel())):
            here = shard == index
            out[here] = self._shard(int(index))[positions[here] - self._starts[index]]
        return out

    def _shard(self, index: int) -> npt.NDArray[Any]:
        found = self._maps.get(index)
        if found is None:
            found = self._maps[index] = _map(self._paths[index], self._dtype)
        return found


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        if (folder / STATE).is_file():
            raise DataError(
                f"{folder} is not finished: run the same `ddlm prepare` again, it goes on where it stopped"
            )
        if any(folder.glob("piece-*-of-*")):
            raise DataError(
                f"{folder} holds pieces of several machines that are not merged: finish every rank first"
            )
        raise DataError(
            f"{folder} holds no prepared data ({INDEX} is missing): make it with `ddlm prepare`"
        )
    try:
        index: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged (not valid JSON): prepare the data again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(
            f"{path} does not describe token shards: give a folder made by `ddlm prepare`"
        )
    if index.get("version") != VERSION:
        raise DataError(
            f"{path} has version {index.get('version')}, need {VERSION}: prepare the data again"
        )
    if index.get("sha256") != index_sha256(index):
        raise DataError(
            f"{path} is damaged: its content does not have its own hash; prepare the data again"
        )
    return index


def index_sha256(index: dict[str, Any]) -> str:
    """Hash of an index without its own ``sha256`` entry."""
    rest = {k: v for k, v in index.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Replace ``path`` by the JSON of ``value``, so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable (where the system can sync a folder)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_entry(path: Path) -> dict[str, Any]:
    """Name, size and hash of a file, as the index lists it."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
