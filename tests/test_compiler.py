"""A compiler that was killed, and one that fails."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from ddlm import cli
from ddlm.compiler import cache_folder, drop_unfinished_libraries


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    return tmp_path / "cache"


def library(path: Path, content: bytes, age: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_libraries_that_were_never_finished_are_removed(cache: Path) -> None:
    unfinished = library(cache / "q5" / "a.main.so", b"", age=3600)
    at_work = library(cache / "q5" / "b.main.so", b"", age=5)
    sound = library(cache / "a7" / "c.main.so", b"ELF", age=3600)
    source = library(cache / "a7" / "c.main.cpp", b"", age=3600)
    drop_unfinished_libraries()
    assert not unfinished.exists()
    assert at_work.exists()
    assert sound.exists()
    assert source.exists()


@pytest.mark.usefixtures("cache")
def test_no_cache_yet() -> None:
    drop_unfinished_libraries()


def test_a_failing_compiler_is_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def backend(*_: object) -> object:
        raise ImportError("a.main.so: file too short")

    def command() -> None:
        torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(1))

    monkeypatch.delenv("DDLM_DEBUG", raising=False)
    monkeypatch.setattr(cli, "load", lambda _: command)
    assert cli.main(["demo"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "torch.compile failed" in said
    assert "a.main.so: file too short" in said
    assert "--train.compile false" in said
    assert str(cache) in said
