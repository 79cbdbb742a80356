"""Held-out windows: what prompts, references and the row of real text are cut from.

Axes: N prompts, M further windows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddlm.data.shards import TokenShards
from ddlm.data.sources import document_hash, documents
from ddlm.data.tokenizer import Tokenizer
from ddlm.types import DataError, local

Ids = npt.NDArray[np.int64]

_AT_ONCE = 256  # documents of raw text that are tokenised together


@dataclass(frozen=True)
class Windows:
    """Held-out text.

    Attributes:
        tokens: Windows that prompts and references come from ``(N, T)``.
        more: Further windows, for the row of real text ``(M, T)``.
        hashes: Hashes of all documents they come from.
        source: Where they come from.
    """

    tokens: Ids
    more: Ids
    hashes: list[int]
    source: str


def held_out(source: str | Path, tokenizer: Tokenizer, length: int, count: int) -> Windows:
    """Cut held-out windows, each within one document: first one of every document, then a second one, and so on.

    Args:
        source: A folder of prepared data (its held-out split) or files of raw text.
        tokenizer: The model's.
        length: Tokens T of a window.
        count: Windows wanted for prompts; as many again are taken for the row of real text where there are.

    Raises:
        DataError: if there are fewer than two windows, or the data was prepared with another tokenizer.
    """
    # Where so many documents have a window, one of each is all that is taken: the rest is never read.
    found = list(islice(_long_enough(source, tokenizer, length), 2 * count))
    windows: list[Ids] = []
    used: set[int] = set()
    turn = 0
    while len(windows) < 2 * count:
        before = len(windows)
        for h, ids in found:
            if len(ids) >= (turn + 1) * length and len(windows) < 2 * count:
                windows.append(ids[turn * length : (turn + 1) * length])
                used.add(h)
        turn += 1
        if len(windows) == before:
            break
    if len(windows) < 2:
        raise DataError(
            f"the held-out text of {source} has {len(windows)} windows of {length} tokens: give more text"
        )
    first = min(count, len(windows))
    stacked = np.stack(windows)
    return Windows(stacked[:first], stacked[first:], sorted(used), str(source))


def _long_enough(
    source: str | Path, tokenizer: Tokenizer, length: int
) -> Iterator[tuple[int, Ids]]:
    """Hash and ids of each held-out document of at least ``length`` tokens, in their order."""
    folder = local(source)
    if (folder / "index.json").is_file() or (folder / "prepare.json").is_file():
        shards = TokenShards(source)
        if shards.tokenizer_hash != tokenizer.hash:
            raise DataError(
                f"{source} was prepared with another tokenizer than the model's: give raw text or prepare it with the"
                " model folder as tokenizer"
            )
        hashes, ends = shards.document_hashes("val"), shards.document_ends("val").astype(np.int64)
        lengths = np.diff(ends, prepend=0) - 1  # without the end token
        for i in np.flatnonzero(lengths >= length):
            stop = int(ends[i]) - 1
            yield int(hashes[i]), shards.read("val", stop - int(lengths[i]), stop)
        return
    texts = (d.text for d in documents(str(source)))
    while some := list(islice(texts, _AT_ONCE)):
        for text, row in zip(some, tokenizer.encode_batch(some), strict=True):
            if len(row) >= length:
                yield document_hash(text), np.asarray(row, np.int64)
