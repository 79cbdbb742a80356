from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddlm.data import bundled_corpus, formats
from ddlm.data.sources import document_hash, documents, find_parts
from ddlm.types import ConfigError, DataError

from .conftest import make_texts, write_jsonl


def read(paths: object, **options: str) -> list[str]:
    return [d.text for d in documents(paths, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
def test_json_lines_plain_and_packed(tmp_path: Path, ending: str) -> None:
    texts = make_texts(30)
    plain = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    path = tmp_path / f"b.json{'l' if not ending else ''}{ending}"
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[ending]
    path.write_bytes(pack(b"\xef\xbb\xbf" + plain + b"\n\n"))  # a byte order mark and empty lines
    assert read(path) == texts


def test_streams_of_xz_are_read_whole_or_refused(tmp_path: Path) -> None:
    texts = make_texts(3000)
    plain = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    cut = plain.index(b"\n", len(plain) // 2) + 1
    first, second = lzma.compress(plain[:cut]), lzma.compress(plain[cut:])
    path = tmp_path / "b.jsonl.xz"
    for between in (b"", b"\0" * 8):
        path.write_bytes(first + between + second)
        assert read(path) == texts
    damaged = bytearray(first + second)
    damaged[len(first)] ^= 1  # the second header: LZMAFile would end without a word
    for wrong in (damaged, first + b"more", first + second[:-20]):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=r"b\.jsonl\.xz is damaged and cannot be unpacked"):
            read(path)


def test_json_array_of_objects_or_strings(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"body": "one"}, {"body": "two"}], indent=2))
    assert read(path, text_field="body") == ["one", "two"]
    path.write_text('["one",\n "two"]')
    assert read(path) == ["one", "two"]
    path.write_text("[ ]\n")
    assert read(path) == []


def test_json_array_below_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf\n \r\n[{"text": "one"},\n {"text": "two"}]')
    assert read(path) == ["one", "two"]
    path.write_text('\n\n["one",\n oops]')
    with pytest.raises(
        DataError, match=r"a\.json:4 is not valid JSON \(Expecting value, column 2\)"
    ):
        read(path)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = make_texts(3000)
    parquet.write_table(pyarrow.table({"text": texts, "n": range(3000)}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == texts
    with pytest.raises(DataError, match=r"no field 'body'; its fields are: text, n"):
        read(tmp_path / "a.parquet", text_field="body")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"b\.parquet is not a readable parquet file"):
        read(tmp_path / "b.parquet")


def damaged_parquet(path: Path) -> Path:
    """Five groups of a thousand rows, the first page of the third overwritten."""
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": make_texts(5000)}), path, row_group_size=1000)
    column = parquet.ParquetFile(path).metadata.row_group(2).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 400] = bytes(400)
    path.write_bytes(data)
    return path


def test_a_damaged_page_of_a_parquet_file_is_named_with_its_row(tmp_path: Path) -> None:
    path = damaged_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet is damaged.* from row 1025 on: ") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_a_parquet_string_that_is_not_utf8_is_named_with_its_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    strings = pyarrow.array([b"fine", b"caf\xe9", b"fine"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": strings}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2 is not UTF-8: byte 0xe9 at offset 3"):
        read(tmp_path / "a.parquet")


def test_text_file_is_one_document_kept_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\r\ntwo\rthree\n\n\n café".encode())
    assert read(path) == ["one\r\n\r\ntwo\rthree\n\n\n café"]


