"""The README keeps its word: its commands run as written, and what it names is there."""

from __future__ import annotations

import json
import lzma
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ddlm.cli import main
from ddlm.data import bundled_corpus

# What makes a command cheap; the rest of it stays as it is written.
SHORTER = {
    "demo": "--budget 2 --steps 4",
    "train": "--train.steps 2 --train.batch 4 --train.compile false --train.eval_every 0",
    "generate": "--steps 4",
}


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    return [line for block in blocks(text, "sh") for line in block.splitlines() if line.strip()]


def shortened(line: str) -> str:
    name = shlex.split(line)[1]
    return f"{line} {SHORTER.get(name, '')}".strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts of one's own."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "texts").mkdir()
    with lzma.open(bundled_corpus(), "rt", encoding="utf-8") as file:
        for i, line in zip(range(60), file, strict=False):
            (folder / "texts" / f"{i}.txt").write_text(json.loads(line)["text"], encoding="utf-8")
    return folder


def test_it_begins_with_the_two_commands(readme: str, root: Path) -> None:
    assert commands(readme)[:2] == ["make demo", "make test"]
    for target in ("demo", "test"):
        dry = subprocess.run(
            ["make", "-n", target], cwd=root, capture_output=True, text=True, check=False
        )
        assert dry.returncode == 0, dry.stderr
    recipe = subprocess.run(
        ["make", "-n", "demo", "BUDGET=7"], cwd=root, capture_output=True, text=True, check=True
    )
    assert "ddlm demo --budget 7" in recipe.stdout


@pytest.fixture(scope="module")
def demonstrated(place: Path) -> Path:
    """Where ``ddlm demo`` has been, as `make demo` runs it; fewer rows are held out than the usual 64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("ddlm.training.data.HELD_OUT_BATCH", 4)
        assert main(shlex.split(shortened("ddlm demo"))[1:]) == 0
    return place


@pytest.mark.slow
def test_its_commands_run_as_written(readme: str, demonstrated: Path) -> None:
    place = demonstrated
    lines = [line for line in commands(readme) if line.startswith("ddlm ")]
    assert {shlex.split(line)[1] for line in lines} >= {"prepare", "train", "generate", "evaluate"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", shortened(line)],
            cwd=place,
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": path},
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    for code in blocks(readme, "python"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=place, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) >= 4


def test_every_file_it_names_is_there(readme: str, root: Path) -> None:
    linked = [
        target.partition("#")[0]
        for target in re.findall(r"\]\(([^)\s]+)\)", readme)
        if not re.match(r"https?://|#", target)
    ]
    assert len(linked) > 10
    assert [name for name in linked if not (root / name).exists()] == []
    labels = dict(re.findall(r"\[([\w/]+\.py)\]\((src/ddlm/[\w/]+\.py)\)", readme))
    assert labels
    for label, target in labels.items():  # the label is the end of the path it links to
        assert target == f"src/ddlm/{label}"


def test_every_option_it_shows_exists(readme: str) -> None:
    from ddlm import cli
    from ddlm.arguments import Arguments

    for line in commands(readme):
        program, name, *argv = shlex.split(line)
        if program == "ddlm":
            Arguments(f"ddlm {name}", cli.load(name)).parse(argv)


def test_the_bundled_books_are_as_many_as_it_says(readme: str) -> None:
    with lzma.open(bundled_corpus(), "rt", encoding="utf-8") as file:
        titles = {json.loads(line)["title"] for line in file}
    assert f"{len(titles)} bundled books" in readme


def test_the_size_of_the_tiny_model_is_as_it_says(readme: str) -> None:
    import torch

    from ddlm.config import load_config
    from ddlm.diffusion.process import NoiseProcess
    from ddlm.network.denoiser import DDLM

    config = load_config("tiny")
    with torch.device("meta"):
        model = DDLM(config.model, NoiseProcess(config.process.t_min, config.process.t_max))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert f"{millions:.1f}M-parameter `tiny`" in readme
