"""A run small enough to be studied in a test: two checkpoints, prepared text, a judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddlm.analysis.page import BEGIN, END
from ddlm.training.loop import train
from evaluation.small import save_gpt2
from training.runs import shards_in, small_config

STEPS = 40


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the checkpoints of steps 10, 20 and 30."""
    folder = tmp_path_factory.mktemp("study")
    shards = shards_in(folder)
    config = small_config(steps=30, checkpoint_every=10, keep=5, eval_every=10)
    config.model.vocab_size = shards.vocab_size
    config.data.path = str(shards.folder)
    train(config, folder / "run", quiet=True)
    return folder / "run"


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="session")
def arguments(small_run: Path, judge: Path) -> list[str]:
    """Of a study that takes seconds."""
    return [
        "--model", str(small_run), "--judge", str(judge), "--sequences", "6", "--steps", str(STEPS),
        "--step_counts", "8", str(STEPS), "--patience", "2", "5", "--noise_scales", "0.5", "1.2",
        "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def studied(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study, made through the command line, which also filled the page ``../page.md``."""
    from ddlm.cli import main

    out = tmp_path_factory.mktemp("analysis") / "out"
    page = out.with_name("page.md")
    page.write_text(f"# Before\n\n{BEGIN}\nWhat stood here.\n{END}\n\nAfter.\n")
    assert main(["analyze", *arguments, "--out", str(out), "--page", str(page)]) == 0
    return out


def findings(folder: Path) -> list[dict]:
    return json.loads((folder / "findings.json").read_text("utf-8"))["results"]["findings"]
