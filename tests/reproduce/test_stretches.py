"""Real text on the stretches that rows count, for records whose real text is of whole windows alone."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ddlm.data.tokenizer import Tokenizer
from ddlm.evaluation import diversity
from ddlm.evaluation.measure import Estimate
from ddlm.evaluation.protocol import Protocol, held_out, real_continuations
from ddlm.evaluation.samples import Sample
from ddlm.reproduce.recipes import find
from ddlm.reproduce.results import read_records, results_page
from ddlm.reproduce.stretches import stretch_note
from ddlm.reproduce.workshop import Workshop
from evaluation.small import sentences
from scripts import load_script, run_script

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks" / "results.py"


def whole_windows(held_out: str) -> dict[str, Any]:
    """A record whose only row of real text is of whole windows, as those from before a task had one."""
    facts = {"samples": 6, "generated_units": 96, "group_size": 5}
    tasks = ("prefix-8", 48, {"nll_reference": asdict(Estimate(3.456))})
    rows = [
        {"name": "gone", "task": tasks[0], "metrics": tasks[2], "facts": facts | {"generated_units": tasks[1]}},
        {"name": "real text", "task": "unconditional", "metrics": {}, "facts": facts},
    ]  # fmt: skip
    asked = {"length": 16, "continuations": 3, "tasks": ["unconditional", "prefix"], "seed": 0}
    about = {"held_out": held_out, "prompts": 6, "judge": None, "model": "x"}
    return {
        "kind": "evaluate",
        "config": {"model": "models/gone", "protocol": asked | {"settings": {"steps": 50}}},
        "results": {"rows": rows, "curves": [], "facts": about},
        "command": "ddlm evaluate --model models/gone", "commit": "c" * 40, "date": "2026-11-25T00:00:00",
        "hardware": {"gpus": [], "threads": 1, "cpu": "a processor"},
    }  # fmt: skip


def test_real_text_of_whole_windows_is_marked_and_measured_on_the_stretches_of_the_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = sentences(12, seed=5, words=40)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    tokenizer = Tokenizer.train(texts, 300)
    tokenizer.save(tmp_path / "gone")
    content = whole_windows(str(tmp_path / "text.jsonl"))
    options = ("--records", "records", "--real")
    (tmp_path / "records").mkdir()
    (tmp_path / "records/a.json").write_text(json.dumps(content))

    def note() -> str:
        page = results_page(tmp_path / "records", tmp_path)
        mark = re.search(r"^\| real text<sup>(\d+)</sup> \|", page, re.MULTILINE)
        assert mark is not None
        found = re.search(rf"^{mark[1]}\. (.*)$", page, re.MULTILINE)
        assert found is not None
        return found[1]

    plain = note()
    assert "whole windows of 64 tokens" not in plain
    assert "whole windows of 16 tokens. " in plain
    assert "of the rows prefix-8 are of 8 tokens and do not compare with them" in plain
    assert "real text of these prompts: 3.46 (prefix-8)." in plain
    assert "--real" not in plain
    assert run_script(PROGRAM, *options, "gone", cwd=tmp_path) == 0
    windows = held_out(tmp_path / "text.jsonl", tokenizer, 16, 6).tokens
    whole = diversity.measure(windows.tolist())
    half = diversity.measure(windows[:, 8:].tolist(), [0, 0, 0, 1, 1, 1])
    told = note()
    assert told.startswith(plain)
    assert f"whole 16: dist-1 {whole.dist[0]:.2f}, dist-2 {whole.dist[1]:.2f}" in told
    assert f"8 of prefix-8: dist-1 {half.dist[0]:.2f}, dist-2 {half.dist[1]:.2f}" in told
    assert f"entropy {half.token_entropy:.2f}, Zipf {half.zipf:.2f}." in told
    # Figures of other windows are not this record's, and a row for each task needs no note.
    content["results"]["facts"]["prompts"] = 5
    (tmp_path / "records/a.json").write_text(json.dumps(content))
    assert note() == plain
    rows = content["results"]["rows"]
    rows.append(rows[0] | {"name": "real text"})
    assert stretch_note(content, []) is None
    assert run_script(PROGRAM, *options, "other", cwd=tmp_path) == 2
    assert "holds no evaluation of other with a row of real text" in capsys.readouterr().err


def test_an_item_has_real_text_for_each_of_its_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = sentences(24, seed=6, words=40)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    tokenizer = Tokenizer.train(texts, 300)

    def drawn(protocol: Any, task: str, generator: Any, *rest: Any) -> list[Sample]:
        return real_continuations(task, rest[1], tokenizer)

    loaded = (None, tokenizer, 16, None)
    monkeypatch.setattr("ddlm.commands.evaluate.load_generator", lambda *a: loaded)
    monkeypatch.setattr("ddlm.reproduce.workshop.draw", drawn)
    protocol = Protocol(prompts=6, continuations=3)
    text = str(tmp_path / "text.jsonl")
    shop = Workshop("tiny", tmp_path, text, text, protocol, judge="none", features="none")
    shop.quiet = True
    rows, sanity = shop.measure(find("table3"), lambda *a: None)
    names = [(row.name, row.task) for row in sanity]
    assert names[:3] == [("real text", t) for t in ("unconditional", "prefix-8", "infill-8")]
    assert {row.task for row in sanity[3:]} == {"unconditional"}
    line = next(label for label, task in rows if task == "prefix")
    for mine, real in zip(("unconditional", "prefix", "infill"), sanity, strict=False):
        assert real.facts["generated_units"] == rows[line, mine].facts["generated_units"]


@pytest.mark.parametrize(
    ("name", "whole"), [("ddlm-small-refine", True), ("ddlm-tiny-refine", False)]
)
def test_the_published_cards_say_what_real_text_is_measured_on(name: str, whole: bool) -> None:
    """Records from before rows of real text for each task have a note, later ones these rows."""
    folder = ROOT / "benchmarks/results"
    reals = [found.content for found in read_records(folder)[2]]
    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    card = ROOT / content["config"]["model"] / "README.md"
    said = stretch_note(content, reals)
    assert (said is not None) is whole
    page = card.read_text(encoding="utf-8")
    program = load_script(ROOT / "benchmarks/card.py")
    assert program.evaluation(content, program.beside(folder / f"{name}.json")) in page
    if said is not None:
        assert "--real" in said
        assert f"\n\n{said}\n\n" in page
    else:
        assert "| real text | prefix-32 |" in page
    manifest = json.loads(card.with_name("manifest.json").read_text(encoding="utf-8"))
    assert manifest["files"]["README.md"] == hashlib.sha256(card.read_bytes()).hexdigest()
