"""Data shared by the tests of the paper's items."""

import json

import pytest

from ddlm.data.prepare import prepare
from evaluation.small import sentences


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [json.dumps({"text": " ".join(sentences(6, seed=300 + i))}) for i in range(120)]
    (folder / "text.jsonl").write_text("\n".join(rows))
    prepare(
        str(folder / "text.jsonl"), folder / "shards", vocab_size=300, val_fraction=0.2, processes=1
    )
    return folder / "shards"
