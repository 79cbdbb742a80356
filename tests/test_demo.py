"""The demonstration, whole but short: what it leaves behind, what a second run does, what Ctrl-C does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from ddlm import showcase
from ddlm.checkpoint import load_model
from ddlm.cli import main
from ddlm.commands import demo as command
from ddlm.commands import demo_folder
from ddlm.data.shards import TokenShards
from ddlm.data.tokenizer import Tokenizer
from ddlm.evaluation.samples import read_samples
from demonstration import Done, Small, make_small

STEPS = 6
ROUNDS = 2  # of refinement, of the given weights


def arguments(folder: Path, budget: float, model: str = "none") -> list[str]:
    short = ["--steps", str(STEPS), "--patience", "3", "--model", model]
    return ["demo", "--out", str(folder), "--budget", str(budget), *short]


def demonstrate(small: Small, folder: Path, *options: str) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with small.in_place(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments(folder, 2, *options))
    return Done(folder, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return make_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def done(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """From nothing."""
    return demonstrate(small, tmp_path_factory.mktemp("demo") / "run")


@pytest.fixture(scope="module")
def weights(done: Done) -> Path:
    """A model that was trained for seconds, exported as the shipped ones are, and with rounds of refinement."""
    folder = done.folder.parent / "models" / "ddlm-tiny"
    assert (
        main(["export", str(done.folder), "--out", str(folder), "--sample", f"refine={ROUNDS}"])
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def further(small: Small, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """From given weights."""
    return demonstrate(small, tmp_path_factory.mktemp("further") / "run", str(weights))


@pytest.mark.slow
def test_it_ends_well_and_says_what_it_does(done: Done) -> None:
    assert done.status == 0, done.err
    for part in (
        "1. the bundled books become token shards",
        "2. training the tiny model for 2 seconds",
        "3. text condenses out of noise",
        "4. samples",
        "held-out cross-entropy by noise level",
        "steps used, early exit by patience",
        "distinct-1",
        "entropy (nats)",
        "ddlm generate",
    ):
        assert part in done.out
    assert f"step 1 of {STEPS}" in done.out  # plain frames where there is no terminal


def test_it_leaves_a_whole_run_folder(done: Done) -> None:
    loaded = load_model(done.folder)
    assert loaded.step is not None
    assert loaded.step >= 1
    for name in ("config.yaml", "metrics.jsonl", "report.json", "samples/trajectories.json"):
        assert (done.folder / name).stat().st_size > 0
    for plot in ("loss", "switches", "entropy"):
        image = (done.folder / "plots" / f"{plot}.png").read_bytes()
        assert image.startswith(b"\x89PNG")
        assert image.rstrip().endswith(b"IEND\xaeB`\x82")
        assert "</svg>" in (done.folder / "plots" / f"{plot}.svg").read_text(encoding="utf-8")
    assert not [p for p in done.folder.rglob("*") if p.name.startswith(".") or p.suffix == ".part"]


def test_samples_keep_what_was_given(done: Done) -> None:
    counts = {
        "unconditional": showcase.UNCONDITIONAL,
        "prefix": showcase.PROMPTS * showcase.CONTINUATIONS,
        "infilled": showcase.PROMPTS * showcase.CONTINUATIONS,
    }
    given = {"unconditional": 0, "prefix": 32, "infilled": 32}
    for kind, count in counts.items():
        samples = read_samples(done.folder / "samples" / f"{kind}.jsonl")
        assert len(samples) == count
        for sample in samples:
            assert sample.is_noised is not None
            assert sample.steps is not None
            assert sample.is_noised.count(False) == given[kind]
            assert 1 <= sample.steps <= STEPS
            assert sample.reason in ("completed", "patience")
        first, second = samples[:2]
        if given[kind]:  # continuations of one prompt: equal where it was given
            pairs = zip(first.tokens or [], second.tokens or [], first.is_noised or [], strict=True)
            assert all(a == b for a, b, noised in pairs if not noised)


def test_the_report_holds_what_was_shown(done: Done) -> None:
    record = json.loads((done.folder / "report.json").read_text(encoding="utf-8"))
    results = record["results"]
    assert record["kind"] == "demo"
    assert set(results["steps_used"]) == {"unconditional", "prefix", "infilled"}
    assert f"{results['validation']['cross_entropy']:.2f}" in done.out
    assert f"{results['real']['token_entropy']:.2f}" in done.out
    assert 0 <= results["same_as_full_run"] <= 1
    assert results["unconditional"]["samples"] == showcase.UNCONDITIONAL


def test_trajectories_run_to_the_last_step(done: Done) -> None:
    text = (done.folder / "samples" / "trajectories.json").read_text(encoding="utf-8")
    for trajectory in json.loads(text):
        assert trajectory["generated"] == 64
        for name in ("times", "switches", "entropy"):
            assert len(trajectory[name]) == STEPS
        assert trajectory["switches"][0] == 0
        assert all(0 <= e < 8.4 for e in trajectory["entropy"])  # at most log 4096 = 8.32 nats


def test_a_second_run_does_not_train_again(small: Small, done: Done) -> None:
    step = load_model(done.folder).step
    again = demonstrate(small, done.folder)
    assert again.status == 0, again.err
    assert load_model(done.folder).step == step
    assert f"resuming {done.folder} at step {step}" in again.err


@pytest.mark.skipif(os.name != "posix", reason="needs the signals of POSIX")
def test_ctrl_c_leaves_130_and_the_command_that_goes_on(small: Small, done: Done) -> None:
    process = subprocess.Popen(
        small.program(arguments(done.folder, 100)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("resuming"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert f"go on with: ddlm demo --out {done.folder} --budget 100" in " ".join(
        (out + err).split()
    )
    assert "Traceback" not in err
    assert load_model(done.folder).step is not None


def test_frames_are_evenly_spaced() -> None:
    assert sorted(showcase.frames(100)) == [17, 33, 50, 67, 83]
    assert min(showcase.frames(2)) >= 1


@pytest.mark.slow
def test_given_weights_write_first_and_are_trained_further(further: Done, weights: Path) -> None:
    assert further.status == 0, further.err
    text = " ".join(further.out.split())
    parts = (
        f"1. text condenses out of noise, with the weights of {weights}",
        f"step 1 of {STEPS + ROUNDS}",
        "2. the bundled books become token shards",
        "3. the same weights continue and fill in held-out text",
        "prefix, ",
        "infilled, ",
        "4. training these weights further on the books for 2 seconds",
        "5. text condenses out of noise",
        "6. samples",
        "7. measures",
        "held-out text of the bundled books: ",
    )
    places = [text.find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)
    assert f"starting from the weights of {weights}" in further.err


def test_the_run_keeps_what_it_was_given(further: Done, weights: Path) -> None:
    given, run = load_model(weights), load_model(further.folder)
    assert run.config.model == given.config.model
    assert run.config.train.lr == command.FURTHER_LR < given.config.train.lr
    assert run.provenance["initial"]["model"] == str(weights)
    assert TokenShards(further.folder / "data").tokenizer_hash == Tokenizer.load(weights).hash
    for kind, count in zip(("unconditional", "prefix", "infilled"), (1, 2, 2), strict=True):
        assert len(read_samples(further.folder / "samples" / f"first-{kind}.jsonl")) == count


def test_the_report_says_what_the_training_changed(further: Done, weights: Path) -> None:
    record = json.loads((further.folder / "report.json").read_text(encoding="utf-8"))
    results = record["results"]
    before, after = results["validation_before"], results["validation_last"]
    assert before["step"] == 0 < after["step"]
    assert before["cross_entropy"] != after["cross_entropy"]
    for found in (before, after):
        assert f"{found['cross_entropy']:.4f} nats" in further.out
    assert results["model"] == str(weights)
    assert results["first_samples_seconds"] > 0


def test_early_exit_is_measured_without_rounds_of_refinement(further: Done) -> None:
    record = json.loads((further.folder / "report.json").read_text(encoding="utf-8"))
    used = record["results"]["steps_used"]
    assert all(
        kind["most"] <= STEPS == record["results"]["steps_allowed"] for kind in used.values()
    )


def test_a_run_goes_on_from_what_it_was_begun_from(
    done: Done, further: Done, weights: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(weights.parents[1])
    assert demo_folder.shipped_weights() == "models/ddlm-tiny"
    assert demo_folder.choose(None, weights.parent / "new") == "models/ddlm-tiny"
    assert demo_folder.choose("none", weights.parent / "new") is None
    assert demo_folder.choose(None, done.folder) is None
    assert demo_folder.choose(None, further.folder) == str(weights)
    assert demo_folder.choose("models/ddlm-tiny", further.folder) == str(weights)
    for folder, other, origin in (
        (done.folder, str(weights), "begun from nothing"),
        (further.folder, "none", f"begun from {weights}"),
    ):
        assert main(["demo", "--out", str(folder), "--model", other]) == 2
        error = capsys.readouterr().err
        assert origin in error
        assert error.count("\n") == 1


def test_a_model_that_is_not_there_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "run"), "--model", str(tmp_path / "no")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["demo", *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps 0 was given, at least 2 is needed"),
        (["--steps", "1"], "--steps 1 was given, at least 2 is needed"),
        (["--steps", "2000000"], "at most 1000000 is possible"),
        (["--patience", "0"], "--patience 0 was given, at least 1 is needed"),
        (["--seed", "-1"], "--seed -1 was given, at least 0 is needed"),
        (["--budget", "0"], "--budget 0 was given, more than 0 seconds are needed"),
    ],
)
def test_numbers_that_cannot_work_are_refused_before_the_training(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(command, "_prepare", lambda *a: pytest.fail("began"))
    out = tmp_path / "run"
    assert message in refused(capsys, "--out", str(out), "--model", "none", *options)
    assert not out.exists()


def test_the_command_that_goes_on_names_what_differs_from_the_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_prepare", interrupt)
    out = str(tmp_path / "a run")
    given = ["--seed", "3", "--steps", "60", "--model", "none", "--budget", "7.5"]
    assert main(["demo", "--out", out, *given]) == 130
    said = capsys.readouterr().err
    assert f"ddlm demo --out '{out}' --budget 7.5 --steps 60 --seed 3 --model none" in said
    assert "--patience" not in said
    # And it is accepted.
    assert main(["demo", "--out", out, *given]) == 130


def test_names_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets are not taken for rich's markup, and a command to be copied stays on its line."""
    out = tmp_path / "[/x] with a name that is longer than the terminal"
    monkeypatch.setenv("COLUMNS", "40")
    for name in ("_prepare", "_configuration", "_show_trained"):
        monkeypatch.setattr(command, name, lambda *a: None)
    result = types.SimpleNamespace(stopped=0, step=1, checkpoint=out / "checkpoints" / "step-1")
    monkeypatch.setattr("ddlm.training.loop.train", lambda *a, **k: result)
    monkeypatch.setattr("ddlm.lm.load", lambda *a: None)
    assert main(["demo", "--out", str(out), "--model", "none"]) == 0
    said = capsys.readouterr().out
    assert f"1 step, {result.checkpoint}\n" in said
    assert f"--model '{out}'\n" in said


def test_letters_that_the_terminal_lacks_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_prepare", lambda out, given, console: console.print("⟦written⟧"))
    screen = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(screen, encoding="ascii"))

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_configuration", stop)
    assert main(["demo", "--out", str(tmp_path / "run"), "--model", "none"]) == 130
    sys.stdout.flush()
    assert b"?written?" in screen.getvalue()
