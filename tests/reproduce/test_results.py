"""The page of results from real records of small real models, and from records that lack something."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ddlm.checkpoint import load_model
from ddlm.cli import main
from ddlm.config import Config
from ddlm.data.prepare import prepare
from ddlm.data.shards import TokenShards
from ddlm.evaluation import baseline
from ddlm.evaluation.generators import Settings
from ddlm.evaluation.measure import Estimate
from ddlm.evaluation.report import cell
from ddlm.reproduce import results
from ddlm.reproduce.results import Found, Notes, read_records, results_page
from ddlm.reproduce.subjects import Subject, read_subject
from ddlm.training.flops import peer_flops, run_flops
from ddlm.training.loop import train
from ddlm.types import ConfigError
from evaluation.small import sentences
from scripts import run_script

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks" / "results.py"


def small_config(data: str, **train_settings: Any) -> Config:
    config = Config()
    m, t = config.model, config.train
    m.layers, m.heads, m.width, m.feed_forward, m.length = 1, 2, 16, 32, 16
    m.embedding_width, m.time_width, m.vocab_size = 16, 16, 300
    settings = {"batch": 8, "steps": 6, "warmup": 2, "precision": "fp32", "eval_every": 0}
    for key, value in (settings | train_settings).items():
        setattr(t, key, value)
    config.data.path = data
    return config


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two published models, ``models/ours`` and ``models/ours-ar``, and the records of three commands."""
    root = tmp_path_factory.mktemp("root")
    rows = [json.dumps({"text": " ".join(sentences(6, seed=300 + i))}) for i in range(120)]
    (root / "text.jsonl").write_text("\n".join(rows))
    prepare(
        str(root / "text.jsonl"), root / "shards", vocab_size=300, val_fraction=0.2, processes=1
    )
    config = small_config(str(root / "shards"))
    train(config, root / "run", quiet=True)
    assert main(["export", str(root / "run"), "--out", str(root / "models/ours")]) == 0
    shards = TokenShards(root / "shards")
    plan = baseline.make_plan(config, shards, "gpt-neox", None)
    baseline.train_baseline(plan, shards, root / "models/ours-ar")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("DDLM_CACHE", str(root / "cache"))
        few = ["--prompts", "20", "--continuations", "2", "--no-curves", "--data", "shards"]
        few += ["--judge", "models/ours-ar"]
        for name, features in (("ours", "none"), ("ours-ar", "models/ours-ar")):
            command = ["evaluate", "--model", f"models/{name}", "--features", features, *few]
            steps = ["--steps", "4"] if name == "ours" else []
            assert main([*command, *steps, "--out", f"out/{name}"]) == 0
            (root / "records").mkdir(exist_ok=True)
            shutil.copy(root / "out" / name / "record.json", root / "records" / f"{name}.json")
        options = ["--speed", "models/ours", "--queue", "4", "--slots", "2", "--rounds", "1"]
        assert page_program(root, *options) == 0
    return root


def page_program(root: Path, *options: str) -> int:
    """``python benchmarks/results.py`` with the records of ``root``, in this process: its exit status."""
    return run_script(PROGRAM, "--records", "records", *options, cwd=root)


def table(page: str) -> tuple[list[str], dict[tuple[str, str], list[str]]]:
    """Headings, and the cells of each line by model and task."""
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    heads, _, *lines = [[c.strip() for c in re.split(r"(?<!\\)\|", r)[1:-1]] for r in rows]
    return heads, {(line[0], line[1]): line for line in lines}


