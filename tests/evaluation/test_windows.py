"""Held-out windows: whole, within one document, and the same however much of the text is read."""

import json

import numpy as np
import pytest

from ddlm.data.sources import document_hash
from ddlm.data.tokenizer import Tokenizer
from ddlm.evaluation import windows as cutting
from ddlm.evaluation.windows import held_out
from ddlm.types import DataError
from evaluation.small import sentences


def test_windows_are_held_out_whole_and_within_one_document(shards):
    windows = held_out(shards.folder, shards.tokenizer, 16, 30)
    assert windows.tokens.shape == (30, 16)
    assert len(windows.more) == 30
    assert not (windows.tokens == shards.end_id).any()
    assert set(windows.hashes) <= set(shards.document_hashes("val").tolist())
    # The first windows come from different documents.
    documents = shards.documents("val")
    starts = {tuple(shards.document("val", i)[:16].tolist()) for i in range(documents)}
    first = [tuple(w) for w in windows.tokens[:documents].tolist()]
    assert set(first) == starts


def test_windows_of_raw_text_are_the_same_text(shards, tmp_path):
    texts = [shards.tokenizer.decode(shards.document("val", i).tolist()) for i in range(5)]
    file = tmp_path / "raw.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    windows = held_out(file, shards.tokenizer, 16, 5)
    np.testing.assert_array_equal(windows.tokens[0], shards.document("val", 0)[:16])
    assert set(windows.hashes) <= set(shards.document_hashes("val").tolist())


def cut_from_all(found, length, count):
    """Windows and hashes as they were cut when every document was read first."""
    found = [(h, ids) for h, ids in found if len(ids) >= length]
    turns = [
        (h, ids[t * length : (t + 1) * length])
        for t in range(max(len(ids) for _, ids in found) // length)
        for h, ids in found
        if len(ids) >= (t + 1) * length
    ][: 2 * count]
    return np.stack([w for _, w in turns]), sorted({h for h, _ in turns})


@pytest.mark.parametrize("count", [2, 9, 12, 13, 500])
def test_windows_are_the_same_however_much_of_the_text_is_read(
    shards, tmp_path, count, monkeypatch
):
    monkeypatch.setattr(cutting, "_AT_ONCE", 4)
    words = sentences(30, seed=8, words=40)
    texts = [" ".join(w.split()[: 3 + 7 * i % 38]) for i, w in enumerate(words)]
    file = tmp_path / "raw.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    raw = [(document_hash(t), np.asarray(shards.tokenizer.encode(t))) for t in texts]
    hashes = shards.document_hashes("val").tolist()
    kept = [(h, shards.document("val", i)) for i, h in enumerate(hashes)]
    for source, found in ((file, raw), (shards.folder, kept)):
        windows = held_out(source, shards.tokenizer, 16, count)
        tokens, used = cut_from_all(found, 16, count)
        np.testing.assert_array_equal(np.concatenate([windows.tokens, windows.more]), tokens)
        assert (len(windows.tokens), windows.hashes) == (min(count, len(tokens)), used)
        assert windows.tokens.dtype == np.int64


def test_text_beyond_the_windows_wanted_is_not_read(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "_AT_ONCE", 4)
    file = tmp_path / "raw.jsonl"
    lines = [json.dumps({"text": t}) for t in sentences(20, seed=8, words=40)]
    file.write_text("\n".join([*lines, "no JSON"]))
    assert len(held_out(file, shards.tokenizer, 16, 5).tokens) == 5
    with pytest.raises(DataError):
        held_out(file, shards.tokenizer, 16, 50)


def test_too_little_or_foreign_text_is_named(shards, tmp_path):
    file = tmp_path / "raw.jsonl"
    file.write_text(json.dumps({"text": "short"}))
    with pytest.raises(DataError, match="0 windows of 16 tokens: give more text"):
        held_out(file, shards.tokenizer, 16, 5)
    other = Tokenizer.train(["another text"], 280)
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        held_out(shards.folder, other, 16, 5)
