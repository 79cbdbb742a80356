"""The demonstration where larger weights lie beside the shipped ones: those write, the shipped ones are trained."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

import ddlm
from ddlm import showcase
from ddlm.checkpoint import load_model, save_model
from ddlm.cli import main
from ddlm.commands import demo as command
from ddlm.config import load_config
from ddlm.data.tokenizer import Tokenizer
from ddlm.diffusion.process import NoiseProcess
from ddlm.evaluation.samples import read_samples
from ddlm.network.denoiser import DDLM
from ddlm.sampling.request import Progress
from demonstration import Done, Small, make_small

STEPS = 6  # of what is trained
OWN_STEPS, OWN_ROUNDS = 5, 2  # stored with the larger weights


def arguments(out: str, budget: float, *options: str) -> list[str]:
    short = ["--steps", str(STEPS), "--patience", "3", *options]
    return ["demo", "--out", out, "--budget", str(budget), *short]


def demonstrate(small: Small, place: Path, out: str, *options: str) -> Done:
    process = subprocess.run(
        small.program(arguments(out, 2, *options)),
        capture_output=True,
        text=True,
        cwd=place,
        env=os.environ | {"COLUMNS": "120"},
    )
    return Done(place / out, process.returncode, process.stdout, process.stderr)


def save_weights(folder: Path, tokenizer: Path, width: int, sample: dict[str, int | str]) -> None:
    """Untrained weights with settings of their own: what is tested is who writes, not how well."""
    sizes = {"layers": 1, "heads": 2, "width": width, "feed_forward": 64, "embedding_width": 16}
    sizes["vocab_size"] = Tokenizer.load(tokenizer).vocab_size
    options = {f"model.{name}": value for name, value in sizes.items()}
    config = load_config("tiny", options | {f"sample.{name}": v for name, v in sample.items()})
    torch.manual_seed(width)
    save_model(
        folder,
        DDLM(config.model, NoiseProcess(config.process.t_min, config.process.t_max)),
        config,
        tokenizer_from=tokenizer,
    )


@pytest.fixture(scope="module")
def shipped(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with both folders of weights."""
    place = tmp_path_factory.mktemp("shipped")
    tokenizer = root / "models" / "ddlm-tiny"
    own: dict[str, int | str] = {"steps": OWN_STEPS, "refine": OWN_ROUNDS, "solver": "sde"}
    save_weights(place / "models" / "ddlm-tiny", tokenizer, 32, {})
    save_weights(place / "models" / "ddlm-small", tokenizer, 64, own)
    return place


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def larger_first(small: Small, shipped: Path) -> Done:
    """No model named: the larger weights write, the tiny ones are trained."""
    return demonstrate(small, shipped, "run")


@pytest.mark.slow
def test_the_larger_weights_write_first_and_the_tiny_ones_are_trained(larger_first: Done) -> None:
    assert larger_first.status == 0, larger_first.err
    text = " ".join(larger_first.out.split())
    parts = (
        "1. text condenses out of noise, with the weights of models/ddlm-small",
        f"step 1 of {OWN_STEPS}, ",
        f"step {OWN_STEPS} of {OWN_STEPS}, {OWN_ROUNDS} rounds follow, each",
        f"round 1 of {OWN_ROUNDS}, ",
        f"the text after {OWN_STEPS} steps and {OWN_ROUNDS} rounds of refinement",
        "2. the same weights continue and fill in a text",
        f"prefix, {OWN_STEPS + OWN_ROUNDS} steps, completed",
        "The old man looked out over the sea",
        f"infilled, {OWN_STEPS + OWN_ROUNDS} steps, completed",
        "Then she began to laugh.",
        "3. the bundled books become token shards",
        "4. training models/ddlm-tiny further on the books for 2 seconds",
        "too large to train in minutes on a CPU",
        "5. text condenses out of noise, with the weights just trained",
        f"step 1 of {STEPS}, ",
        "6. samples",
        "7. measures",
    )
    at = 0
    for part in parts:
        assert part in text[at:], part
        at = text.index(part, at)
    assert "starting from the weights of models/ddlm-tiny" in larger_first.err


def test_what_the_larger_weights_wrote_is_kept(larger_first: Done) -> None:
    record = json.loads((larger_first.folder / "report.json").read_text(encoding="utf-8"))
    results = record["results"]
    assert results["model"] == "models/ddlm-tiny"
    assert results["writes_first"] == "models/ddlm-small"
    assert 0 < results["first_text_seconds"] < results["first_samples_seconds"]
    for kind in ("unconditional", "prefix", "infilled"):
        (sample,) = read_samples(larger_first.folder / "samples" / f"first-{kind}.jsonl")
        assert sample.steps == OWN_STEPS + OWN_ROUNDS
        assert sample.tokens is not None
        assert kind != "unconditional" or len(sample.tokens) == 64


