"""Wrong input over the real command line: one clear line, exit status 2, nothing half-written."""

from __future__ import annotations

import json
import lzma
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddlm import cli
from ddlm.checkpoint import latest_checkpoint, load_model
from ddlm.config import Config
from ddlm.data import bundled_corpus
from ddlm.training.metrics import Reporter

SMALL = [
    "--config", "tiny",
    "--model.vocab_size", "400",
    "--model.length", "16",
    "--model.layers", "1",
    "--model.heads", "2",
    "--model.width", "32",
    "--model.feed_forward", "64",
    "--model.embedding_width", "16",
    "--train.batch", "4",
    "--train.budget", "null",
    "--train.compile", "false",
    "--train.eval_every", "0",
    "--train.checkpoint_every", "2",
    "--train.threads", "1",
]  # fmt: skip
NEWLINE = "\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, shards of it and a small trained run."""
    folder = tmp_path_factory.mktemp("bad-input")
    with lzma.open(bundled_corpus(), "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(20), strict=False)]
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": t}) + NEWLINE for t in texts), encoding="utf-8"
    )
    shards = ["prepare", str(folder / "text.jsonl"), "--out", str(folder / "shards")]
    assert cli.main([*shards, "--vocab_size", "400", "--processes", "1"]) == 0
    assert cli.main(training(folder, "run", "--train.steps", "3")) == 0
    return folder


def training(folder: Path, run: str, *more: str) -> list[str]:
    paths = ["--data.path", str(folder / "shards"), "--out", str(folder / run)]
    return ["train", *SMALL, *paths, *more]


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """Run a command line that must be refused; returns its only line on stderr."""
    capsys.readouterr()
    assert cli.main([str(a) for a in argv]) == 2
    streams = capsys.readouterr()
    lines = [line for line in streams.err.splitlines() if line]
    assert len(lines) == 1, streams.err
    assert lines[0].startswith("error: ")
    assert streams.out == ""
    return lines[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- the corpus


def test_a_missing_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "prepare", tmp_path / "no.txt", "--out", tmp_path / "shards")
    assert "no.txt" in line
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "folder"])
def test_an_empty_corpus(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).touch()
    line = refused(capsys, "prepare", tmp_path / name, "--out", tmp_path / "shards")
    assert name in line
    assert not (tmp_path / "shards" / "index.json").exists()


def test_bytes_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.txt").write_bytes(b"The caf\xe9 on the corner. " * 50)
    line = refused(capsys, "prepare", tmp_path / "latin.txt", "--out", tmp_path / "shards")
    assert "latin.txt" in line
    assert "7" in line.replace("latin.txt", "")  # the offset of the byte
    assert not (tmp_path / "shards" / "index.json").exists()


def test_a_field_that_is_not_there(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["prepare", place / "text.jsonl", "--text-field", "body", "--out", tmp_path / "shards"]
    line = refused(capsys, *argv)
    assert "body" in line
    assert "text.jsonl" in line


def test_a_corpus_smaller_than_one_sequence(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("Hello.", encoding="utf-8")
    argv = ["prepare", tmp_path / "short.txt", "--out", tmp_path / "shards"]
    assert cli.main([*map(str, argv), "--vocab_size", "300"]) == 0
    line = refused(capsys, *training(tmp_path, "run"))
    assert "shards" in line
    assert "16" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---- the configuration


def test_no_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "train", "--config", "tiny", "--out", tmp_path / "run")
    assert "--data.path" in line
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_entries_than_the_model(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *training(place, "other", "--model.vocab_size", "300"))
    assert "300" in line
    assert "400" in line
    assert not (place / "other").exists()


@pytest.mark.parametrize(
    "more, said",
    [
        (("--train.lrr", "1"), "did you mean '--train.lr'?"),
        (("--train.lr", "fast"), "train.lr is 'fast', it must be a number"),
        (("--process.t_min", "10"), "process.t_min is 10.0, it must be below process.t_max"),
        (("--model.heads", "3"), "model.width"),
        (("--train.device", "tpu"), "one of"),
    ],
)
def test_settings_that_cannot_be(
    more: tuple[str, ...], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *training(place, "other", *more))
    assert not (place / "other").exists()


def test_unknown_keys_of_a_file(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("train:\n  learning_rate: 1\n", encoding="utf-8")
    line = refused(capsys, "train", "--config", tmp_path / "mine.yaml", "--out", tmp_path / "run")
    assert "train.learning_rate" in line
    assert "mine.yaml" in line


# ---- templates


@pytest.mark.parametrize(
    "template", ["{0}", "{-3}", "{4", "4}", "a {b} c", "no slot", "{}", "{1.5}", ""]
)
def test_templates_that_cannot_be_read(
    template: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, "generate", template, "--model", place / "run", "--steps", "2")


@pytest.mark.parametrize(
    "more",
    [
        ("--steps", "0"),
        ("--samples", "0"),
        ("--halt", "patience:0"),
        ("--halt", "never:3"),
        ("--noise-scale", "-1"),
        ("--temperature", "0"),
        ("--temperature", "1e-50"),
        ("--top-k", "99999999999999999999"),
        ("--steps", "99999999999999999999"),
        ("--seed", "99999999999999999999"),
        ("--solver", "eulr"),
        ("--device", "foo"),
        ("--device", "meta"),
        ("--device", "cuda:99"),
        ("--out", "."),
        ("--trace", "."),
    ],
)
def test_settings_of_generation_out_of_range(
    more: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, "generate", "{8}", "--model", place / "run", *more)


def test_text_that_is_no_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes of another encoding on the command line arrive as halves of characters."""
    line = refused(capsys, "generate", "caf\udce9 {8}", "--model", place / "run", "--steps", "2")
    assert "UTF-8" in line


@pytest.mark.parametrize("device", ["cuda:99", "foo"])
@pytest.mark.parametrize("command", [("generate", "{8}"), ("serve", "--port", "0")])
def test_a_device_that_is_not_there(
    command: tuple[str, ...], device: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before the weights are read, on a machine with a GPU and without."""
    line = refused(capsys, *command, "--model", place / "run", "--device", device)
    assert f"device '{device}'" in line
    assert "choose cpu" in line


def test_a_terminal_of_another_encoding_still_gets_the_text(place: Path) -> None:
    """What it cannot show is a question mark; JSON says it in ASCII and loses nothing."""
    argv = program("generate", "caf\u00e9 {4}", "--model", str(place / "run"), "--steps", "2")
    for more in ((), ("--json",)):
        done = subprocess.run(
            [*argv, *more],
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
        )
        assert done.returncode == 0, done.stderr.decode()
        shown = done.stdout.decode("ascii")
        if more:
            assert json.loads(shown)["text"].startswith("caf\u00e9")
        else:
            assert shown.startswith("caf?")


# ---- models, checkpoints, shards


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "generate", "{8}", "--model", tmp_path / "nothing")
    assert "nothing" in line


def test_prepared_text_is_no_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "generate", "{8}", "--model", place / "shards")
    assert "is prepared text, not a model" in line


