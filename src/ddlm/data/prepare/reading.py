"""A corpus as batches of texts from any point on, and what must be known of it beforehand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import IO

from ddlm.data.sources import Part, document_hash
from ddlm.types import DataError

TOKENIZER_BYTES = 128 << 20
"""Text a tokenizer is trained on at most, an equal share of it from each of at most 16 places of the corpus."""
_TOKENIZER_PLACES = 16
HASHED_BYTES = 128 << 20
"""Of a corpus' content, what is compared at most to tell whether it has changed."""
_HASHED_OF_A_FILE = 4 << 10
"""At least this much of each file, whatever their number."""
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1 << 20


@dataclass(frozen=True)
class Cursor:
    """Where reading stands.

    Attributes:
        part: Index of the part being read.
        documents: Documents read of it, empty ones included.
        empty: Empty documents passed over so far, in all parts.
    """

    part: int = 0
    documents: int = 0
    empty: int = 0


Batch = tuple[list[str], Cursor]


def fingerprint(parts: list[Part]) -> str:
    """Names and sizes of a corpus, wherever it lies, as a short string."""
    listed = [(part.name.rsplit("/", 1)[-1], part.size) for part in parts]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def content_hash(parts: list[Part]) -> str:
    """Content of a corpus' files as a short string, read in a moment whatever their size.

    Each file has an equal part of :data:`HASHED_BYTES`; of a larger one it is the beginning and the end, so that an
    edit in its middle that keeps the size is not seen. The end of a gzip file holds a checksum of all that is in it.
    Nothing is read of the hub's shards.
    """
    each = max(HASHED_BYTES // max(len(parts), 1), _HASHED_OF_A_FILE)
    digest = hashlib.sha256()
    for part in parts:
        if part.file is None:
            continue
        whole = part.size <= each
        try:
            with part.file.open("rb") as file:
                _hash_next(file, part.size if whole else each // 2, digest.update)
                if not whole:
                    file.seek(part.size - each // 2)
                    _hash_next(file, each // 2, digest.update)
        except OSError as error:
            raise DataError(f"{part.name} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _hash_next(file: IO[bytes], length: int, update: Callable[[bytes], None]) -> None:
    while length and (block := file.read(min(length, 1 << 20))):
        update(block)
        length -= len(block)


def share(parts: list[Part], rank: int, world_size: int) -> tuple[list[Part], tuple[int, int]]:
    """This rank's parts and which documents of them: whole parts where there are enough, else every n-th document."""
    if len(parts) >= world_size:
        bounds = [len(parts) * r // world_size for r in (rank, rank + 1)]
        return parts[bounds[0] : bounds[1]], (0, 1)
    return parts, (rank, world_size)


def read_batches(
    parts: list[Part], cursor: Cursor, stride: tuple[int, int], limit: int | None
) -> Iterator[Batch]:
    """Batches of texts from ``cursor`` on, each with the cursor after it.

    Args:
        parts: What to read.
        cursor: Where to begin.
        stride: (r, n): of each part only the documents whose number is r modulo n.
        limit: Documents to take at most; None takes all.
    """
    batch: list[str] = []
    characters, left, empty, told = 0, limit, cursor.empty, cursor.empty
    for index in range(cursor.part, len(parts)):
        if left == 0:
            break
        skip = cursor.documents if index == cursor.part else 0
        for number, (text, _) in enumerate(parts[index].reader()):
            if number < skip or number % stride[1] != stride[0]:
                continue
            if not text:
                empty += 1
                continue
            batch.append(text)
            characters += len(text)
            if left is not None:
                left -= 1
            if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield batch, Cursor(index, number + 1, empty)
                batch, characters, told = [], 0, empty
            if left == 0:
                break
    if batch or empty > told:  # documents after the last full batch, or only empty ones
        yield batch, Cursor(len(parts), 0, empty)


def val_threshold(
    parts: list[Part], fraction: float, limit: int | None, world_size: int = 1
) -> int:
    """Documents with a hash below it are held out.

    ``fraction`` of the range of hashes, unless that would leave one side empty: then the threshold that gives it one
    document. The corpus is read only until both sides have one, which of a large corpus is its very beginning.
    """
    threshold = int(fraction * 2.0**64)
    if threshold == 0:
        return 0
    smallest, largest = 1 << 64, -1
    for text in texts(parts, limit, world_size):
        value = document_hash(text)
        smallest, largest = min(smallest, value), max(largest, value)
        if smallest < threshold <= largest:
            return threshold
    if smallest >= largest:  # no two different documents: nothing to hold out
        return 0
    return smallest + 1 if smallest >= threshold else largest


def tokenizer_texts(
    parts: list[Part], threshold: int, limit: int | None, world_size: int = 1
) -> Iterator[str]:
    """Training documents to train a tokenizer on: the same on every machine.

    Evenly from over the corpus, on from each place through as many parts as its share takes: a corpus may be
    thousands of short files. With a limit, which takes the beginning of each rank's share, from there.
    """
    if limit is not None:
        groups = [parts]
    else:
        count = min(len(parts), _TOKENIZER_PLACES)
        bounds = [i * len(parts) // count for i in range(count + 1)]
        groups = [parts[start:stop] for start, stop in pairwise(bounds)]
    for group in groups:
        size = 0
        for text in texts(group, limit, world_size):
            if document_hash(text) >= threshold:
                yield text
                size += len(text)
            if size >= TOKENIZER_BYTES // len(groups):
                break


def texts(parts: list[Part], limit: int | None, world_size: int = 1) -> Iterator[str]:
    """The texts of a corpus that are not empty; with a limit those that ``world_size`` ranks take together."""
    for rank in range(1 if limit is None else world_size):
        ours, stride = (parts, (0, 1)) if limit is None else share(parts, rank, world_size)
        for batch, _ in read_batches(ours, Cursor(), stride, limit):
            yield from batch
