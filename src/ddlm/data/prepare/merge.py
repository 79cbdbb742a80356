"""The pieces of several machines become one data set."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ddlm.data.prepare.folder import check_same, is_finished, piece_name, write_index
from ddlm.data.prepare.progress import Progress, Report
from ddlm.data.shards import INDEX, SPLITS, Split, TokenShards, file_entry
from ddlm.files import locked
from ddlm.types import ConfigError


def merge(target: Path, request: dict[str, Any], report: Report) -> bool:
    """Put the pieces of all ranks together, in the order of ranks; False while some are missing."""
    world_size = request["world_size"]
    with locked(target, "", wait=True):
        if is_finished(target, request):
            return True
        folders = [target / piece_name(rank, world_size) for rank in range(world_size)]
        if not all((folder / INDEX).is_file() for folder in folders):
            return False
        report(Progress("merge"))
        pieces = [TokenShards(folder) for folder in folders]
        for piece in pieces:
            check_same(piece.folder, piece.index["request"], request)
            if piece.tokenizer_hash != pieces[0].tokenizer_hash:
                raise ConfigError(
                    f"{piece.folder} was made with another tokenizer than {pieces[0].folder}"
                )
        splits: dict[Split, Any] = {split: _merge_split(target, split, pieces) for split in SPLITS}
        pieces[0].tokenizer.save(target)
        state = {
            "request": request,
            "threshold": pieces[0].index["threshold"],
            "nbytes": sum(p.index["nbytes"] for p in pieces),
            "cursor": {"empty": sum(p.index["empty_documents"] for p in pieces)},
        }
        write_index(target, state, pieces[0].tokenizer, splits)
        for folder in folders:
            shutil.rmtree(folder)
    return True


def _merge_split(target: Path, split: Split, pieces: list[TokenShards]) -> dict[str, Any]:
    shards: list[dict[str, Any]] = []
    tokens = 0
    ends_file, hashes_file = target / f"{split}-ends.bin", target / f"{split}-hashes.bin"
    with ends_file.open("wb") as ends, hashes_file.open("wb") as hashes:
        for piece in pieces:
            for entry in piece.index["splits"][split]["shards"]:
                name = f"{split}-{len(shards):05d}.bin"
                (target / name).unlink(missing_ok=True)
                try:
                    os.link(piece.folder / entry["file"], target / name)
                except OSError:  # no hard links there
                    shutil.copyfile(piece.folder / entry["file"], target / name)
                shards.append(entry | {"file": name})
            ends.write((piece.document_ends(split) + np.uint64(tokens)).tobytes())
            hashes.write(piece.document_hashes(split).tobytes())
            tokens += piece.tokens(split)
        for file in (ends, hashes):
            file.flush()
            os.fsync(file.fileno())
    return {
        "tokens": tokens,
        "documents": sum(p.documents(split) for p in pieces),
        "shards": shards,
        "ends": file_entry(ends_file),
        "hashes": file_entry(hashes_file),
    }
