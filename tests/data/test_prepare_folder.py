"""Where shards go: never over somebody's files, also within the corpus' folder; which corpus counts as the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddlm.arguments import Arguments
from ddlm.cli import main
from ddlm.commands.prepare import prepare as command
from ddlm.data.prepare import prepare, reading
from ddlm.data.prepare.encode import _Worker
from ddlm.data.prepare.folder import check_place
from ddlm.data.prepare.writer import ShardWriter
from ddlm.data.shards import INDEX, STATE, TokenShards, id_dtype, index_sha256, write_json
from ddlm.data.tokenizer import Tokenizer
from ddlm.types import ConfigError

from .conftest import SCRIPT, make_texts, write_jsonl


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for i in range(3):
        write_jsonl(tmp_path / "corpus" / f"{i}.jsonl", make_texts(60, seed=i))
    return tmp_path / "corpus"


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def killed(corpus: Path, out: Path, at: int) -> None:
    """A preparation that dies at its ``at``-th write to the disk."""
    command = [sys.executable, "-c", SCRIPT, str(corpus), str(out), str(at)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr


@pytest.mark.parametrize(
    "names",
    [
        ("tokenizer.json",),
        ("train-2024.bin", "tokenizer.json"),
        ("train-00000-of-00002.bin",),
        ("train-00001.bin",),
        ("notes/a.md", "b", "c", "d"),
        ("piece-1-of-2/a",),
        ("prepare.json.part", "tokenizer.json"),
        (f"{INDEX}.part",),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_folder_with_other_files_is_refused_and_left_as_it_is(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, names: tuple[str, ...], world_size: int
) -> None:
    out = tmp_path / "mine"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    before = snapshot(out)
    with pytest.raises(ConfigError, match="holds something else than prepared data") as error:
        prepare(corpus, out, tokenizer=tokenizer, world_size=world_size)
    assert "\n" not in str(error.value)
    assert str(out) in str(error.value)
    assert snapshot(out) == before


@pytest.mark.parametrize("data", [b"mine", b"[1]", b'{"request": "GET"}', b"\xff"])
def test_somebody_elses_state_is_refused(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, data: bytes
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / STATE).write_bytes(data)
    (out / "tokenizer.json").write_text("mine")
    before = snapshot(out)
    with pytest.raises(ConfigError, match=r"prepare\.json is not the state of"):
        prepare(corpus, out, tokenizer=tokenizer)
    assert snapshot(out) == before


def test_an_empty_folder_and_one_with_hidden_files_are_taken(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_text("x")
    assert prepare(corpus, tmp_path / "out", tokenizer=tokenizer).complete
    assert prepare(corpus, tmp_path / "out", tokenizer=tokenizer).reused


def test_an_unfinished_preparation_is_not_merged_over(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    killed(corpus, tmp_path / "out", 20)
    before = snapshot(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"another .*\(1 there, 2 now\)|another tokenizer"):
        prepare(corpus, tmp_path / "out", tokenizer=tokenizer, world_size=2)
    assert snapshot(tmp_path / "out") == before


def test_a_writer_deletes_shards_of_its_split_only(tmp_path: Path) -> None:
    others = ["train-2024.bin", "train-00000-of-00002.bin", "train-000002.bin", "train-00002.bin.bak"]  # fmt: skip
    for name in (*others, "train-00001.bin", "train-00002.bin", "val-00002.bin"):
        (tmp_path / name).write_text("x")
    ShardWriter(tmp_path, "train", id_dtype(300), 1000).close()
    left = {f.name for f in tmp_path.iterdir()}
    assert {*others, "val-00002.bin"} <= left
    assert "train-00002.bin" not in left


@pytest.mark.parametrize("at", range(1, 9))
def test_killed_before_its_first_document_goes_on(corpus: Path, tmp_path: Path, at: int) -> None:
    """The marker, the tokenizer and the first state are each written in two steps."""
    out = tmp_path / "out"
    killed(corpus, out, at)
    check_place(out)
    options = {"vocab_size": 300, "val_fraction": 0.1, "shard_tokens": 3000}
    prepare(corpus, out, **options)  # type: ignore[arg-type]
    prepare(corpus, tmp_path / "whole", **options)  # type: ignore[arg-type]
    assert snapshot(out) == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("at", [1, 4, 20])
def test_shards_within_the_folder_of_the_corpus(corpus: Path, tmp_path: Path, at: int) -> None:
    out = corpus / "out"
    options = {"vocab_size": 300, "val_fraction": 0.1, "shard_tokens": 3000}
    killed(corpus, out, at)
    assert not prepare(corpus, out, **options).reused  # type: ignore[arg-type]
    assert prepare(corpus, out, **options).reused  # type: ignore[arg-type]
    assert prepare(f"{corpus}/**/*.json*", out, **options).reused  # type: ignore[arg-type]
    prepare(f"{corpus}/*.jsonl", tmp_path / "outside", **options)  # type: ignore[arg-type]
    assert TokenShards(out).hash == TokenShards(tmp_path / "outside").hash


def test_pieces_within_the_folder_of_the_corpus(corpus: Path, tokenizer: Tokenizer) -> None:
    for rank in (1, 0):
        report = prepare(corpus, corpus / "out", tokenizer=tokenizer, rank=rank, world_size=2)
    assert report.complete
    assert report.documents == 180


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Change a file, keeping its size and times."""
    assert len(old) == len(new)
    data, times = path.read_bytes(), path.stat()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_file_changed_at_the_same_size_is_another_corpus(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prepare(corpus, tmp_path / "out", tokenizer=tokenizer)
    copy = tmp_path / "moved"
    for name, data in snapshot(corpus).items():
        copy.mkdir(exist_ok=True)
        (copy / name).write_bytes(data)
    assert prepare(copy, tmp_path / "out", tokenizer=tokenizer).reused
    edit(corpus / "1.jsonl", b"1-30 ", b"1-3O ")
    with pytest.raises(ConfigError, match="another corpus or one that has changed"):
        prepare(corpus, tmp_path / "out", tokenizer=tokenizer)


def test_an_interrupted_preparation_does_not_go_on_with_a_changed_file(
    corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed(corpus, out, 20)
    edit(corpus / "0.jsonl", b"0-0 ", b"O-0 ")
    with pytest.raises(ConfigError, match="another corpus or one that has changed"):
        prepare(corpus, out, vocab_size=300, val_fraction=0.1, shard_tokens=3000)


def test_of_a_large_corpus_the_ends_of_each_file_are_compared(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "HASHED_BYTES", 3 * 4096)
    assert all(f.stat().st_size > 2 * 4096 for f in corpus.iterdir())
    out = tmp_path / "out"
    prepare(corpus, out, tokenizer=tokenizer)
    edit(corpus / "2.jsonl", b"2-30 ", b"2-3O ")  # what is said not to be seen
    assert prepare(corpus, out, tokenizer=tokenizer).reused
    for old, new in ((b"2-0 ", b"2-O "), (b"2-59 ", b"2-5S ")):
        edit(corpus / "2.jsonl", old, new)
        with pytest.raises(ConfigError, match="one that has changed"):
            prepare(corpus, out, tokenizer=tokenizer)
        edit(corpus / "2.jsonl", new, old)
    assert prepare(corpus, out, tokenizer=tokenizer).reused


def test_preparations_begun_before_contents_were_compared_go_on(
    corpus: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", {"vocab_size": 300, "val_fraction": 0.1, "shard_tokens": 3000}
    killed(corpus, out, 20)
    state = json.loads((out / STATE).read_text())
    del state["request"]["content"]
    write_json(out / STATE, state)
    assert prepare(corpus, out, **options).resumed  # type: ignore[arg-type]
    index = json.loads((out / INDEX).read_text())
    assert "content" not in index["request"]
    assert index["sha256"] == index_sha256(index)
    assert prepare(corpus, out, **options).reused  # type: ignore[arg-type]
    prepare(corpus, tmp_path / "whole", **options)  # type: ignore[arg-type]
    assert TokenShards(out).hash == TokenShards(tmp_path / "whole").hash


def test_the_limit_is_each_ranks_and_the_help_says_so(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for rank in (0, 1):
        report = prepare(
            corpus, tmp_path / "out", tokenizer=tokenizer, limit=10, rank=rank, world_size=2
        )
    assert report.complete
    assert report.documents == 20
    said = " ".join(Arguments("ddlm prepare", command).help(["--help"]).split())
    assert "Documents to take at most, for each rank" in said


def test_a_file_in_place_of_the_folder_is_named_as_one(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "shards"
    file.write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for out, message in [
        (file, "shards is a file, shards need a folder"),
        (file / "deep" / "er", "shards is a file, shards need a folder"),
        (tmp_path / "gone", "gone is a link to nothing"),
    ]:
        with pytest.raises(ConfigError, match=message):
            prepare(corpus, out, tokenizer=tokenizer)
    assert file.read_text() == "mine"


def test_a_tokenising_process_that_is_killed_is_one_line(tokenizer: Tokenizer) -> None:
    """As the system does when memory runs out."""
    worker = _Worker(tokenizer)
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(ConfigError, match="killed by signal 9: run again to go on, with fewer"):
        worker.encode(["the river " * 10_000])
    worker.close()  # what it was not sent any more is no second error


def test_the_corpus_may_be_named_as_a_source(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    files = [str(corpus / f"{i}.jsonl") for i in (0, 1)]
    common = ["--tokenizer", str(tmp_path / "tokenizer")]
    for name, named in (("files", files), ("source", ["--source", *files])):
        assert main(["prepare", *named, "--out", str(tmp_path / name), *common]) == 0
        assert main(["prepare", "--out", str(tmp_path / f"{name}2"), *named, *common]) == 0
    assert (
        len({TokenShards(tmp_path / n).hash for n in ("files", "files2", "source", "source2")}) == 1
    )


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (("a.txt", "b.txt", "--source", "hf:c"), "'a.txt' was given as one of FILES and 'hf:c' with --source"),
        ((), "no corpus was given: name FILES (or --source)"),
        (("--source",), "--source needs a value"),
    ],
)  # fmt: skip
def test_the_corpus_is_named_in_one_way(
    named: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "--out", str(tmp_path / "out"), *named]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files", [1, 4])  # every n-th document, or files of its own, for a rank
def test_ranks_hold_out_of_what_they_take_together(tmp_path: Path, files: int) -> None:
    texts = make_texts(40)
    for i in range(files):
        write_jsonl(tmp_path / "corpus" / f"{i}.jsonl", texts[i::files])
    for rank in range(4):
        options = {"limit": 1, "rank": rank, "world_size": 4, "processes": 1}
        report = prepare(tmp_path / "corpus", tmp_path / "out", vocab_size=300, **options)  # type: ignore[arg-type]
    assert (report.documents, report.val_documents) == (4, 1)
    assert report.vocab_size == 300  # trained on the three that are not held out
