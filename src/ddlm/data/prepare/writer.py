"""Appending to token shards, so that an interrupted writer goes on where it was last on the disk."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ddlm.data.prepare.encode import Encoded
from ddlm.data.shards import UINT64, Split, file_entry
from ddlm.types import DataError


class ShardWriter:
    """Appends packed documents to the shards of one split; resumable at every :meth:`commit`.

    Args:
        folder: Where the files go.
        split: "train" or "val".
        dtype: uint16 or uint32.
        shard_tokens: A shard is closed after the document that brings it to this many tokens.
        state: What :meth:`commit` returned, to go on from there; whatever was written after it is cut off.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        dtype: np.dtype[np.unsignedinteger],
        shard_tokens: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype = dtype.newbyteorder("<")
        state = state or {"shards": [], "open": 0, "tokens": 0, "documents": 0}
        self._shards: list[dict[str, Any]] = list(state["shards"])
        self._open_tokens, self.tokens, self.documents = (
            int(state["open"]),
            int(state["tokens"]),
            int(state["documents"]),
        )
        for stale in folder.iterdir():
            number = re.fullmatch(rf"{split}-([0-9]{{5}})\.bin", stale.name)
            if number is not None and int(number[1]) > len(self._shards):
                stale.unlink()
        self._ids = self._reopen(self._shard_name(), self._open_tokens * self._dtype.itemsize)
        self._ends = self._reopen(f"{split}-ends.bin", self.documents * UINT64.itemsize)
        self._hashes = self._reopen(f"{split}-hashes.bin", self.documents * UINT64.itemsize)

    def add(
        self,
        ids: npt.NDArray[np.unsignedinteger],
        lengths: npt.NDArray[np.int64],
        hashes: npt.NDArray[np.uint64],
    ) -> None:
        """Append documents: their ids one after another, each with its end token, and their text hashes."""
        ends = np.cumsum(lengths)
        self._ends.write((ends + self.tokens).astype(UINT64).tobytes())
        self._hashes.write(hashes.astype(UINT64).tobytes())
        written = 0
        while written < len(ids):
            full = np.searchsorted(ends, written + self._shard_tokens - self._open_tokens)
            stop = int(ends[min(int(full), len(ends) - 1)])
            self._ids.write(ids[written:stop].astype(self._dtype, copy=False).tobytes())
            self._open_tokens += stop - written
            written = stop
            if self._open_tokens >= self._shard_tokens:
                self._close_shard()
                self._ids = self._reopen(self._shard_name(), 0)
        self.tokens += len(ids)
        self.documents += len(lengths)

    def commit(self) -> dict[str, Any]:
        """Bring everything to the disk and return the state from which writing can go on."""
        for file in (self._ids, self._ends, self._hashes):
            file.flush()
            os.fsync(file.fileno())
        return {
            "shards": list(self._shards),
            "open": self._open_tokens,
            "tokens": self.tokens,
            "documents": self.documents,
        }

    def finish(self) -> dict[str, Any]:
        """Close all files and return the split's entry for the index."""
        self.commit()
        if self._open_tokens:
            self._close_shard()
        else:
            self._ids.close()
            (self._folder / self._shard_name()).unlink()
        self._ends.close()
        self._hashes.close()
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "shards": self._shards,
            "ends": file_entry(self._folder / f"{self._split}-ends.bin"),
            "hashes": file_entry(self._folder / f"{self._split}-hashes.bin"),
        }

    def close(self) -> None:
        """Close the files without finishing; what was not committed is cut off when writing goes on."""
        for file in (self._ids, self._ends, self._hashes):
            file.close()

    def _close_shard(self) -> None:
        self._ids.flush()
        os.fsync(self._ids.fileno())
        self._ids.close()
        self._shards.append(file_entry(self._folder / self._shard_name()))
        self._open_tokens = 0

    def _shard_name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}.bin"

    def _reopen(self, name: str, size: int) -> BinaryIO:
        path = self._folder / name
        if size and (not path.is_file() or path.stat().st_size < size):
            raise DataError(
                f"{path} is shorter than when it was last saved: delete {self._folder} and prepare again"
            )
        file = path.open("r+b" if size else "wb")
        file.truncate(size)
        file.seek(size)
        return file


def add_split(writers: dict[Split, ShardWriter], encoded: Encoded, threshold: int) -> None:
    """Append each document to its split: held out when its hash is below ``threshold``."""
    held_out = encoded.hashes < np.uint64(threshold)
    ids_held_out = np.repeat(held_out, encoded.lengths)
    sides: tuple[tuple[Split, npt.NDArray[np.bool_], npt.NDArray[np.bool_]], ...] = (
        ("train", ~held_out, ~ids_held_out),
        ("val", held_out, ids_held_out),
    )
    for split, documents, ids in sides:
        if documents.any():
            writers[split].add(
                encoded.ids[ids], encoded.lengths[documents], encoded.hashes[documents]
            )