def test_a_run_of_another_architecture(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(place / "run" / "checkpoints")
    line = refused(capsys, *training(place, "run", "--model.layers", "2", "--train.steps", "4"))
    assert "layers" in line
    assert snapshot(place / "run" / "checkpoints") == before


def damaged(place: Path, to: Path, name: str, flip: bool) -> Path:
    """A copy of the run's last checkpoint in which a file is cut short, or one bit of it is flipped."""
    checkpoint = latest_checkpoint(place / "run")
    assert checkpoint is not None
    shutil.copytree(checkpoint, to)
    content = bytearray((to / name).read_bytes())
    if flip:
        content[len(content) // 2] ^= 1
    else:
        del content[-5:]
    (to / name).write_bytes(content)
    return to


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "tokenizer.json"])
@pytest.mark.parametrize("flip", [True, False])
def test_a_damaged_checkpoint(
    name: str, flip: bool, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(place, tmp_path / "model", name, flip)
    assert name in refused(capsys, "generate", "{8}", "--model", folder)


@pytest.mark.parametrize("flip", [True, False])
def test_damaged_shards(
    flip: bool, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "shards", tmp_path / "shards")
    file = tmp_path / "shards" / "train-00000.bin"
    content = bytearray(file.read_bytes())
    if flip:
        content[len(content) // 2] ^= 1
    else:
        del content[-2:]
    file.write_bytes(content)
    assert "train-00000.bin" in refused(capsys, *training(tmp_path, "run", "--train.steps", "2"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_that_holds_no_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shards").mkdir()
    assert "shards" in refused(capsys, *training(tmp_path, "run"))


def test_ends_of_lines_inside_a_string_end_no_line_of_the_metrics(tmp_path: Path) -> None:
    """JSON may hold U+2028, U+2029 and U+0085 as they are; only a line feed ends a line."""
    figures = pytest.importorskip("ddlm.analysis.figures")
    line = json.dumps({"kind": "train", "step": 1, "note": "a\u2028b\u0085c"}, ensure_ascii=False)
    file = tmp_path / "metrics.jsonl"
    file.write_text(line + NEWLINE, encoding="utf-8")
    assert [row["note"] for row in figures.read_metrics(file)] == ["a\u2028b\u0085c"]
    reporter = Reporter(tmp_path, Config(), quiet=True)
    reporter.start(1)
    reporter.close()
    assert file.read_text(encoding="utf-8") == line + NEWLINE


# ---- the machine


def program(*argv: str, **options: object) -> list[str]:
    return [sys.executable, "-m", "ddlm", *argv]


@pytest.mark.skipif(os.name != "posix", reason="needs the limits of POSIX")
def test_a_full_disk_leaves_the_previous_checkpoint(place: Path, tmp_path: Path) -> None:
    """Files larger than a few KiB cannot be written, as on a disk that is full."""
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copytree(place / "shards", tmp_path / "shards")
    before = latest_checkpoint(tmp_path / "run")

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    done = subprocess.run(
        program(*training(tmp_path, "run", "--train.steps", "5")),
        capture_output=True,
        text=True,
        preexec_fn=full,
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert latest_checkpoint(tmp_path / "run") == before
    assert load_model(tmp_path / "run").step == 3
    leftovers = [p for p in (tmp_path / "run").rglob("*") if p.name.startswith(".")]
    assert leftovers == []


@pytest.mark.skipif(os.name != "posix", reason="needs the signals of POSIX")
def test_ctrl_c_leaves_a_checkpoint_and_the_command_that_goes_on(
    place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "shards", tmp_path / "shards")
    argv = training(tmp_path, "run", "--train.steps", "1000000", "--train.log_every", "1")
    process = subprocess.Popen(
        program(*argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    command = last[last.index("ddlm train") :].split()
    step = load_model(tmp_path / "run").step
    assert step is not None
    assert step > 0
    assert cli.main([*command[1:], "--train.steps", str(step + 2)]) == 0
    assert load_model(tmp_path / "run").step == step + 2
