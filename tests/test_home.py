"""``~`` is the home folder wherever a path is taken, also where no shell has put it there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddlm.checkpoint import best_checkpoint, find_model, latest_checkpoint
from ddlm.cli import main
from ddlm.config import find_config, read_config
from ddlm.data.prepare import prepare
from ddlm.data.shards import TokenShards
from ddlm.data.tokenizer import Tokenizer
from ddlm.types import ConfigError, local
from sampling.models import write_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    write_model(tmp_path)
    return tmp_path


def test_python_callers_may_write_it(home: Path) -> None:
    assert find_model("~/m") == home / "m"
    tokenizer = Tokenizer.load("~/tokenizer")
    (home / "text.txt").write_text("the river runs to the sea\n" * 50, encoding="utf-8")
    prepare(["~/text.txt"], "~/shards", tokenizer="~/tokenizer", val_fraction=0.0)
    assert (home / "shards" / "index.json").is_file()
    assert TokenShards("~/shards").tokenizer_hash == tokenizer.hash
    assert find_config("~/m") == home / "m" / "config.yaml"
    assert read_config("~/m/config.yaml") == read_config(home / "m" / "config.yaml")
    assert not Path("~").exists()


def test_a_run_folder_may_be_given_as_text(home: Path) -> None:
    """Not as if it held nothing: text that is no path was once taken for a run without a best checkpoint."""
    folder = home / "run" / "checkpoints"
    for step in (4, 12):
        (folder / f"step-{step}").mkdir(parents=True)
    (folder / "best.json").write_text('{"step": 4}', encoding="utf-8")
    for run in ("~/run", str(home / "run"), home / "run"):
        assert best_checkpoint(run) == folder / "step-4"
        assert latest_checkpoint(run) == folder / "step-12"


def test_so_may_the_command_line(home: Path) -> None:
    (home / "prompts.txt").write_text("the {4}\n", encoding="utf-8")
    common = ["--model=~/m", "--steps=2", "--prompts=~/prompts.txt", "--out=~/texts.jsonl"]
    assert main(["generate", *common]) == 0
    assert (home / "texts.jsonl").is_file()
    assert not Path("~").exists()


def test_what_is_missing_is_told_in_one_line(home: Path) -> None:
    with pytest.raises(ConfigError, match="~/none does not exist"):
        find_model("~/none")
    assert local("~nobody-here/x") == Path("~nobody-here/x")
