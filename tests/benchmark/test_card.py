"""A model card says of a run, of what came before it and of its samples what was recorded, no more and no less."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ddlm.checkpoint import save_model
from ddlm.diffusion.process import NoiseProcess
from ddlm.evaluation.measure import Units, measure_row
from ddlm.evaluation.samples import Sample, write_samples
from ddlm.network.denoiser import DDLM
from ddlm.training.flops import run_flops
from ddlm.types import ConfigError
from training.runs import T, small_config

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("card", ROOT / "benchmarks/card.py")
assert SPEC is not None
assert SPEC.loader is not None
card = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(card)

CONFIG = small_config(batch=4)
EACH = 4 * T  # tokens of an update


def run_folder(folder: Path, initial: dict[str, Any] | None = None) -> Path:
    """A run whose best checkpoint is its second one of three."""
    torch.manual_seed(0)
    net = DDLM(CONFIG.model, NoiseProcess(CONFIG.process.t_min, CONFIG.process.t_max))
    provenance = {"tokens": 10 * EACH} | ({"initial": initial} if initial else {})
    save_model(
        folder / "checkpoints/step-20", net, CONFIG, tokenizer_from=None, step=20, provenance=provenance
    )  # fmt: skip
    (folder / "checkpoints/best.json").write_text('{"step": 20, "cross_entropy": 3.2}')
    lines = []
    for step, loss in ((10, 3.5), (20, 3.25), (30, 3.75)):
        lines += [
            {"kind": "train", "step": step, "seconds": 360.0 * step},
            {"kind": "validation", "step": step, "cross_entropy": loss, "by_level": {"1-2": loss}},
        ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def rows(run: Path) -> dict[str, str]:
    return dict(x.strip("| ").split(" | ") for x in card.facts(run).splitlines()[2:])


def test_a_run_from_nothing_is_told_as_of_its_best_checkpoint(tmp_path: Path) -> None:
    found = rows(run_folder(tmp_path))
    assert found["updates"] == f"20 of 4 x {T} tokens"
    assert found["tokens seen"] == f"{20 * EACH:,} (2.00 epochs)"
    assert found["training FLOPs (matrix products)"] == f"{run_flops(CONFIG, 20):.2e}"
    assert found["time"] == "2.00 hours of wall clock"
    assert found["held-out cross-entropy, mean over t"] == "3.250 nats a noised token"
    assert found["at t = 1-2"] == "3.25 nats"


def test_every_earlier_training_counts(tmp_path: Path) -> None:
    first = {"step": 1000, "tokens_seen": 1000 * EACH, "flops": 5e12}
    second = {"step": 300, "tokens_seen": 300 * EACH, "flops": 1e12, "initial": first}
    found = rows(run_folder(tmp_path, second))
    assert found["updates"] == f"20 of 4 x {T} tokens, after 1,000 and 300 of earlier runs"
    assert found["tokens seen"] == f"{1320 * EACH:,} (132.00 epochs)"
    assert found["training FLOPs (matrix products)"] == f"{run_flops(CONFIG, 20) + 6e12:.2e}"
    found = rows(run_folder(tmp_path / "one", first))
    assert found["updates"] == f"20 of 4 x {T} tokens, after 1,000 of an earlier run"


def test_an_unknown_earlier_training_is_not_nothing(tmp_path: Path) -> None:
    unknown = {"step": None, "tokens_seen": None, "flops": None}
    found = rows(run_folder(tmp_path, unknown))
    assert found["updates"].endswith("after an unknown number of an earlier run")
    for name, own in (
        ("tokens seen", f"{20 * EACH:,}"),
        ("training FLOPs (matrix products)", f"{run_flops(CONFIG, 20):.2e}"),
    ):
        assert found[name] == f"{own} in this run; those of the weights it began from are not known"


def test_a_checkpoint_that_was_never_evaluated_is_one_line(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(x for x in lines if '"step": 20' not in x))
    with pytest.raises(ConfigError, match="no held-out evaluation of step 20"):
        card.facts(run)


def drawn(folder: Path, task: str, key: str, word: str, prompts: int = 6) -> list[Sample]:
    """Two seeds of samples in files as the protocol names them."""
    out = []
    for seed in range(2):
        made = [
            Sample(f"{word} {seed} {i}", tokens=[*f"{word} {i}".encode()], seed=seed)
            for i in range(prompts)
        ]
        write_samples(folder / f"{task}-{key}-seed{seed}.jsonl", made)
        out += made
    return out


def record(**sets: list[Sample]) -> dict[str, Any]:
    found = [
        measure_row("mine", task, samples, units=Units("own tokens"))
        for task, samples in sets.items()
    ]
    shown = [
        {
            "name": row.name,
            "task": row.task,
            "facts": row.facts,
            "metrics": {k: vars(v) for k, v in row.metrics.items()},
        }
        for row in found
    ]
    shown.append({"name": "real text", "task": "unconditional", "facts": {"samples": 6}})
    return {"config": {"model": "runs/mine"}, "results": {"rows": shown}}


@pytest.mark.parametrize("prompts", [3, 6])
def test_the_points_of_a_curve_are_not_shown(tmp_path: Path, prompts: int) -> None:
    """They lie in the same folder under other keys, some with as many samples as the row has."""
    drawn(tmp_path, "unconditional", "0" * 12, "hotter", prompts)
    main = drawn(tmp_path, "unconditional", "a" * 12, "main")
    drawn(tmp_path, "unconditional", "f" * 12, "colder", prompts)
    other = drawn(tmp_path, "prefix-8", "1" * 12, "given")
    (tmp_path / "notes.jsonl").write_text('{"text": "something else"}\n')
    shown = card.samples(tmp_path, record(**{"unconditional": main, "prefix-8": other}))
    assert [x for x in shown.splitlines() if x.endswith(":")] == [
        f"{task}-{12 * key}-seed{seed}:"
        for task, key in (("prefix-8", "1"), ("unconditional", "a"))
        for seed in (0, 1)
    ]
    assert "> main 0 0\n" in shown
    assert "> main 1 3\n" in shown
    for word in ("hotter", "colder", "else", "main 0 4"):
        assert word not in shown


def test_samples_of_another_evaluation_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    main = drawn(tmp_path / "elsewhere", "unconditional", "a" * 12, "main")
    drawn(folder, "unconditional", "b" * 12, "other", prompts=4)
    run = run_folder(tmp_path / "run")
    text, kept = tmp_path / "text.md", tmp_path / "record.json"
    text.write_text("{{facts}} {{samples}}")
    content = record(unconditional=main)
    content |= {"command": "ddlm evaluate", "date": "2026-11-26", "commit": "0" * 40}
    content["results"]["rows"][-1]["metrics"] = {}
    kept.write_text(json.dumps(content))
    command = [sys.executable, str(ROOT / "benchmarks/card.py"), str(text), "--run", str(run)]
    command += ["--record", str(kept), "--samples", str(folder), "--out", str(tmp_path / "card.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "no sets of samples that could be the 12 of the row unconditional" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "card.md").exists()


def test_a_baseline_tells_of_its_own_training() -> None:
    folder = ROOT / "models/ddlm-tiny-ar"
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    found = rows(folder)
    trained = record["results"]
    assert found["tokens seen"] == f"{trained['tokens']:,} ({trained['epochs']:.2f} epochs)"
    assert found["held-out text of the shards"].startswith(f"{trained['held_out_nll']:.3f} nats")
    assert record["command"] in found["command"]
    assert record["hardware"]["cpu"] in found["machine"]


def test_a_card_says_what_its_records_say_of_their_origin(tmp_path: Path) -> None:
    """GPUs are the machine where there were some, a changed tree is named, an unknown commit is no crash."""
    for file in (ROOT / "models/ddlm-tiny-ar").iterdir():
        if file.name != "record.json":
            (tmp_path / file.name).symlink_to(file)
    whole = ROOT / "models/ddlm-tiny-ar/record.json"
    content = json.loads(whole.read_text(encoding="utf-8"))
    content["hardware"]["gpus"], content["commit"] = ["NVIDIA H200"], "a" * 40 + "-dirty"
    (tmp_path / "record.json").write_text(json.dumps(content))
    found = rows(tmp_path)
    assert found["machine"] == "NVIDIA H200"
    assert found["command"].endswith(f"commit {'a' * 12}, with changes")
    kept = json.loads((ROOT / "benchmarks/results/ddlm-tiny-sde.json").read_text(encoding="utf-8"))
    last = [
        card.evaluation(kept | {"commit": c}).splitlines()[-1] for c in (None, content["commit"])
    ]
    assert last[0].endswith("commit unknown.")
    assert last[1].endswith(f"commit {'a' * 12}, with changes.")
