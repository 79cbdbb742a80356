"""Documents out of one file: plain text, JSON lines, a JSON array or parquet; the first three also packed."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ddlm.data.tokenizer import END_TOKEN
from ddlm.types import ConfigError, DataError


class _Xz(io.RawIOBase):
    """Streams of .xz unpacked one after another; unlike LZMAFile it refuses what follows them and is none."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._packed, self._stream = raw, b"", lzma.LZMADecompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if self._stream.eof:  # zeros may stand between streams
                self._packed = (self._stream.unused_data + self._packed).lstrip(b"\0")
                while not self._packed:
                    if not (more := self._raw.read(io.DEFAULT_BUFFER_SIZE)):
                        return 0
                    self._packed = more.lstrip(b"\0")
                self._stream = lzma.LZMADecompressor()
            if self._stream.needs_input and not self._packed:
                self._packed = self._raw.read(io.DEFAULT_BUFFER_SIZE)
                if not self._packed:
                    raise EOFError("it ends within a stream")
            data = self._stream.decompress(self._packed, len(buffer))
            self._packed = b""
        buffer[: len(data)] = data
        return len(data)


_OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    ".xz": lambda raw: io.BufferedReader(_Xz(raw)),
}
_TEXT, _JSON, _PARQUET = (".txt", ".text"), (".jsonl", ".ndjson", ".json"), (".parquet",)
KINDS = "*.txt, *.jsonl, *.json (these also .gz or .xz) or *.parquet"
"""What a corpus file may be, for messages."""
_TXT_TARGET = 1 << 16
"""Bytes after which a plain-text document ends at the next blank line."""
_TXT_LIMIT = 1 << 17
"""Bytes after which it ends at the next line end, blank line or not."""
_JSON_SPACE = re.compile(r"[ \t\n\r]*")


def is_corpus_file(file: Path) -> bool:
    """Whether the file's name is that of a kind that can be read."""
    return _kind(file) is not None


def read_file(file: Path, raw: IO[bytes], text_field: str) -> Iterator[tuple[str, str]]:
    """Yield ``(text, source)`` of every document of a file, empty ones included.

    Args:
        file: Its path; the name tells the kind.
        raw: The file, opened at its start.
        text_field: Field or column that holds the text.

    Raises:
        DataError: if it cannot be read, naming the file and the byte, line, record or row.
    """
    kind = _kind(file)
    try:
        if kind is _PARQUET:
            yield from _read_parquet(file, text_field)
        elif kind is _TEXT:
            yield from _read_text(file, _unpack(file, raw))
        else:
            yield from _read_json(file, _unpack(file, raw), text_field)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{file} is damaged and cannot be unpacked: {error}") from error


def text_of(record: Any, text_field: str, where: str) -> str:
    """The text of a record, the object's field ``text_field``; ``where`` names the record in messages."""
    if not isinstance(record, dict):
        raise DataError(
            f"{where} is a JSON {type(record).__name__}, not an object with a field {text_field!r}"
        )
    if text_field not in record:
        raise missing_field(where, text_field, list(record))
    text = record[text_field]
    if not isinstance(text, str):
        found = "null" if text is None else type(text).__name__
        raise DataError(
            f"{where}: field {text_field!r} is {found}, need a string: leave the record out or give it a text"
        )
    return _unicode(text, f"{where}: field {text_field!r}")


def missing_field(where: str, text_field: str, found: Sequence[str]) -> DataError:
    """The error for a record or file without the field of the text."""
    names = ", ".join(found) if found else "none"
    return DataError(
        f"{where} has no field {text_field!r}; its fields are: {names}; name the one that holds the text"
    )