def test_the_model_that_writes_first(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shipped)
    assert command._larger("models/ddlm-tiny") == "models/ddlm-small"
    assert command._larger(str(shipped / "models" / "ddlm-tiny")) == str(
        shipped / "models" / "ddlm-small"
    )
    assert command._larger(None) is None
    assert command._larger("models/ddlm-small") is None  # a run that was begun from it
    alone = tmp_path / "models" / "ddlm-tiny"
    shutil.copytree(shipped / "models" / "ddlm-tiny", alone)
    assert command._larger(str(alone)) is None  # not the shipped ones
    monkeypatch.chdir(tmp_path)
    assert command.shipped_weights() == "models/ddlm-tiny"
    assert command._larger("models/ddlm-tiny") is None  # nothing beside them


def test_shipped_weights_that_are_named_write_themselves(
    shipped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_prepare", interrupt)  # what comes after is the same for all
    monkeypatch.chdir(shipped)
    for named, writes in (
        (["--model", "models/ddlm-tiny"], "models/ddlm-tiny"),
        (["--model", "models/ddlm-small"], "models/ddlm-small"),
        (["--model", "none"], None),
        ([], "models/ddlm-small"),
    ):
        out = ["--out", f"named-{len(named)}-{writes}"]
        assert main(["demo", "--steps", str(STEPS), *out, *named]) == 130
        said = capsys.readouterr()
        title = "1. text condenses out of noise, with the weights of "
        assert (f"{title}{writes} " in said.out) == (writes is not None)
        # the model's own steps only where it is not trained
        assert (f"step 1 of {OWN_STEPS}, " in said.out) == (not named)
        assert ("2. the same weights" in said.out) == (not named)
        assert " ".join(named) in said.err
        assert ("--model" in said.err) == bool(named)


@pytest.mark.skipif(os.name != "posix", reason="needs the signals of POSIX")
def test_a_run_whose_larger_weights_wrote_goes_on(
    small: Small, larger_first: Done, shipped: Path
) -> None:
    step = load_model(larger_first.folder).step
    process = subprocess.Popen(
        small.program(arguments("run", 100)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=shipped, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("resuming"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    said = " ".join((out + err).split())
    assert f"go on with: ddlm demo --out run --budget 100 --steps {STEPS} --patience 3" in said
    assert "--model" not in said
    assert "with the weights of models/ddlm-small" in out
    assert "starting from the weights" not in err
    then = load_model(larger_first.folder).step
    assert step is not None
    assert then is not None
    assert then >= step


def test_damaged_larger_weights_are_one_line_and_leave_nothing(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.copytree(shipped / "models", tmp_path / "models")
    (tmp_path / "models" / "ddlm-small" / "config.yaml").write_text("model: {}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--out", "run"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "ddlm-small" in line
    assert not (tmp_path / "run").exists()


def test_what_is_watched_has_the_settings_of_the_model(shipped: Path) -> None:
    """The view itself, on a console that takes itself for a terminal."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=40, highlight=False)
    lm = ddlm.load(shipped / "models" / "ddlm-small")
    text = showcase.watch_defaults(lm, 0, console)
    assert len(text.tokens) == lm.length
    assert text.text == lm.generate("{64}", seed=0)[0].text  # its own settings, nothing else
    assert f"the text after {OWN_STEPS} steps and {OWN_ROUNDS} rounds" in screen.getvalue()


def test_a_view_counts_what_the_rounds_have_changed(shipped: Path) -> None:
    lm = ddlm.load(shipped / "models" / "ddlm-small")
    view = showcase.CondensingView(lm, Console(file=io.StringIO()))
    states: list[Progress] = []
    lm.generate("{64}", on_progress=lambda _, p: states.append(p))
    for progress in states:
        view.show(0, progress)
    (condensed,) = [p for p in states if p.step == OWN_STEPS]
    last = states[-1]
    assert last.step == OWN_STEPS + OWN_ROUNDS
    changed = int((last.tokens != condensed.tokens).sum())
    assert changed > 0
    assert f"round {OWN_ROUNDS} of {OWN_ROUNDS}, {changed} tokens differ" in view.frame(last).plain
    assert f"step 1 of {OWN_STEPS}, " in view.frame(states[0]).plain
    assert f"{OWN_ROUNDS} rounds follow, each draws a fourth" in view.frame(condensed).plain
    view.rounds = 0
    assert f"step {OWN_STEPS} of {OWN_STEPS}\n" in view.frame(condensed).plain
