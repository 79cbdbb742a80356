"""A record tells where its numbers come from and is never half written."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddlm.config import Config
from ddlm.record import command_line, commit_of, machine_of, make_record, write_record


def test_a_record_says_where_its_numbers_come_from(tmp_path):
    config = Config()
    config.train.seed = 7
    record = make_record(
        "evaluate", config, {"nll": np.float32(2.5), "dist": torch.tensor([0.5, 0.25])}
    )
    write_record(tmp_path / "a" / "r.json", record)
    read = json.loads((tmp_path / "a" / "r.json").read_text())
    assert read == record
    assert read["results"] == {"nll": 2.5, "dist": [0.5, 0.25]}
    assert read["seed"] == 7
    assert read["config"]["process"]["t_max"] == 10.0
    assert read["versions"]["torch"] == torch.__version__
    assert read["hardware"]["cores"] >= 1
    assert read["date"].endswith("+00:00")
    assert read["command"]
    assert "commit" in read


def test_non_finite_numbers_are_named_not_hidden():
    @dataclass
    class Result:
        zipf: float

    record = make_record(
        "x", {"path": Path("a/b")}, {"rows": [Result(float("nan"))], "z": float("inf")}
    )
    assert record["results"] == {"rows": [{"zipf": None}], "z": None}
    assert record["non_finite"] == ["results.rows[0].zipf = nan", "results.z = inf"]
    assert record["config"] == {"path": "a/b"}
    json.dumps(record, allow_nan=False)


def test_a_failed_write_leaves_the_old_record(tmp_path):
    file = tmp_path / "r.json"
    write_record(file, make_record("x", {}, {"text": "old"}))
    with pytest.raises(UnicodeEncodeError):
        write_record(file, make_record("x", {}, {"text": "new \ud800"}))
    assert json.loads(file.read_text())["results"] == {"text": "old"}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_record_in_words():
    record = {"commit": "0123456789abcdef" + 24 * "0", "hardware": {"threads": 1, "cpu": "a CPU"}}
    assert commit_of(record) == "0123456789ab"
    assert commit_of({"commit": record["commit"] + "-dirty"}) == "0123456789ab, with changes"
    assert commit_of({"commit": None}) == commit_of({}) == "unknown"
    assert machine_of(record) == "1 thread of a CPU"
    record["hardware"] |= {"threads": 16, "gpus": []}
    assert machine_of(record) == "16 threads of a CPU"
    record["hardware"]["gpus"] = ["NVIDIA H200", "NVIDIA H200"]
    assert machine_of(record) == "NVIDIA H200, NVIDIA H200"


@pytest.mark.parametrize(
    ("module", "program", "command"),
    [
        ("ddlm.__main__", "/x/ddlm/__main__.py", "ddlm --model 'a b'"),
        (None, "/usr/bin/ddlm", "ddlm --model 'a b'"),
        (
            "ddlm.downstream.speed",
            "/x/ddlm/downstream/speed.py",
            "python -m ddlm.downstream.speed --model 'a b'",
        ),
    ],
)
def test_the_command_of_a_record_runs_again(module, program, command, monkeypatch):
    main = SimpleNamespace(__spec__=module and SimpleNamespace(name=module))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", [program, "--model", "a b"])
    assert command_line() == command
