"""Sample files: what is there is lost by no mistake, and nothing goes on with samples of other settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from ddlm.bulk import Process, SampleFile, write_samples
from ddlm.cli import main
from ddlm.config import SampleConfig
from ddlm.files import write_text
from ddlm.lm import load
from ddlm.prompts import Prompt
from ddlm.sampling.template import from_tokens, parse
from ddlm.types import ConfigError, DataError
from sampling.models import write_model

OLD = '{"text": "months of work"}\n'
FOUR = Prompt(from_tokens([], 4, "{4}"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def run(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr."""
    (line,) = [x for x in capsys.readouterr().err.split("\n") if x]
    return line


# ---- nothing is lost


@pytest.mark.parametrize(
    "mistake",
    [
        ("--steps", 0), ("--grid", "warp"), ("--overlap", 999), ("--slots", 0), ("--samples", 0),
        ("--temperature", 1e-9), ("--seed", 2**63 - 1), ("--top-k", -1), ("--device", "foo"),
        ("--halt", "patience:1,patience:2,patience:3,patience:4,patience:5"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("flags", [("--overwrite",), ()])
def test_a_mistake_leaves_everything_as_it_was(
    mistake: tuple[object, ...], flags: tuple[str, ...], folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "s.jsonl"
    if flags:
        out.write_text(OLD)
    prompts = tmp_path / "p.txt"
    prompts.write_text("{4}\n{5}\n")
    common = ("--prompts", prompts, "--model", folder, "--out", out, *flags)
    assert run(*common, "--steps", 3, *mistake) == 2
    told(capsys)
    assert (out.read_text() if flags else out.exists()) == (OLD if flags else False)
    assert not (tmp_path / "s.jsonl.parts").exists()
    assert run(*common, "--steps", 3) == 0  # the mended call is not in its own way
    assert len(rows(out)) == 2


def test_the_old_file_stays_until_the_new_one_is_complete(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C during --overwrite, then --resume: it goes on with the new samples, not with the old file."""
    prompts, out = tmp_path / "p.txt", tmp_path / "s.jsonl"
    prompts.write_text("the river {8}\n" * 300)
    # as if made before: the same prompts and seeds, so only the intention to replace it tells
    old = "".join(
        json.dumps({"text": "old", "prompt": "the river {8}", "seed": i}) + "\n" for i in range(300)
    )
    out.write_text(old)
    command = [sys.executable, "-m", "ddlm", "generate", "--prompts", str(prompts), "--model", str(folder),
               "--out", str(out), "--steps", "60", "--slots", "2"]  # fmt: skip
    process = subprocess.Popen(
        [*command, "--overwrite"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    part = tmp_path / "s.jsonl.parts" / "rank-0.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if part.is_file() and part.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "--resume" in errors
    assert out.read_text() == old
    begun = part.read_bytes().count(b"\n")
    assert 5 <= begun < 300
    prompts.write_text("the river {8}\n" * (begun + 2))
    written = [json.loads(x)["number"] for x in part.read_text().split("\n")[:begun]]
    assert sorted(written) == list(range(begun))
    assert main([*command[3:], "--resume"]) == 0
    assert len(rows(out)) == begun + 2
    assert all(row["text"] != "old" for row in rows(out))
    assert list(tmp_path.glob("*.parts")) == []


def test_samples_that_are_being_written_are_not_overwritten(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    part = tmp_path / "s.jsonl.parts" / "rank-0.jsonl"
    part.parent.mkdir()
    common = ("{4}", "--model", folder, "--steps", 2, "--out", tmp_path / "s.jsonl", "--overwrite")
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(*common) == 2
        assert "still being written" in told(capsys)
        assert part.exists()
    assert run(*common) == 0


def test_finished_samples_do_not_wait_for_a_long_one(folder: Path, tmp_path: Path) -> None:
    """A kill while the long one is written loses none of them; the file is in the order of the prompts."""
    lm = load(folder)
    asked = [Prompt(parse(x, lm.tokenizer)) for x in ("the {90}", *["the river {4}"] * 9)]
    out = tmp_path / "s.jsonl"
    expected = [(p, seed) for seed, p in enumerate(asked)]
    settings = {"steps": 3, "halt": "none"}
    part = tmp_path / "s.jsonl.parts" / "rank-0.jsonl"
    seen: list[list[int]] = []

    def stop(_: object) -> None:
        seen.append([json.loads(line)["number"] for line in part.read_text().splitlines()])
        if len(seen) == 9:
            raise KeyboardInterrupt

    file = SampleFile(out, expected, settings, Process())
    with pytest.raises(KeyboardInterrupt):
        write_samples(lm, asked, file, samples=1, seed=0, steps=3, slots=4, on_sample=stop)
    assert [len(x) for x in seen] == list(range(1, 10))  # each is written at once
    assert sorted(seen[-1]) == list(range(1, 10))
    file = SampleFile(out, expected, settings, Process(), resume=True)
    assert file.mine == [0]
    assert write_samples(lm, asked, file, samples=1, seed=0, steps=3) == 1
    told = [(p.template.text, seed) for p, seed in expected]
    assert [(row["prompt"], row["seed"]) for row in rows(out)] == told
    texts = lm.generate([p.template for p in asked], steps=3)
    assert [row["text"] for row in rows(out)] == [t.text for t in texts]


def test_only_a_file_can_be_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("--out", "--trace"):
        for target, message in (
            (tmp_path / "pipe", "no regular file"),
            (Path(), "is a folder"),
            (tmp_path, "is a folder"),
        ):
            flags = ("--overwrite",) if name == "--out" else ()
            assert run("{4}", "--model", folder, "--steps", 2, name, target, *flags) == 2
            line = told(capsys)
            assert message in line
    assert (tmp_path / "pipe").is_fifo()


# ---- nothing is mixed


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (("--steps", 5), "steps=4, now it is 5"),
        (("--solver", "heun"), "solver=euler, now it is heun"),
        (("--noise-scale", 0.9), "noise_scale=1.0, now it is 0.9"),
        (("--halt", "patience:2"), "halt=none, now it is patience:2"),
        (("--overlap", 3), "overlap=16, now it is 3"),
    ],
)
def test_a_finished_file_goes_on_with_its_own_settings_only(
    other: tuple[object, ...], said: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    prompts, out = tmp_path / "p.txt", tmp_path / "s.jsonl"
    prompts.write_text("the {4}\n")
    common = ("--prompts", prompts, "--model", folder, "--out", out)
    assert run(*common, "--steps", 4) == 0
    before = out.read_bytes()
    prompts.write_text("the {4}\nsea {5}\n")
    capsys.readouterr()
    assert run(*common, "--steps", 4, *other, "--resume") == 2
    line = told(capsys)
    assert said in line
    assert "s.jsonl, line 1" in line
    assert "--overwrite" in line
    assert out.read_bytes() == before
    assert not (tmp_path / "s.jsonl.parts").exists()
    assert run(*common, "--steps", 4, "--resume") == 0
    assert [row["prompt"] for row in rows(out)] == ["the {4}", "sea {5}"]
    assert [row["settings"] for row in rows(out)] == [rows(out)[0]["settings"]] * 2


def test_a_finished_file_goes_on_in_its_own_precision_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "s.jsonl"
    prompts.write_text("the {4}\n")
    common = ("--prompts", prompts, "--model", folder, "--steps", 2, "--out", out)
    assert run(*common, "--precision", "fp32") == 0
    (row,) = rows(out)
    assert row["settings"]["precision"] == "fp32"  # type: ignore[index]
    capsys.readouterr()
    assert run(*common, "--precision", "bf16", "--resume") == 2
    assert "precision=fp32, now it is bf16" in told(capsys)
    del row["settings"]["precision"]  # type: ignore[attr-defined]  # as it was written before
    out.write_text(json.dumps(row) + "\n")
    prompts.write_text("the {4}\nsea {5}\n")
    assert run(*common, "--resume") == 0
    assert len(rows(out)) == 2


def test_a_finished_file_goes_on_with_its_own_model_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other weights; and the same weights with other defaults of generation."""
    prompts, out = tmp_path / "p.txt", tmp_path / "s.jsonl"
    prompts.write_text("the {4}\n")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    weights = write_model(tmp_path / "a", seed=1)
    defaults = write_model(tmp_path / "b", sample=SampleConfig(steps=7))
    assert run("--prompts", prompts, "--model", folder, "--out", out) == 0
    for model, said in ((weights, "made with model="), (defaults, "steps=50, now it is 7")):
        capsys.readouterr()
        assert run("--prompts", prompts, "--model", model, "--out", out, "--resume") == 2
        assert said in told(capsys)


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        ({"steps": 57, "reason": "completed"}, {"steps": 50, "halt": "none"}, "steps=57"),
        ({"steps": 31, "reason": "kl"}, {"steps": 50, "halt": "none"}, "halt=kl, now it is none"),
        ({"steps": 9, "reason": "patience"}, {"steps": 50, "halt": "kl:0.1"}, "halt=patience"),
        ({"steps": 150, "reason": "completed"}, {"steps": 50, "halt": "none"}, None),  # windows
        ({"steps": 66, "reason": "completed"}, {"steps": 50, "halt": "none", "refine": 16}, None),
        ({"steps": 9, "reason": "kl"}, {"steps": 50, "halt": "kl:0.1,fixed:9"}, None),
        ({}, {"steps": 50, "halt": "none"}, None),
        ({"settings": {"steps": 50, "solver": None}}, {"steps": 50, "halt": "none"}, None),
        ({"settings": {"steps": 50, "model": "a"}}, {"steps": 50, "model": "b"}, "model=a"),
    ],
)
def test_files_that_do_not_tell_their_settings_are_refused_where_they_must_differ(
    row: dict[str, object], settings: dict[str, object], said: str | None, tmp_path: Path
) -> None:
    out = tmp_path / "s.jsonl"
    write_text(out, json.dumps({"text": "a", "prompt": "{4}", "seed": 0} | row) + "\n")
    expected = [(FOUR, 0), (FOUR, 1)]
    if said is None:
        assert SampleFile(out, expected, settings, Process(), resume=True).missing == [1]
        return
    with pytest.raises(ConfigError, match=said):
        SampleFile(out, expected, settings, Process(), resume=True)
    assert not (tmp_path / "s.jsonl.parts").exists()


def test_ends_of_lines_inside_a_text_end_no_line(tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    row = {"text": "a\u2028b\u2029c\u0085d", "prompt": "{4}", "seed": 0}
    write_text(out, json.dumps(row, ensure_ascii=False) + "\n")
    file = SampleFile(out, [(FOUR, 0)], {"steps": 1, "halt": "none"}, Process(), resume=True)
    file.merge()
    assert rows(out) == [row]


@pytest.mark.parametrize("content", ["3\n", "[" * 200_000 + "\n", "{oops\n", "\udcff"])
def test_what_is_no_sample_file_is_not_gone_on_with(content: str, tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    out.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match="is not a sample file"):
        SampleFile(out, [(FOUR, 0)], {}, Process(), resume=True)


# ---- prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rb'{"template": "a {2}"}' + b"\n" + rb'{"template": "a {2}", "reference": "\ud800"}',
         "p.jsonl, line 2: 'reference' has '\\ud800' at character 1"),
        (rb'{"template": "a\udfff {2}"}', "p.jsonl, line 1: template has '\\udfff' at character 2"),
        (b'{"template": "a {2}"}\n' + b"[" * 200_000, "p.jsonl, line 2: not JSON"),
    ],
)  # fmt: skip
def test_prompts_that_could_not_be_written_are_named_before_any_work(
    content: bytes, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_bytes(content + b"\n")
    out = tmp_path / "s.jsonl"
    assert run("--prompts", tmp_path / "p.jsonl", "--model", folder, "--out", out) == 2
    assert message in told(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_byte_order_mark_is_no_prompt(name: str, folder: Path, tmp_path: Path) -> None:
    line = "the {4}" if name == "p.txt" else '{"template": "the {4}"}'
    (tmp_path / name).write_text(line + "\n", encoding="utf-8-sig")
    out = tmp_path / "s.jsonl"
    common = ("--model", folder, "--steps", 2, "--out", out)
    assert run("--prompts", tmp_path / name, *common) == 0
    assert [row["prompt"] for row in rows(out)] == ["the {4}"]


def test_a_reference_with_ends_of_lines_is_kept(folder: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "s.jsonl"
    reference = "one\u2028two\u0085three"
    prompts.write_text(
        json.dumps({"template": "the {4}", "reference": reference}, ensure_ascii=False) + "\n"
    )
    common = ("--prompts", prompts, "--model", folder, "--steps", 2, "--out", out)
    assert run(*common) == 0
    assert run(*common, "--resume") == 0
    assert [row["reference"] for row in rows(out)] == [reference]


# ---- several processes


def test_processes_wait_for_each_other_for_days(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them may have the long texts: half an hour, the default, is soon over."""
    import socket

    import torch.distributed as dist

    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    Process(rank=0, world=2).meet()  # of two, as far as it knows; the other one is not needed here
    try:
        waits = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout  # type: ignore[union-attr]
        assert waits > timedelta(days=7)
    finally:
        dist.destroy_process_group()


def test_several_processes_need_a_file_to_share(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("WORLD_SIZE", 8), ("RANK", 0), ("MASTER_ADDR", "::1"), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))
    assert run("{4}", "--model", folder, "--steps", 2) == 2
    assert "8 processes were started and each would print every text: add --out FILE" in told(
        capsys
    )


@pytest.mark.parametrize(
    ("asked", "world", "given"),
    [(None, 4, "cuda:3"), ("cuda", 4, "cuda:3"), ("cuda:1", 4, "cuda:1"), ("cpu", 4, "cpu"),
     ("cuda", 1, "cuda")],
)  # fmt: skip
def test_each_process_has_a_gpu_of_its_own(
    asked: str | None, world: int, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are none here, so what is asked of the loader is looked at instead."""
    from ddlm.commands.generate import _load

    found: list[str | None] = []
    there = {"WORLD_SIZE": world, "RANK": world - 1, "LOCAL_RANK": 3}
    for name, value in (there | {"MASTER_ADDR": "::1", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("ddlm.lm.load", lambda _, device, **options: found.append(device))
    _load("m", asked, None, compile=False)
    assert found == [given]