def test_text_file_splits_at_end_tokens_and_long_stretches(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n<|end|>\ntwo <|end|>\n<|end|>\nthree")
    assert read(path) == ["one\n", "two <|end|>\n", "three"]
    book = "".join(f"Paragraph {i} {'é' * 90}\nand on.\n\n" for i in range(2000))
    path.write_bytes(book.encode())
    pieces = read(path)
    assert len(pieces) > 3
    assert "".join(pieces) == book
    assert all(p.endswith("\n\n") and len(p.encode()) < 70_000 for p in pieces)
    path.write_text("word \n" * 500_000)  # no blank line anywhere
    assert len(read(path)) == 23  # of 128 KiB and a rest


def test_folders_globs_and_lists_in_a_fixed_order_each_file_once(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d" / "b.jsonl", ["b"])
    write_jsonl(tmp_path / "d" / "a.jsonl", ["a"])
    write_jsonl(tmp_path / "d" / "e" / "c.jsonl", ["c"])
    (tmp_path / "d" / "notes.pdf").write_bytes(b"x")
    assert read(tmp_path / "d") == ["a", "b", "c"]
    assert read(f"{tmp_path}/d/*.jsonl") == ["a", "b"]
    assert read(f"{tmp_path}/d/**/*.jsonl") == ["a", "b", "c"]
    assert read([str(tmp_path / "d/e"), tmp_path / "d", f"{tmp_path}/d/[ab].jsonl"]) == [
        "c",
        "a",
        "b",
    ]


def test_what_is_found_where_the_shards_go_is_not_corpus(tmp_path: Path) -> None:
    out = tmp_path / "d" / "out"
    a = write_jsonl(tmp_path / "d" / "a.jsonl", ["a"])
    written = write_jsonl(out / "sub" / "b.jsonl", ["b"])
    (tmp_path / "link").symlink_to(out)

    def found(path: object, out: Path = out) -> list[str]:
        return [p.name for p in find_parts(str(path), out=out)]

    for path in (tmp_path / "d", f"{tmp_path}/d/**/*.jsonl", f"{tmp_path}/d/**"):
        assert found(path) == [str(a)]
        assert found(path, tmp_path / "link") == [str(a)]
        assert found(path, tmp_path / "d" / "ou") == [str(a), str(written)]
    for path in (written, out / "sub"):  # named itself
        assert found(path) == [str(written)]
    for path in (out, f"{out}/**/*.jsonl"):
        with pytest.raises(ConfigError, match=r" outside .*out, which is written to"):
            found(path)


def test_a_part_reads_again_from_its_start(tmp_path: Path) -> None:
    (part,) = find_parts(write_jsonl(tmp_path / "a.jsonl", ["a", "", "c"]))
    assert [t for t, _ in part.reader()] == [t for t, _ in part.reader()] == ["a", "", "c"]
    assert part.tell() == part.size
    assert read(tmp_path / "a.jsonl") == ["a", "c"]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


LONG = b'{"text": "x", "id": ' + b"9" * 5000 + b"}"
DEEP = b'{"text": "x", "tree": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def test_bad_files_are_named_with_the_place(tmp_path: Path) -> None:
    good = b'{"text": "good"}\n'
    cases = [
        (write(tmp_path / "a.txt", b"abc\n" * 10 + b"d\xffe"), "byte 0xff at offset 41"),
        (write(tmp_path / "b.jsonl", good + b'{"text": "\xe9"}\n'), "byte 0xe9 at offset 27"),
        (write(tmp_path / "c.jsonl.gz", gzip.compress(good + b"\x80")), r"offset 17 \(unpacked\)"),
        (write(tmp_path / "d.jsonl", good + b'{"text": "x"\n'), r"d\.jsonl:2 is not valid JSON"),
        (write(tmp_path / "e.jsonl", good + b'{"id": 1, "body": "x"}\n'), "fields are: id, body"),
        (write(tmp_path / "f.jsonl", b'{"text": 3}\n'), "is int, need a string"),
        (write(tmp_path / "g.jsonl", b'"text"\n'), "is a JSON str"),
        (write(tmp_path / "h.jsonl", b'{"text": "\\ud83d"}\n'), r"h\.jsonl:1.*surrogate"),
        (write(tmp_path / "i.jsonl.gz", gzip.compress(good * 9000)[:-200]), r"i\.jsonl\.gz is damaged"),
        (write(tmp_path / "j.jsonl.gz", good), r"j\.jsonl\.gz is damaged"),
        (write(tmp_path / "k.json", b'[{"text": "x"},\n oops]'), r"k\.json:2 is not valid JSON"),
        (write(tmp_path / "l.txt", b""), "is empty"),
        (write(tmp_path / "m.json", b'["x", "\\ud800"]'), r"m\.json, record 2 holds half of a surrogate"),
        (write(tmp_path / "n.jsonl", good + LONG), r"n\.jsonl:2 holds an integer of more than \d+ digits"),
        (write(tmp_path / "o.json", b"[" + good + b"," + LONG + b"]"), r"o\.json, record 2 holds an integer"),
        (write(tmp_path / "p.jsonl", good + DEEP), r"p\.jsonl:2 is nested too deeply"),
        (write(tmp_path / "q.json", b'["x",\n' + DEEP + b"]"), r"q\.json, record 2 is nested too deeply"),
        (write(tmp_path / "r.json", b'["x"\n "y"]'), r"r\.json:2 .*Expecting ',' delimiter, column 2"),
        (write(tmp_path / "s.json", b'["x",\n]'), r"s\.json:2 .*Expecting value, column 1"),
        (write(tmp_path / "t.json", b'["x"]\n["y"]'), r"t\.json:2 .*Extra data, column 1"),
    ]  # fmt: skip
    for path, message in cases:
        with pytest.raises(DataError, match=message) as error:
            read(path)
        assert path.name in str(error.value)
        assert "\n" not in str(error.value)


def test_missing_and_unknown_paths(tmp_path: Path) -> None:
    write(tmp_path / "a.pdf", b"x")
    (tmp_path / "empty").mkdir()
    for path, message in [
        (str(tmp_path / "nope"), "no file or folder"),
        (f"{tmp_path}/*.jsonl", "no file matches"),
        (str(tmp_path / "a.pdf"), "is not a kind of corpus file"),
        (str(tmp_path / "empty"), "holds no corpus file"),
        ([], "no corpus given"),
        ("hf:", "is not a data set"),
        ("hf:a,b,c,d", "is not a data set"),
    ]:
        with pytest.raises(ConfigError, match=message):
            find_parts(path)


def test_document_hash_is_that_of_the_text() -> None:
    assert document_hash("a") == document_hash("a") != document_hash("b")
    assert 0 <= document_hash("") < 1 << 64


def test_bundled_corpus_is_what_its_page_says() -> None:
    path = bundled_corpus()
    page = (path.parent / "CORPUS.md").read_text("utf-8")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        pieces = [json.loads(line) for line in file]
    texts = read(path)
    assert [p["text"] for p in pieces] == texts
    assert 3e6 < sum(len(t.encode()) for t in texts) < 5e6
    assert f"{len(pieces)} pieces" in page
    for title, author in {(p["title"], p["author"]) for p in pieces}:
        assert f"| {title} | {author} |" in page
    assert not any("Gutenberg" in t or "http" in t for t in texts)


@pytest.mark.parametrize("character", ["a", "é", "€", "𝄞"])
@pytest.mark.parametrize("spaces", [False, True])
def test_a_text_without_lines_comes_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, character: str, spaces: bool
) -> None:
    monkeypatch.setattr(formats, "_TXT_LIMIT", 64)
    text = (6 * character + " " * spaces) * 100
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = read(tmp_path / "a.txt")
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= 2 * 64 for piece in pieces)
    if spaces:
        assert all(piece.endswith(" ") for piece in pieces)


def test_linked_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus / "own", elsewhere):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(folder.name)
    (corpus / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(corpus)
    assert sorted(read(corpus)) == ["elsewhere", "own"]


def test_a_piece_of_a_long_line_is_no_end_of_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_TXT_LIMIT", 64)
    text = 58 * "a" + " <|end|>\nmore"  # the first 64 bytes end inside of the mark
    (tmp_path / "a.txt").write_text(text)
    assert "".join(read(tmp_path / "a.txt")) == text


def test_a_folder_with_two_names_has_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
    (tmp_path / "b/x.txt").write_text("text")
    (tmp_path / "a/link").symlink_to(tmp_path / "b")
    walk = os.walk

    def backwards(*args: Any, **options: Any) -> Iterator[Any]:
        for place, folders, files in walk(*args, **options):
            folders.sort(reverse=True)
            yield place, folders, files

    monkeypatch.setattr(os, "walk", backwards)
    assert [part.name for part in find_parts(tmp_path)] == [str(tmp_path / "a/link/x.txt")]
