from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ddlm.data.prepare import Progress, prepare, run
from ddlm.data.prepare.reading import BATCH_DOCUMENTS
from ddlm.data.shards import INDEX, SPLITS, STATE, TokenShards
from ddlm.data.sources import document_hash
from ddlm.data.tokenizer import Tokenizer
from ddlm.types import ConfigError, DataError

from .conftest import SCRIPT, make_texts, write_jsonl


def texts_of(folder: Path) -> dict[str, list[str]]:
    data = TokenShards(folder)
    decode = data.tokenizer.decode
    return {s: [decode(data.document(s, i)) for i in range(data.documents(s))] for s in SPLITS}


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(5):
        write_jsonl(folder / f"{i}.jsonl", make_texts(80, seed=i))
    return folder


@pytest.fixture(scope="module")
def prepared(corpus: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(corpus, out, tokenizer=tokenizer, val_fraction=0.1, shard_tokens=3000)
    return out


ALL_TEXTS = [t for i in range(5) for t in make_texts(80, seed=i)]


def test_documents_come_back_byte_for_byte_in_order(prepared: Path) -> None:
    texts = texts_of(prepared)
    held_out = set(texts["val"])
    assert texts["train"] == [t for t in ALL_TEXTS if t not in held_out]
    assert texts["val"] == [t for t in ALL_TEXTS if t in held_out]
    assert 20 <= len(held_out) <= 60
    data = TokenShards(prepared)
    for split in SPLITS:
        assert data.document_hashes(split).tolist() == [document_hash(t) for t in texts[split]]
        stream = data.read(split, 0, data.tokens(split))
        assert (stream == data.end_id).sum() == data.documents(split)
        assert (
            data.document_ends(split).tolist()
            == (np.flatnonzero(stream == data.end_id) + 1).tolist()
        )
    shards = data.index["splits"]["train"]["shards"]
    assert len(shards) > 2
    assert all(s["bytes"] >= 2 * 3000 for s in shards[:-1])
    data.verify()


def test_report_and_progress(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Progress] = []
    clock = iter(float(i) for i in range(100_000))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    report = prepare(
        corpus, tmp_path / "out", vocab_size=300, val_fraction=0.1, progress=seen.append
    )
    assert report.complete
    assert not report.reused
    assert report.documents == len(ALL_TEXTS)
    assert report.nbytes == sum(len(t.encode()) for t in ALL_TEXTS)
    assert report.vocab_size == 300
    assert report.documents_per_second > 0 < report.tokens_per_second
    assert seen[0].stage == "tokenizer"
    last = seen[-1]
    assert (last.documents, last.tokens, last.fraction) == (report.documents, report.tokens, 1.0)
    again = prepare(corpus, tmp_path / "out", vocab_size=300, val_fraction=0.1)
    assert again.reused
    assert (again.documents, again.tokens) == (report.documents, report.tokens)


def test_processes_do_not_change_the_result(
    corpus: Path,
    prepared: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "SMALL", 0)  # workers even for this corpus
    prepare(
        corpus,
        tmp_path / "o",
        tokenizer=tokenizer,
        val_fraction=0.1,
        shard_tokens=3000,
        processes=2,
    )
    assert content(tmp_path / "o") == content(prepared)


def test_split_depends_on_the_text_alone(
    corpus: Path, prepared: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shuffled = [*ALL_TEXTS, *ALL_TEXTS[:100]]  # with duplicates
    random.Random(0).shuffle(shuffled)
    path = write_jsonl(tmp_path / "s.jsonl", shuffled)
    prepare(path, tmp_path / "out", tokenizer=tokenizer, val_fraction=0.1)
    there, before = texts_of(tmp_path / "out"), texts_of(prepared)
    assert set(there["val"]) == set(before["val"])
    assert set(there["train"]) == set(before["train"])
    assert not set(there["val"]) & set(there["train"])


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_both_sides_get_a_document(tokenizer: Tokenizer, tmp_path: Path, fraction: float) -> None:
    texts = ["one", "two", "three", "two"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare(path, tmp_path / "out", tokenizer=tokenizer, val_fraction=fraction)
    found = texts_of(tmp_path / "out")
    small = found["val"] if fraction < 0.5 else found["train"]
    assert len(set(small)) == 1
    assert sorted(found["train"] + found["val"]) == sorted(texts)


def test_nothing_held_out_on_request_or_from_one_document(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "one"])
    prepare(path, tmp_path / "out", tokenizer=tokenizer)
    assert texts_of(tmp_path / "out") == {"train": ["one", "one"], "val": []}
    path = write_jsonl(tmp_path / "b.jsonl", make_texts(50))
    prepare(path, tmp_path / "none", tokenizer=tokenizer, val_fraction=0)
    assert TokenShards(tmp_path / "none").documents("val") == 0


def test_limit_and_large_vocabulary(tmp_path: Path, shared_data: Path) -> None:
    llama = Tokenizer.load(shared_data / "tokenizers" / "llama2")
    gpt2 = shared_data / "tokenizers" / "gpt2"
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    for name, tokenizer in (("llama", llama), ("gpt2", gpt2)):
        prepare(path, tmp_path / name, tokenizer=tokenizer, limit=20, val_fraction=0.2)
        found = texts_of(tmp_path / name)
        assert sorted(found["train"] + found["val"]) == sorted(make_texts(50)[:20])


def test_preparing_does_not_wait_for_torch(tmp_path: Path) -> None:
    """Neither the command nor the processes that encode for it."""
    write_jsonl(tmp_path / "a.jsonl", make_texts(40))
    code = (
        "import sys; from ddlm.cli import main; from ddlm.data.prepare import encode;"
        "status = main(['prepare', 'a.jsonl', '--out', 'out', '--vocab-size', '300']);"
        "print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 False"


def test_empty_documents_at_the_end_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for full in (1, BATCH_DOCUMENTS):
        file = write_jsonl(tmp_path / f"{full}.jsonl", [*make_texts(full), "", ""])
        report = prepare(file, tmp_path / f"{full}", tokenizer=tokenizer, processes=1)
        assert report.documents == full
        assert TokenShards(tmp_path / f"{full}").index["empty_documents"] == 2


def test_killed_at_any_moment_resumes_to_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "whole", vocab_size=300, val_fraction=0.1, shard_tokens=3000)
    rng = random.Random(0)
    out, kills = tmp_path / "killed", 0
    # The first runs die during the tokenizer and the first state, later ones between commits and shards.
    for at in [1, 3, 5, *(rng.randint(6, 40) for _ in range(6)), 10**9]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(corpus), str(out), str(at)],
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        kills += 1
        assert not (out / INDEX).exists()
        with pytest.raises(DataError):
            TokenShards(out)
    assert kills >= 5
    assert content(out) == content(tmp_path / "whole")


def test_interrupted_state_of_another_request_is_refused(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    script = SCRIPT.replace("calls == at", "calls == 12")
    subprocess.run([sys.executable, "-c", script, str(corpus), str(out), "0"], capture_output=True)
    assert (out / STATE).exists()
    with pytest.raises(DataError, match="run the same `ddlm prepare` again"):
        TokenShards(out)
    with pytest.raises(ConfigError, match=r"another tokenizer \(bpe-300 there"):
        prepare(corpus, out, tokenizer=tokenizer, val_fraction=0.1, shard_tokens=3000)
    report = prepare(corpus, out, vocab_size=300, val_fraction=0.1, shard_tokens=3000)
    assert report.resumed


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_pieces_of_machines_merge_to_one_run(
    corpus: Path, prepared: Path, tokenizer: Tokenizer, tmp_path: Path, world_size: int
) -> None:
    out = tmp_path / "out"
    options = {"tokenizer": tokenizer, "val_fraction": 0.1, "shard_tokens": 3000}
    ranks = list(range(world_size))
    random.Random(1).shuffle(ranks)
    for rank in ranks:
        report = prepare(corpus, out, rank=rank, world_size=world_size, **options)  # type: ignore[arg-type]
        assert report.complete is (rank == ranks[-1])
        if not report.complete:
            with pytest.raises(DataError, match="pieces of several machines"):
                TokenShards(out)
    merged, single = TokenShards(out), TokenShards(prepared)
    merged.verify()
    for split in SPLITS:
        assert sorted(merged.document_hashes(split)) == sorted(single.document_hashes(split))
        assert merged.tokens(split) == single.tokens(split)
    if world_size <= 5:  # whole files to each: even the order is the same
        assert texts_of(out) == texts_of(prepared)
    else:
        assert {k: sorted(v) for k, v in texts_of(out).items()} == {
            k: sorted(v) for k, v in texts_of(prepared).items()
        }
    assert not list(out.glob("piece-*"))
    assert prepare(corpus, out, rank=0, world_size=world_size, **options).reused  # type: ignore[arg-type]


def test_machines_train_the_same_tokenizer(corpus: Path, tmp_path: Path) -> None:
    for rank in (1, 0):
        prepare(corpus, tmp_path / "out", rank=rank, world_size=2, vocab_size=300)
    prepare(corpus, tmp_path / "one", vocab_size=300)
    merged, single = TokenShards(tmp_path / "out"), TokenShards(tmp_path / "one")
    assert merged.tokenizer_hash == single.tokenizer_hash
    assert texts_of(tmp_path / "out") == texts_of(tmp_path / "one")


def test_the_tokenizer_reads_as_much_of_many_short_files_as_of_one(tmp_path: Path) -> None:
    texts = make_texts(60, seed=3)
    (tmp_path / "many").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "many" / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    write_jsonl(tmp_path / "one.jsonl", texts)
    many = prepare(tmp_path / "many", tmp_path / "a", vocab_size=600)
    one = prepare(tmp_path / "one.jsonl", tmp_path / "b", vocab_size=600)
    assert many.documents == one.documents == 60
    assert TokenShards(tmp_path / "a").tokenizer_hash == TokenShards(tmp_path / "b").tokenizer_hash
    assert many.tokens == one.tokens


def copy(prepared: Path, to: Path) -> Path:
    to.mkdir()
    for name, data in content(prepared).items():
        (to / name).write_bytes(data)
    return to


def test_damage_is_found(prepared: Path, tmp_path: Path) -> None:
    names = [n for n in content(prepared) if n.endswith(".bin")]
    assert len(names) > 6
    for i, name in enumerate(names):
        folder = copy(prepared, tmp_path / f"flip{i}")
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 4
        (folder / name).write_bytes(data)
        shards = TokenShards(folder)  # the size is right
        with pytest.raises(DataError, match=f"{name} is damaged"):
            shards.verify()
        (folder / name).write_bytes(data[:-2])
        with pytest.raises(DataError, match="truncated"):
            TokenShards(folder)
        (folder / name).unlink()
        with pytest.raises(DataError, match="missing"):
            TokenShards(folder)


def test_damaged_index_and_tokenizer_are_found(
    prepared: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = copy(prepared, tmp_path / "a")
    index = json.loads((folder / INDEX).read_text())
    for text, message in [
        (json.dumps(index | {"end_id": 5}), "does not have its own hash"),
        (json.dumps(index | {"version": 9}), "has version 9"),
        (json.dumps({"a": 1}), "does not describe token shards"),
        (json.dumps(index)[:-9], "not valid JSON"),
    ]:
        (folder / INDEX).write_text(text)
        with pytest.raises(DataError, match=message):
            TokenShards(folder)
    (folder / INDEX).write_text(json.dumps(index))
    Tokenizer.train(make_texts(50, seed=9), 300).save(folder)
    with pytest.raises(DataError, match="not the one its shards were made with"):
        TokenShards(folder).verify()
    with pytest.raises(DataError, match="holds no prepared data"):
        TokenShards(tmp_path)


def test_bad_input_leaves_nothing_behind(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    empty = write_jsonl(tmp_path / "empty.jsonl", ["", ""])
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"caf\xe9")
    fine = write_jsonl(tmp_path / "fine.jsonl", ["one"])
    for sources, options, message in [
        (empty, {}, "is empty: it has no document with text"),
        (empty, {"val_fraction": 0.0}, "is empty"),
        (bad, {}, "byte 0xe9 at offset 3"),
        (tmp_path / "none.jsonl", {}, "no file or folder"),
        (fine, {"text_field": "body"}, "no field 'body'"),
        (fine, {"vocab_size": 10}, "at least 257"),
        (fine, {"val_fraction": 1.0}, "val_fraction 1.0"),
        (fine, {"processes": 0}, "processes 0"),
        (fine, {"limit": 0}, "limit 0"),
        (fine, {"rank": 2, "world_size": 2}, "rank 2"),
        (fine, {"tokenizer": tmp_path / "no.json"}, "no tokenizer at"),
    ]:
        with pytest.raises(ConfigError, match=message) as error:
            prepare(sources, out, **options)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
        assert not out.parent.exists(), message


def test_another_data_set_is_not_overwritten(
    prepared: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = write_jsonl(tmp_path / "a.jsonl", make_texts(5))
    before = content(prepared)
    with pytest.raises(ConfigError, match="another corpus"):
        prepare(other, prepared, tokenizer=tokenizer, val_fraction=0.1, shard_tokens=3000)
    assert content(prepared) == before


def test_two_writers_at_once_are_refused(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="no file locks on this system")
    out = tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(ConfigError, match="another preparation is writing"):
            prepare(corpus, out, tokenizer=tokenizer)
    finally:
        os.close(handle)
    assert prepare(corpus, out, tokenizer=tokenizer).complete


def test_shards_of_a_relative_folder_are_read_from_anywhere(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared.parent)
    data = TokenShards(prepared.name)
    monkeypatch.chdir(tmp_path)
    assert len(data.read("train", 0, 5)) == 5
    assert len(data.document_ends("train")) == data.documents("train")
    data.verify()


def test_numbers_of_numpy_are_numbers(
    corpus: Path, tmp_path: Path, tokenizer: Tokenizer, prepared: Path
) -> None:
    options = {"val_fraction": np.float64(0.1), "shard_tokens": np.int64(3000), "rank": np.int32(0)}
    prepare(corpus, tmp_path / "out", tokenizer=tokenizer, processes=1, **options)  # type: ignore[arg-type]
    assert TokenShards(tmp_path / "out").hash == TokenShards(prepared).hash
    with pytest.raises(ConfigError, match=r"limit is 1\.5, it must be a whole number"):
        prepare(corpus, tmp_path / "out", limit=1.5)  # type: ignore[arg-type]