def footnote(page: str, value: str) -> str:
    """The text of a cell's footnote."""
    number = re.search(r"<sup>(\d+)</sup>", value)
    assert number is not None, value
    found = re.search(rf"^{number[1]}\. (.*)$", page, re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.slow
def test_every_number_of_the_page_stands_in_a_record(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    page = results_page(Path("records"), Path())
    heads, lines = table(page)
    tasks = {"unconditional", "prefix-8", "infill-8"}
    assert {t for name, t in lines if name == "ours"} == tasks
    assert {t for name, t in lines if name == "ours-ar"} == tasks - {"infill-8"}
    assert ("real text", "unconditional") in lines
    assert all(len(line) == len(heads) for line in lines.values())
    for name in ("ours", "ours-ar"):
        record = json.loads(Path(f"records/{name}.json").read_text())
        assert record["command"].split()[0] in page
        for row in record["results"]["rows"]:
            if row["name"] != name:
                continue
            line = lines[name, row["task"]]
            for key in results.MEASURES:
                shown = line[heads.index(results._HEADS[key])]
                if key in row["metrics"]:
                    assert shown.split("<sup>")[0] == cell(Estimate(**row["metrics"][key]))
                else:
                    assert key == "mauve"
                    assert footnote(page, shown) == "MAUVE: no feature model."
            assert line[-1] == ("1" if name == "ours" else "2")
    assert lines["ours", "unconditional"][2] == "4 of 4"
    itself = lines["ours-ar", "unconditional"][heads.index("AR-NLL")]
    assert footnote(page, itself).startswith("Judged by itself")
    assert "<sup>" not in lines["ours", "unconditional"][heads.index("AR-NLL")]
    assert {line[heads.index("judge")] for line in lines.values()} == {"ours-ar"}


@pytest.mark.slow
def test_rows_of_all_seeds_together_are_marked_beside_rows_of_each_seed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    for name in ("ours", "ours-ar"):
        record = json.loads(Path(f"records/{name}.json").read_text())
        if name == "ours":  # as a record from before the size was kept
            for row in record["results"]["rows"]:
                assert row["facts"].pop("samples_of_a_set") == 20
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    page = results_page(tmp_path, Path())
    heads, lines = table(page)
    for key in ("self_bleu", "token_entropy", "zipf"):
        column = heads.index(results._HEADS[key])
        assert footnote(page, lines["ours", "prefix-8"][column]).startswith("Of all seeds' samples")
        assert "<sup>" not in lines["ours-ar", "prefix-8"][column]
        assert "<sup>" not in lines["real text", "unconditional"][column]
    (tmp_path / "ours-ar.json").unlink()
    assert "Of all seeds' samples" not in results_page(tmp_path, Path())


@pytest.mark.slow
def test_the_seconds_are_those_of_the_speed_record(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    heads, lines = table(results_page(Path("records"), Path()))
    found = json.loads(Path("records/ours-speed.json").read_text())["results"]
    plain, early = heads.index("s / 64 tokens"), heads.index("with early exit")
    (sampling,) = found["samplings"]
    assert sampling["settings"]["steps"] == 4
    assert sampling["plain"]["mean_steps"] == 4
    each = [sampling[kind]["seconds"] * 4 for kind in ("plain", "patience")]  # 64 tokens of 16
    shown = [lines["ours", "prefix-8"][i].split("<sup>")[0] for i in (plain, early)]
    assert shown == [f"{e:.3g}" for e in each]
    assert lines["ours-ar", "prefix-8"][plain].startswith("-<sup>")  # the peer wrote 16 tokens
    assert lines["ours-ar", "prefix-8"][early].startswith("-<sup>")


@pytest.mark.slow
def test_models_tell_their_size_and_cost(place: Path) -> None:
    ours, other = (read_subject(place, f"models/{n}") for n in ("ours", "ours-ar"))
    config = small_config("")
    assert ours.values["parameters"] == load_model(place / "run").model.parameter_counts()["total"]
    assert ours.values["tokens"] == 6 * 8 * 16
    assert ours.values["flops"] == run_flops(config, 6)
    plan = json.loads((place / "models/ours-ar/plan.json").read_text())
    network = baseline.build(baseline.Plan(**plan), 0)
    assert other.values["parameters"] == sum(p.numel() for p in network.parameters())
    assert other.values["tokens"] == 6 * plan["batch"] * plan["context"]
    config.model.length, config.train.batch = plan["context"], plan["batch"]
    assert other.values["flops"] == peer_flops(config, "gpt_neox") * 6


@pytest.mark.slow
def test_training_further_adds_up(place: Path, tmp_path: Path) -> None:
    config = small_config(str(place / "shards"), steps=2)
    train(config, tmp_path / "further", initial=place / "models/ours", quiet=True)
    assert main(["export", str(tmp_path / "further"), "--out", str(tmp_path / "models/on")]) == 0
    subject = read_subject(tmp_path, "models/on")
    assert subject.values["tokens"] == (6 + 2) * 8 * 16
    assert subject.values["flops"] == pytest.approx(run_flops(config, 8))
    file = tmp_path / "models/on/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["provenance"]["initial"]["tokens_seen"] = None
    file.write_text(json.dumps(manifest))
    subject = read_subject(tmp_path, "models/on")
    assert "tokens" not in subject.values
    assert "not known" in subject.missing["tokens"]


@pytest.mark.slow
def test_the_program_writes_the_page_and_finds_a_change(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.md"
    check = ("--check", "--out", str(out))
    assert page_program(place, *check) == 1
    assert page_program(place, "--out", str(out)) == 0
    assert page_program(place, *check) == 0
    out.write_text(out.read_text().replace("4 of 4", "3 of 4"))
    assert page_program(place, *check) == 1
    # And as it is called: in a process of its own.
    command = [sys.executable, str(PROGRAM), "--records", "records", *check]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert f"{out} is not what records says" in done.stdout


def record(model: str = "models/gone", **metrics: Any) -> dict[str, Any]:
    """A record of an evaluation with one row."""
    row = {
        "name": Path(model).name, "task": "unconditional", "metrics": metrics,
        "facts": {"mean_steps": 31.0, "absent": {"nll": "no judge"}},
    }  # fmt: skip
    return {
        "kind": "evaluate",
        "config": {"model": model, "protocol": {"settings": {"steps": 50, "halt": "patience:25"}}},
        "results": {"rows": [row], "curves": [], "facts": {"judge": None, "model": "x"}},
        "command": f"ddlm evaluate --model {model}", "commit": "c" * 40 + "-dirty", "date": "2026-11-25T00:00:00",
        "hardware": {"gpus": [], "threads": 1, "cpu": "a processor"},
    }  # fmt: skip


def test_what_is_missing_is_a_dash_with_its_reason(tmp_path: Path) -> None:
    zipf = {"value": None, "low": None, "high": None, "over": None}
    (tmp_path / "a.json").write_text(json.dumps(record(zipf=zipf)))
    page = results_page(tmp_path, tmp_path)
    heads, lines = table(page)
    line = lines["gone", "unconditional"]
    reasons = {h: footnote(page, c) for h, c in zip(heads, line, strict=True) if c.startswith("-")}
    assert set(heads) - set(reasons) == {"model", "task", "steps", "record"}
    assert reasons["parameters"] == "The folder gone is not among the published models."
    assert reasons["AR-NLL"] == "AR-NLL: no judge."
    assert reasons["judge"] == "No judge was asked."
    assert reasons["dist-1"] == "dist-1: not measured."
    assert reasons["Zipf"] == "Zipf: not a finite number."
    assert line[2] == "31 of 50, patience:25"
    assert "commit cccccccccccc, with changes" in page
    assert "\n```bash\nddlm evaluate --model models/gone\n```\n" in page
    assert "1 thread of a processor" in page


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no record of an evaluation"),
        ({"a.json": "[1]"}, "a.json is not a record"),
        ({"a.json": '{"kind": "evaluate"'}, "a.json is not a record"),
    ],
)
def test_a_folder_without_usable_records_is_one_line(
    tmp_path: Path, files: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_records(tmp_path)
    assert page_program(tmp_path, "--records", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "docs").exists()


def speed_record(**how: Any) -> dict[str, Any]:
    """A record of the speed of one sampling of ``models/ours`` and of its peer."""
    measured = {"seconds": 0.25, "all_seconds": [0.25], "mean_steps": 50.0}
    sampling = {"settings": {"steps": 50} | how, "plain": measured, "patience_steps": 6}
    sampling["patience"] = measured | {"seconds": 0.2, "mean_steps": 41.0}
    results = {"length": 64, "queue": 8, "slots": 4, "samplings": [sampling]}
    results["peer"] = {"name": "gpt_neox", "seconds": 0.125}
    hardware = {"gpus": [], "threads": 1, "cpu": "a processor"}
    about = {"model": "models/ours", "sizes": {"layers": 2}}
    return {"config": about, "results": results, "hardware": hardware}


def test_two_speeds_of_one_sampling_are_refused() -> None:
    both = [Found(Path(name), speed_record()) for name in ("a.json", "b.json")]
    with pytest.raises(ConfigError, match=r"a\.json and b\.json both tell the speed of ours"):
        results.seconds(Subject("ours", "diffusion"), asdict(Settings()), both, Notes())


def test_a_row_has_the_seconds_of_its_own_sampling() -> None:
    speeds = [Found(Path("a.json"), speed_record(solver="sde", refine=16))]
    ours, notes = Subject("ours", "diffusion"), Notes()
    plain = results.seconds(ours, asdict(Settings()), speeds, notes)
    assert all(cell.startswith("-<sup>") for cell in plain)
    refined = asdict(Settings(solver="sde", refine=16, halt="patience:25"))
    shown = results.seconds(ours, refined, speeds, notes)
    assert [cell.split("<sup>")[0] for cell in shown] == ["0.25", "0.2"]
    assert any("6 steps without a switch of a token: 41 of 50" in text for text in notes.texts)
    other = Subject("ours-ar", "autoregressive", sizes={"layers": 2}, architecture="gpt-neox")
    assert results.seconds(other, refined, speeds, notes)[0].startswith("0.125<sup>")
    other = Subject("ours-ar", "autoregressive", sizes={"layers": 3}, architecture="gpt-neox")
    assert results.seconds(other, refined, speeds, notes)[0].startswith("-<sup>")


def test_the_command_of_a_script_can_be_run_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(record() | {"command": "results.py --speed x"}))
    page = results_page(tmp_path, tmp_path)
    assert "\npython benchmarks/results.py --speed x\n" in page


def test_only_samplings_that_have_a_row_are_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(record()))
    assert page_program(tmp_path, "--records", str(tmp_path), "--speed", "models/other") == 2
    error = capsys.readouterr().err
    assert "holds no evaluation of other" in error
    assert error.count("\n") == 1


def test_the_published_page_is_what_the_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page, records = Path("docs/results.md"), Path("benchmarks/results")
    if not records.is_dir():
        assert not page.exists(), "a page without records"
        return
    assert page.read_text(encoding="utf-8") == results_page(records, Path())


def test_rounds_of_refinement_are_among_the_steps(tmp_path: Path) -> None:
    found = record()
    found["config"]["protocol"]["settings"]["refine"] = 16
    (tmp_path / "a.json").write_text(json.dumps(found))
    _, lines = table(results_page(tmp_path, tmp_path))
    assert (
        lines["gone", "unconditional"][2] == "31 of 66, patience:25, the last 16 of them refining"
    )


def test_a_row_says_what_is_unlike_the_others(tmp_path: Path) -> None:
    """Another grid, a judge in another precision, samples from another machine."""
    found = record()
    found["config"]["protocol"]["settings"]["grid_name"] = "karras"
    facts = found["results"]["facts"]
    facts["judge"] = {"judge": "some/judge", "precision": "bf16"}
    elsewhere = {"gpus": ["A GPU"], "threads": 1, "cpu": ""}
    facts["drawn"] = [{"commit": None, "versions": {}, "hardware": x} for x in (None, elsewhere)]
    (tmp_path / "a.json").write_text(json.dumps(found))
    page = results_page(tmp_path, tmp_path)
    _, lines = table(page)
    line = lines["gone", "unconditional"]
    assert line[2] == "31 of 50, patience:25, karras grid"
    assert "judge, bf16" in line
    assert "; samples drawn on A GPU;" in page
