"""Documents out of files, folders, globs and the hub, as a list of parts that can be read from any document on."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddlm.data.formats import KINDS, is_corpus_file, missing_field, read_file, text_of
from ddlm.types import ConfigError, DataError, local


@dataclass(frozen=True)
class Document:
    """One text and where it stands.

    Attributes:
        text: The text, byte for byte as in the source; never empty.
        source: File or hub shard, and line or number, for messages: ``"books.jsonl.gz:17"``.
    """

    text: str
    source: str


def document_hash(text: str) -> int:
    """8-byte hash of a document's text; decides its split and tells judges which documents were held out."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass
class Part:
    """A file or a hub shard: the unit in which machines share out a corpus and an interrupted run skips ahead.

    Attributes:
        name: Path or hub id, for messages.
        size: Bytes on disk; 0 where unknown.
        reader: Yields ``(text, source)`` of every document, empty ones included.
        tell: Bytes of ``size`` read so far by the running reader.
        file: The file; None for a hub shard.
    """

    name: str
    size: int
    reader: Callable[[], Iterator[tuple[str, str]]]
    tell: Callable[[], int] = lambda: 0
    file: Path | None = None


def documents(
    paths: str | os.PathLike[str] | Sequence[str], text_field: str = "text"
) -> Iterator[Document]:
    """Stream the documents of a corpus, in a fixed order and in constant memory.

    Args:
        paths: One or several of: a file, a folder (read recursively), a glob, or ``hf:repo[,config[,split]]`` for a
            data set of the hub (streamed) or a local folder in the hub's layout. Files are ``.txt``, ``.jsonl``,
            ``.json`` (an array or one object a line), each also as ``.gz`` or ``.xz``, and ``.parquet``.
        text_field: Field or column that holds the text.

    Yields:
        Documents with a text. A plain-text file is split at lines that hold only ``<|end|>``; longer stretches than
        64 KiB are cut at the next blank line, so that a single large file still has documents to hold out, and longer
        ones than 128 KiB at a line end or a space. The pieces of a file, put together, are the file.

    Raises:
        ConfigError: if a path is missing, of an unknown kind or empty; DataError if a file cannot be read as UTF-8
            text or JSON, naming the file and the byte or line.
    """
    for part in find_parts(paths, text_field):
        for text, source in part.reader():
            if text:
                yield Document(text, source)


def find_parts(
    paths: str | os.PathLike[str] | Sequence[str],
    text_field: str = "text",
    out: Path | None = None,
) -> list[Part]:
    """The parts of a corpus in a fixed order, each listed once; arguments and errors as in :func:`documents`.

    What is found below ``out``, the folder that is written to, is not corpus: it may lie within the corpus' folder. A
    file or folder below it that is named itself is taken.
    """
    written = None if out is None else out.resolve()
    given = (
        [os.fspath(paths)]
        if isinstance(paths, (str, os.PathLike))
        else [os.fspath(p) for p in paths]
    )
    if not given:
        raise ConfigError(
            f"no corpus given: name files, folders or globs of {KINDS}, or hf:repo,config"
        )
    parts: list[Part] = []
    seen: set[Path] = set()
    for path in given:
        if path.startswith("hf:"):
            parts.extend(_hub_parts(path, text_field))
            continue
        for file in _find_files(path, written):
            if file.resolve() not in seen:
                seen.add(file.resolve())
                parts.append(_file_part(file, text_field))
    return parts


def _find_files(path: str, written: Path | None) -> list[Path]:
    place = local(path)
    if place.is_file():
        listed, written = [place], None
    elif place.is_dir():
        listed = sorted(f for f in _below(place) if f.is_file() and is_corpus_file(f))
        if written is not None and written in place.resolve().parents:
            written = None
    else:
        listed = sorted(f for f in map(Path, glob.iglob(str(place), recursive=True)) if f.is_file())  # noqa: PTH207
    found = [f for f in listed if written is None or not f.resolve().is_relative_to(written)]
    if not found:
        need = f"need {KINDS}"
        if place.is_dir():
            what = f"folder {path} holds no corpus file"
        else:
            what = f"no file {'matches' if glob.has_magic(path) else 'or folder'} {path}"
            need = f"check the path; a corpus is {KINDS}, or hf:repo,config"
        if listed:
            what += f" outside {written}, which is written to"
        raise ConfigError(f"{what}: {need}")
    for file in found:
        if not is_corpus_file(file):
            raise ConfigError(f"{file} is not a kind of corpus file: need {KINDS}")
    return found


def _below(folder: Path) -> Iterator[Path]:
    """All files below a folder, links to folders followed, each folder once and always under the same name."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        key = os.path.realpath(place)
        if key in seen:
            folders.clear()  # nor go further down
            continue
        seen.add(key)
        folders.sort()
        yield from (Path(place, name) for name in files)


def _file_part(file: Path, text_field: str) -> Part:
    size = file.stat().st_size
    if size == 0:
        raise DataError(f"{file} is empty: a corpus file needs text")
    part = Part(str(file), size, lambda: iter(()), file=file)

    def read() -> Iterator[tuple[str, str]]:
        with file.open("rb") as raw:
            part.tell = raw.tell
            try:
                yield from read_file(file, raw, text_field)
            finally:
                part.tell = lambda: size

    part.reader = read
    return part


def _told(records: Iterable[Any], name: str) -> Iterator[Any]:
    """The records; what ends them early, such as a connection that is lost, is told in one line."""
    try:
        yield from records
    except GeneratorExit:
        raise
    except Exception as error:  # every transport raises its own classes
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name} broke off ({reason}): what was saved stays, run again to go on"
        ) from error


def _hub_parts(spec: str, text_field: str) -> list[Part]:
    """One part for each shard of a streamed data set of HF `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("data sets of the hub need an extra: pip install 'ddlm[data]'") from error
    repo, *rest = [field.strip() for field in spec.removeprefix("hf:").split(",")]
    if not repo or len(rest) > 2:
        raise ConfigError(
            f"{spec} is not a data set: write hf:repo[,config[,split]], as in hf:allenai/c4,en,train"
        )
    config, split = ([*rest, "", ""])[:2]
    try:
        stream = datasets.load_dataset(repo, config or None, split=split or "train", streaming=True)
    except Exception as error:  # every builder and transport raises its own classes
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"cannot open data set {spec} ({reason}): check its name, config, split and the network"
        ) from error
    columns = stream.column_names

    def part(index: int) -> Part:
        name = f"{spec}[shard {index} of {stream.num_shards}]"

        def read() -> Iterator[tuple[str, str]]:
            shard = stream.shard(num_shards=stream.num_shards, index=index)
            if columns is None or text_field in columns:
                with_text = shard if columns is None else shard.select_columns([text_field])
            else:
                raise missing_field(name, text_field, columns)
            for number, record in enumerate(_told(with_text, name), 1):
                where = f"{name}, record {number}"
                yield text_of(record, text_field, where), where

        return Part(name, 0, read)

    return [part(i) for i in range(stream.num_shards)]