def _unicode(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"holds half of a surrogate pair at character {error.start}"
        raise DataError(f"{what} {half}, which is no Unicode text") from error
    return text


def _unpacked_name(file: Path) -> str:
    name = file.name.lower()
    return name.removesuffix(file.suffix.lower()) if file.suffix.lower() in _OPENERS else name


def _kind(file: Path) -> tuple[str, ...] | None:
    name = _unpacked_name(file)
    for kind in (_TEXT, _JSON):
        if name.endswith(kind):
            return kind
    return _PARQUET if file.name.lower().endswith(_PARQUET) else None


def _unpack(file: Path, raw: IO[bytes]) -> IO[bytes]:
    opener = _OPENERS.get(file.suffix.lower())
    return raw if opener is None else opener(raw)


def _read_text(file: Path, data: IO[bytes]) -> Iterator[tuple[str, str]]:
    separator = END_TOKEN.encode()
    lines: list[bytes] = []
    start = offset = number = length = 0
    whole = True  # whether a line begins here, not a further piece of a long one
    for line in _lines(data):
        if whole and line.rstrip(b"\r\n") == separator:
            yield _decode(b"".join(lines), file, start), f"{file}:{number + 1}"
            lines, length, start = [], 0, offset + len(line)
            number += 1
        else:
            lines.append(line)
            length += len(line)
            if (
                (length >= _TXT_TARGET and not line.strip())
                or length >= _TXT_LIMIT
                or not line.endswith(b"\n")  # a piece of a long line, or the end of the file
            ):
                yield _decode(b"".join(lines), file, start), f"{file}:{number + 1}"
                lines, length, start = [], 0, offset + len(line)
                number += 1
        offset += len(line)
        whole = line.endswith(b"\n")
    if lines:
        yield _decode(b"".join(lines), file, start), f"{file}:{number + 1}"


def _lines(data: IO[bytes]) -> Iterator[bytes]:
    """Lines; one longer than ``_TXT_LIMIT`` in pieces, cut after a space or, without any, between two characters."""
    rest = b""
    while line := rest + data.readline(_TXT_LIMIT - len(rest)):
        rest = b""
        if len(line) == _TXT_LIMIT and not line.endswith(b"\n"):
            cut = line.rfind(b" ") + 1 or len(line)
            if cut == len(line):
                while cut > 1 and line[cut - 1] & 0xC0 == 0x80:  # inside of a character of UTF-8
                    cut -= 1
                cut = max(cut - 1, 1)  # its first byte
            line, rest = line[:cut], line[cut:]
        yield line


def _read_json(file: Path, data: IO[bytes], text_field: str) -> Iterator[tuple[str, str]]:
    offset, blank = 0, True  # blank: no line so far holds anything
    for number, line in enumerate(data, 1):
        where = f"{file}:{number}"
        text = _decode(line, file, offset).removeprefix("\ufeff" if number == 1 else "")
        offset += len(line)
        if not text.strip():
            continue
        if blank and text.lstrip().startswith("[") and _unpacked_name(file).endswith(".json"):
            rest = _decode(data.read(), file, offset)
            # the blank lines before it count in what messages say
            yield from _read_array("\n" * (number - 1) + text + rest, file, text_field)
            return
        blank = False
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where} is not valid JSON ({error.msg}, column {error.colno}): need one object a line"
            ) from error
        except (ValueError, RecursionError) as error:
            raise _too_much(where, error) from error
        yield text_of(record, text_field, where), where


def _read_array(text: str, file: Path, text_field: str) -> Iterator[tuple[str, str]]:
    """One record after another, so that a bad one can be named and only one is held as objects."""

    def after_space(place: int) -> int:
        space = _JSON_SPACE.match(text, place)
        assert space is not None  # it matches the empty string
        return space.end()

    decoder = json.JSONDecoder()
    number, place = 0, after_space(text.index("[") + 1)
    going_on = not text.startswith("]", place)
    try:
        while going_on:
            number += 1
            where = f"{file}, record {number}"
            try:
                record, place = decoder.raw_decode(text, place)
            except json.JSONDecodeError:
                raise
            except (ValueError, RecursionError) as error:
                raise _too_much(where, error) from error
            if isinstance(record, str):
                yield _unicode(record, where), where
            else:
                yield text_of(record, text_field, where), where
            place = after_space(place)
            going_on = text.startswith(",", place)
            if going_on:
                place = after_space(place + 1)
            elif not text.startswith("]", place):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        if (rest := after_space(place + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, rest)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}:{error.lineno} is not valid JSON ({error.msg}, column {error.colno})"
        ) from error


def _too_much(where: str, error: ValueError | RecursionError) -> DataError:
    """The error for JSON that is valid and yet more than Python's parser takes."""
    if isinstance(error, RecursionError):
        return DataError(f"{where} is nested too deeply to be read: take it out or flatten it")
    most = sys.get_int_max_str_digits()
    return DataError(
        f"{where} holds an integer of more than {most} digits: take it out or write it as a string"
    )


def _read_parquet(file: Path, text_field: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("parquet files need an extra: pip install 'ddlm[data]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{file} is not a readable parquet file: {' '.join(str(error).split())}"
        ) from error
    names = table.schema_arrow.names
    if text_field not in names:
        raise missing_field(str(file), text_field, names)
    number = 0
    batches = table.iter_batches(batch_size=1024, columns=[text_field])
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{file} is damaged, it cannot be read from row {number + 1} on: {reason}"
            ) from error
        if batch is None:
            return
        for value in _column_values(batch.column(0), f"{file}, row", number + 1):
            number += 1
            where = f"{file}, row {number}"
            yield text_of({text_field: value}, text_field, where), where


def _column_values(column: Any, row: str, first: int) -> list[Any]:
    """Values of a parquet column; pyarrow does not check by itself that its strings are UTF-8."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        for number, value in enumerate(column, first):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{row} {number} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
                    " of the string; the file is damaged or was written wrongly"
                ) from error
        raise
    return values


def _decode(data: bytes, file: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        unpacked = " (unpacked)" if file.suffix.lower() in _OPENERS else ""
        raise DataError(
            f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at offset {place}{unpacked}; convert it to UTF-8"
        ) from error
