"""Corpus to token shards: train or load a tokenizer, tokenise in parallel, split, write; resumable, over machines."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ddlm.data.prepare.encode import Encoder
from ddlm.data.prepare.folder import (
    check_place,
    check_same,
    disk_errors,
    is_finished,
    made,
    piece_name,
    read_state,
    write_index,
)
from ddlm.data.prepare.merge import merge
from ddlm.data.prepare.progress import Meter, Progress, Report, reporting
from ddlm.data.prepare.reading import (
    Batch,
    Cursor,
    content_hash,
    fingerprint,
    read_batches,
    share,
    texts,
    tokenizer_texts,
    val_threshold,
)
from ddlm.data.prepare.writer import ShardWriter, add_split
from ddlm.data.shards import SPLITS, STATE, Split, TokenShards, id_dtype, write_json
from ddlm.data.sources import Part, find_parts
from ddlm.data.tokenizer import Tokenizer
from ddlm.files import locked
from ddlm.settings import convert
from ddlm.types import ConfigError, DataError, local

COMMIT_SECONDS = 5.0
"""How often the state is brought to the disk: what an interruption loses at most."""
SMALL = 4 << 20
"""A corpus below this many characters is tokenised in this process: it is done before workers have started."""


@dataclass(frozen=True)
class PrepareReport:
    """What :func:`prepare` did.

    Attributes:
        folder: The data set, or this machine's piece while others are missing.
        complete: False while pieces of other ranks are missing; the last rank to finish merges them.
        documents: Documents in the folder, both splits.
        tokens: Tokens in the folder, end tokens included.
        nbytes: UTF-8 bytes of their text.
        val_documents: Documents held out.
        val_tokens: Tokens of the documents held out.
        vocab_size: Entries of the tokenizer.
        seconds: Wall-clock seconds of this call.
        documents_per_second: Documents written by this call over its seconds of tokenising.
        tokens_per_second: Tokens written by this call over its seconds of tokenising.
        resumed: Whether an earlier, interrupted call was continued.
        reused: Whether the data set was already there and nothing was done.
    """

    folder: Path
    complete: bool
    documents: int
    tokens: int
    nbytes: int
    val_documents: int
    val_tokens: int
    vocab_size: int
    seconds: float
    documents_per_second: float = 0.0
    tokens_per_second: float = 0.0
    resumed: bool = False
    reused: bool = False


def prepare(
    sources: str | os.PathLike[str] | Sequence[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | Tokenizer | None = None,
    vocab_size: int = 32_000,
    val_fraction: float = 0.01,
    text_field: str = "text",
    processes: int | None = None,
    shard_tokens: int = 1 << 27,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: bool | Report = False,
) -> PrepareReport:
    """Turn a corpus into the token shards of :class:`ddlm.data.shards.TokenShards`.

    The result depends on the corpus and the options only, never on interruptions or the number of processes. A call
    that was interrupted at any moment goes on when it is repeated; a finished data set is left as it is.

    Args:
        sources: Files, folders, globs or ``hf:repo[,config[,split]]``, see :func:`ddlm.data.sources.documents`. What
            is found below ``out`` is left out.
        out: Folder of the data set, made if missing; new, empty or that of an earlier call.
        tokenizer: What to tokenise with (anything :meth:`Tokenizer.load` takes); None trains a byte-level BPE on the
            training documents of the corpus.
        vocab_size: Entries of the tokenizer to be trained; of no effect when one is given.
        val_fraction: Share of the documents held out, chosen by a hash of their text: the same documents whatever
            their order, and copies of a document on the same side. At least one document is held out (and one kept)
            when there are two different ones; 0 holds out none.
        text_field: Field or column that holds the text.
        processes: Tokenising processes; None takes one for each core.
        shard_tokens: A shard ends with the document that brings it to this many tokens.
        limit: Documents to take at most, of each rank's share: ``world_size`` ranks together take up to
            ``world_size`` times as many. None takes all.
        rank: Which share of the corpus this machine takes, 0 to ``world_size - 1``.
        world_size: Over how many machines the corpus is spread. Each writes a piece into ``out`` (a shared folder, or
            copied together); the last to finish, or a repeated call, merges them.
        progress: True shows a bar; a function is called with :class:`Progress` a few times a second.

    Raises:
        ConfigError: on unusable arguments, an empty corpus, or an ``out`` that is a file or holds something else.
            DataError on a file of the corpus that cannot be read.
    """
    start = time.monotonic()
    # numbers of NumPy become plain ones, which JSON can hold
    vocab_size = convert(vocab_size, int, "vocab_size")
    val_fraction = convert(val_fraction, float, "val_fraction")
    if processes is None:
        processes = os.cpu_count() or 1
    processes = convert(processes, int, "processes")
    shard_tokens = convert(shard_tokens, int, "shard_tokens")
    limit = convert(limit, int | None, "limit")
    rank, world_size = convert(rank, int, "rank"), convert(world_size, int, "world_size")
    _check_arguments(val_fraction, processes, shard_tokens, limit, rank, world_size)
    target = local(out)
    check_place(target)
    parts = find_parts(sources, text_field, target)
    loaded = (
        tokenizer
        if tokenizer is None or isinstance(tokenizer, Tokenizer)
        else Tokenizer.load(tokenizer)
    )
    request: dict[str, Any] = {
        "sources": [os.fspath(sources)]
        if isinstance(sources, (str, os.PathLike))
        else [os.fspath(s) for s in sources],
        "corpus": fingerprint(parts),
        "content": content_hash(parts),
        "text_field": text_field,
        "tokenizer": f"bpe-{vocab_size}" if loaded is None else loaded.hash,
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "limit": limit,
        "world_size": world_size,
    }
    folder = target if world_size == 1 else target / piece_name(rank, world_size)
    with reporting(progress) as report, disk_errors(folder):
        if is_finished(target, request):
            return _report(target, start, reused=True)
        if (begun := read_state(target)) is not None:
            check_same(target, begun["request"], request)
        ours, stride = share(parts, rank, world_size)
        run = _Run(folder, request | {"rank": rank}, ours, stride, report)
        refusal = (
            f"another preparation is writing to {folder}: wait for it or choose another folder"
        )
        with made(folder), locked(folder, refusal):
            check_place(folder)
            if not is_finished(folder, run.request):
                run.write(parts, loaded, vocab_size, processes)
        if world_size > 1 and not merge(target, request, report):
            return _report(folder, start, run, complete=False)
        return _report(target, start, run)


class _Run:
    """One machine's share of a preparation."""

    def __init__(
        self,
        folder: Path,
        request: dict[str, Any],
        parts: list[Part],
        stride: tuple[int, int],
        report: Report,
    ) -> None:
        self.folder, self.request, self.report = folder, request, report
        self.parts, self.stride = parts, stride
        self.resumed = False
        self.rates = (0.0, 0.0)

    def write(
        self, corpus: list[Part], tokenizer: Tokenizer | None, vocab_size: int, processes: int
    ) -> None:
        """Tokenise the share into ``folder``, from the start or from the last committed state."""
        state = self._load_state()
        if state is None:
            state, tokenizer = self._begin(corpus, tokenizer, vocab_size)
        else:
            self.resumed = True
            tokenizer = Tokenizer.load(self.folder)
        splits = self._tokenise(state, tokenizer, processes)
        write_index(self.folder, state, tokenizer, splits)

    def _load_state(self) -> dict[str, Any] | None:
        """Where an interrupted call stood; None if it had not come to its first document."""
        state = read_state(self.folder)
        if state is None:
            return None
        check_same(self.folder, state["request"], self.request)
        return state if "cursor" in state else None

    def _begin(
        self, corpus: list[Part], tokenizer: Tokenizer | None, vocab_size: int
    ) -> tuple[dict[str, Any], Tokenizer]:
        """The first state: which documents are held out and the tokenizer, for the whole corpus."""
        limit, world_size = self.request["limit"], self.request["world_size"]
        if next(texts(corpus, 1), None) is None:
            named = ", ".join(self.request["sources"])
            raise DataError(f"the corpus {named} is empty: it has no document with text")
        threshold = val_threshold(corpus, self.request["val_fraction"], limit, world_size)
        if tokenizer is None:
            self.report(Progress("tokenizer"))
            training = tokenizer_texts(corpus, threshold, limit, world_size)
            tokenizer = Tokenizer.train(training, vocab_size)
        # First of all the folder is marked as a preparation's: what lies in one that is not is never written over.
        write_json(self.folder / STATE, {"request": self.request})
        tokenizer.save(self.folder)
        state = {
            "request": self.request,
            "threshold": threshold,
            "cursor": asdict(Cursor()),
            "nbytes": 0,
            "splits": {},
        }
        write_json(self.folder / STATE, state)
        return state, tokenizer

    def _tokenise(
        self, state: dict[str, Any], tokenizer: Tokenizer, processes: int
    ) -> dict[Split, Any]:
        """Write all documents after the state's cursor, keeping ``state`` up to date; the splits' index entries."""
        dtype, limit = id_dtype(tokenizer.vocab_size), self.request["limit"]
        writers: dict[Split, ShardWriter] = {}
        with contextlib.ExitStack() as stack:
            for split in SPLITS:
                saved = state["splits"].get(split)
                writer = ShardWriter(self.folder, split, dtype, self.request["shard_tokens"], saved)
                stack.callback(writer.close)
                writers[split] = writer

            def counts() -> tuple[int, int]:
                both = writers.values()
                return sum(w.documents for w in both), sum(w.tokens for w in both)

            def commit() -> None:
                state["splits"] = {split: writer.commit() for split, writer in writers.items()}
                write_json(self.folder / STATE, state)

            left = None if limit is None else limit - counts()[0]
            batches = read_batches(self.parts, Cursor(**state["cursor"]), self.stride, left)
            head: list[Batch] = []
            size = 0
            while size < SMALL and (batch := next(batches, None)) is not None:
                head.append(batch)
                size += sum(map(len, batch[0]))
            encoder = stack.enter_context(Encoder(tokenizer, processes if size >= SMALL else 1))
            meter = Meter(
                self.report, counts, lambda: self._fraction(state["cursor"]["part"], counts()[0])
            )
            committed = time.monotonic()
            for encoded, cursor in encoder.map(chain(head, batches)):
                add_split(writers, encoded, state["threshold"])
                state["nbytes"] += encoded.nbytes
                state["cursor"] = asdict(cursor)
                meter.show(state["nbytes"])
                if time.monotonic() - committed >= COMMIT_SECONDS:
                    commit()
                    committed = time.monotonic()
            self.rates = meter.rates()
            commit()
            return {split: writer.finish() for split, writer in writers.items()}

    def _fraction(self, part: int, documents: int) -> float:
        """Part of the share that is done: of its bytes, or of the documents of a limit that ends it earlier."""
        limit = self.request["limit"]
        counted = 0.0 if limit is None else documents / limit
        total = sum(p.size for p in self.parts)
        if total == 0:
            return max(counted, part / max(len(self.parts), 1))
        reading = self.parts[part].tell() if part < len(self.parts) else 0
        return max(counted, (sum(p.size for p in self.parts[:part]) + reading) / total)


def _check_arguments(
    val_fraction: float,
    processes: int,
    shard_tokens: int,
    limit: int | None,
    rank: int,
    world_size: int,
) -> None:
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"val_fraction {val_fraction} must be at least 0 and below 1")
    for name, value in (
        ("processes", processes),
        ("shard_tokens", shard_tokens),
        ("world_size", world_size),
    ):
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit} must be at least 1")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} must be at least 0 and below world_size {world_size}")


def _report(
    folder: Path,
    start: float,
    run: _Run | None = None,
    *,
    complete: bool = True,
    reused: bool = False,
) -> PrepareReport:
    data = TokenShards(folder)
    rates = run.rates if run is not None else (0.0, 0.0)
    return PrepareReport(
        folder=folder,
        complete=complete,
        documents=sum(data.documents(s) for s in SPLITS),
        tokens=sum(data.tokens(s) for s in SPLITS),
        nbytes=int(data.index["nbytes"]),
        val_documents=data.documents("val"),
        val_tokens=data.tokens("val"),
        vocab_size=data.vocab_size,
        seconds=time.monotonic() - start,
        documents_per_second=rates[0],
        tokens_per_second=rates[1],
        resumed=run is not None and run.resumed,
        reused=reused,
    )
