"""The folder of an evaluation keeps what it holds of something else."""

from __future__ import annotations

import json

import pytest

from ddlm.cli import main
from ddlm.evaluation.results import check_results
from ddlm.evaluation.samples import Sample, write_samples
from ddlm.types import ConfigError
from evaluation.small import sentences


def test_results_of_another_sample_file_are_not_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("one", "two")):
        write_samples(f"{name}.jsonl", [Sample(t) for t in sentences(4, seed=number)])
    command = ["evaluate", "--judge", "none", "--no-sanity", "--out", "out", "--samples"]
    assert main([*command, "one.jsonl"]) == 0
    before = (tmp_path / "out/record.json").read_bytes()
    capsys.readouterr()
    assert main([*command, "two.jsonl"]) == 2
    assert capsys.readouterr().err == (
        "error: out/record.json is the record of one.jsonl and would be replaced by that of two.jsonl: name another "
        "folder with --out, or remove it\n"
    )
    assert (tmp_path / "out/record.json").read_bytes() == before
    assert main([*command, str(tmp_path / "one.jsonl")]) == 0  # the same file, measured again


@pytest.mark.parametrize("record", [{"kind": "glue", "config": {"task": "rte"}}, {"config": None}])
def test_a_record_of_another_command_is_not_replaced(tmp_path, record):
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="is the record of another command"):
        check_results(tmp_path, "models/ours")


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_what_is_no_record_is_not_in_the_way(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    check_results(tmp_path, "models/ours")
