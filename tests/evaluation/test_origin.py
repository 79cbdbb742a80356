"""Samples that are measured again say by which commit and on which machine they were drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddlm.evaluation import generators, origin
from ddlm.evaluation.generators import DiffusionGenerator, Settings
from ddlm.record import hardware

GPU = {
    "commit": "a" * 40,
    "versions": {"torch": "2.11"},
    "hardware": {"gpus": ["A GPU"], "threads": 1},
}


def test_what_is_written_beside_a_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "unconditional-0123-seed0.jsonl"
    origin.write_origin(file)
    found = origin.read_origin(file)
    assert found["hardware"] == hardware()
    assert found["versions"]["torch"] == torch.__version__
    assert origin.elsewhere([found]) == []
    assert [x.name for x in tmp_path.iterdir()] == ["unconditional-0123-seed0.jsonl.origin.json"]


@pytest.mark.parametrize("content", [None, "{", "3"])
def test_a_file_without_one_is_told(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    if content is not None:
        (tmp_path / "a.jsonl.origin.json").write_text(content)
    (line,) = origin.elsewhere([origin.read_origin(file)])
    assert "do not say by which commit" in line


def test_samples_of_another_commit_or_machine_are_told() -> None:
    here = json.loads(json.dumps(GPU)) | {"hardware": hardware()}
    both = origin.distinct([GPU, here, GPU])
    assert both == [GPU, here]
    first, second = origin.elsewhere(both)
    assert "drawn at commit aaaaaaaaaaaa on A GPU" in first
    assert "drawn at commit aaaaaaaaaaaa on" in second


def test_the_grid_is_the_papers_whatever_the_models_own_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Engine:
        def run(self, requests: Any) -> Any:
            list(requests)
            return []

    monkeypatch.setattr(generators, "make_request", lambda *_, **options: asked.append(options))
    writer: Any = DiffusionGenerator(lambda slots: Engine(), None, "x")  # type: ignore[arg-type, return-value]
    tokens, noised = torch.zeros(1, 4).long(), torch.ones(1, 4, dtype=torch.bool)
    for settings in (Settings(), Settings(grid_name="karras")):
        list(writer.write(tokens, noised, [0], settings))
    assert [x["grid_name"] for x in asked] == ["uniform", "karras"]


def test_the_names_of_files_that_are_there_stay() -> None:
    """They are made from these settings: files of the paper's grid are known by what they were known by before."""
    assert "grid_name" not in Settings().departures()
    assert Settings(grid_name="karras").departures()["grid_name"] == "karras"
