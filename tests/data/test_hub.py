"""Data sets in the hub's layout: streamed, resumed, spread over machines."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddlm.data.prepare import prepare
from ddlm.data.shards import SPLITS, TokenShards
from ddlm.data.tokenizer import Tokenizer
from ddlm.types import ConfigError, DataError

from .conftest import SCRIPT


def texts_of(folder: Path) -> dict[str, list[str]]:
    data = TokenShards(folder)
    decode = data.tokenizer.decode
    return {s: [decode(data.document(s, i)) for i in range(data.documents(s))] for s in SPLITS}


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def c4_folder(shared_data: Path, folder: Path) -> list[str]:
    """A folder in the layout of allenai/c4 on the hub: json.gz shards and the configurations in README.md."""
    source = shared_data / "pretrain" / "c4_en_train-000.jsonl.gz"
    if not source.is_file():
        pytest.skip("real data is absent: c4_en_train is not in ../shared/data/pretrain")
    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = [next(file) for _ in range(90)]
    (folder / "en").mkdir(parents=True)
    for i in range(3):
        name = f"c4-train.{i:05d}-of-00003.json.gz"
        with gzip.open(folder / "en" / name, "wt", encoding="utf-8") as file:
            file.writelines(lines[i * 30 : (i + 1) * 30])
    with gzip.open(folder / "en" / "c4-validation.00000-of-00001.json.gz", "wt") as file:
        file.writelines(lines[:5])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n"
        "  - split: train\n    path: en/c4-train.*.json.gz\n"
        "  - split: validation\n    path: en/c4-validation.*.json.gz\n---\n"
    )
    return [json.loads(line)["text"] for line in lines]


def test_hub_data_set_streams_resumes_and_spreads(
    shared_data: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("datasets", reason="the extra `data` is not installed")
    texts = c4_folder(shared_data, tmp_path / "c4")
    source = f"hf:{tmp_path / 'c4'},en"
    prepare(source, tmp_path / "one", tokenizer=tokenizer, val_fraction=0.1)
    found = texts_of(tmp_path / "one")
    assert sorted(found["train"] + found["val"]) == sorted(texts)
    for rank in (0, 1):
        prepare(
            source, tmp_path / "two", tokenizer=tokenizer, val_fraction=0.1, rank=rank, world_size=2
        )
    assert texts_of(tmp_path / "two") == found
    script = SCRIPT.replace("calls == at", "calls == 25")
    killed = tmp_path / "killed"
    first = subprocess.run(
        [sys.executable, "-c", script, source, str(killed), "0"], capture_output=True
    )
    assert first.returncode == -9
    report = prepare(source, killed, vocab_size=300, val_fraction=0.1, shard_tokens=3000)
    assert report.resumed
    again = texts_of(killed)
    assert again["train"] + again["val"] == found["train"] + found["val"]
    prepare(f"{source},validation", tmp_path / "val", tokenizer=tokenizer, val_fraction=0)
    assert texts_of(tmp_path / "val")["train"] == texts[:5]
    for bad, message in [
        (f"hf:{tmp_path / 'c4'},fr", "cannot open data set"),
        (f"{source},test", "cannot open data set"),
    ]:
        with pytest.raises(ConfigError, match=message):
            prepare(bad, tmp_path / "bad", tokenizer=tokenizer)
    with pytest.raises(DataError, match="its fields are: text, url, timestamp"):
        prepare(source, tmp_path / "bad", tokenizer=tokenizer, text_field="content")


def test_a_connection_that_is_lost_is_one_line(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")

    def records() -> Iterator[dict[str, str]]:
        yield {"text": "one document"}
        raise ConnectionError("Server\nDisconnected")

    stream = datasets.IterableDataset.from_generator(records)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: stream)
    with pytest.raises(DataError, match=r"broke off \(Server Disconnected\): what was saved stays"):
        prepare("hf:somebody/texts", tmp_path / "out", tokenizer=tokenizer, processes=1)
