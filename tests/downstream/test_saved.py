"""A fine-tuned DDLM's folder: transformers alone reads text and answers as the harness does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf
import torch

from ddlm.cli import main
from ddlm.data.tokenizer import Tokenizer
from ddlm.downstream.finetune import _collator
from ddlm.downstream.glue import TASKS, Task
from ddlm.downstream.models import Source, find_source
from ddlm.integrations.card import PAIRS
from ddlm.integrations.export import export_model
from ddlm.types import ConfigError
from downstream.tiny import sentences, write_tiny_model

LENGTH = 24
FIRST = ["the cat", sentences(1)[0], "a <|end|> in the text", " ".join(sentences(5)), "a book"]
SECOND = ["a dog sees", "no", sentences(2)[1], " ".join(sentences(7, 1)), " ".join(sentences(6))]


def save(
    source: Source, folder: Path, task: Task, pooling: str = "mean", segments: bool = True
) -> Any:
    """A classifier whose segments and head say something, saved; returned in evaluation mode."""
    torch.manual_seed(0)
    model: Any = source.classifier(task, 1.0, pooling, segments)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    source.save(model, folder, length=LENGTH)
    return model.eval()


@pytest.fixture
def auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``folder -> tokenizer, model``; the folder's code is copied to a place of this test's."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    code = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", code)
    package = "transformers_modules"  # one of another place hides this test's
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not Path(p, package).is_dir()])
    for name in [n for n in sys.modules if n.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)

    def load(folder: Path) -> tuple[Any, Any]:
        kinds = (AutoTokenizer, AutoModelForSequenceClassification)
        tokenizer, model = (k.from_pretrained(folder, trust_remote_code=True) for k in kinds)
        return tokenizer, model.eval()

    yield load
    for name in [n for n in sys.modules if n.startswith(package)]:
        del sys.modules[name]


@pytest.mark.parametrize("pooling, segments", [("pair", True), ("pair", False), ("mean", True)])
@pytest.mark.parametrize("texts", [(FIRST,), (FIRST, SECOND)], ids=["single", "pair"])
def test_transformers_answers_as_the_harness(
    tmp_path: Path, auto: Any, pooling: str, segments: bool, texts: tuple[list[str], ...]
) -> None:
    source = find_source(str(write_tiny_model(tmp_path / "tiny")))
    task = TASKS["cola" if len(texts) == 1 else "mrpc"]
    model = save(source, tmp_path / "saved", task, pooling, segments)
    rows = source.encoder(texts, LENGTH)
    tokenizer, theirs = auto(tmp_path / "saved")
    assert "transformers_modules" in type(theirs).__module__, "the folder's own code"
    found = tokenizer(*texts, truncation=True)
    assert found["input_ids"] == [row["input_ids"] for row in rows]
    assert found["token_type_ids"] == [row["token_type_ids"] for row in rows]
    assert max(len(ids) for ids in found["input_ids"]) == LENGTH, "some are cut"
    batch = _collator(source.encoder.pad_id, task)([{**row, "labels": 0} for row in rows])
    del batch["labels"]
    padded = tokenizer(*texts, truncation=True, padding=True, return_tensors="pt")
    assert padded.keys() == batch.keys()
    for name, value in batch.items():
        assert torch.equal(padded[name], value), name
    with torch.no_grad():
        expected, logits = model(**batch).logits, theirs(**padded).logits
    torch.testing.assert_close(logits, expected)
    assert (expected.amax(0) - expected.amin(0)).min() > 0.01, "the texts differ"


def test_a_network_without_segments_is_given_none(tmp_path: Path, auto: Any) -> None:
    source = find_source(str(write_tiny_model(tmp_path / "tiny")))
    save(source, tmp_path / "saved", TASKS["mrpc"], segments=False)
    tokenizer, _ = auto(tmp_path / "saved")
    found = tokenizer(FIRST, SECOND, truncation=True)
    assert set(found) == {"input_ids", "attention_mask"}
    rows = source.encoder((FIRST, SECOND), LENGTH)
    assert found["input_ids"] == [row["input_ids"] for row in rows]


@pytest.mark.parametrize("before", ["none", "bytes", "template"])
def test_the_tokenizer_stays_that_of_the_pretrained_model(tmp_path: Path, before: str) -> None:
    """Shards, records and another fine-tuning know a tokenizer by its hash."""
    folder = write_tiny_model(tmp_path / "tiny")
    plain = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if before == "bytes":
        plain.post_processor = hf.processors.ByteLevel(trim_offsets=False)
    if before == "template":
        plain.post_processor = hf.processors.TemplateProcessing(
            single="<|end|> $A", special_tokens=[("<|end|>", 0)]
        )
    Tokenizer._from_fast(plain, ["<|end|>"], "").save(tmp_path / "tokenizer")
    config = tmp_path / "tiny.yaml"
    config.write_bytes((folder / "config.yaml").read_bytes())
    source = find_source("scratch", config=str(config), tokenizer=tmp_path / "tokenizer")
    save(source, tmp_path / "saved", TASKS["mrpc"])
    wanted = Tokenizer.load(tmp_path / "tokenizer")
    assert (wanted._backend.blob != Tokenizer.load(folder)._backend.blob) == (before != "none")  # type: ignore[union-attr]
    for place in (tmp_path / "saved", tmp_path / "saved" / "tokenizer.json"):
        tokenizer = Tokenizer.load(place)
        assert tokenizer.hash == wanted.hash
        assert tokenizer.encode("the cat") == wanted.encode("the cat")
        assert Tokenizer.from_bytes(tokenizer.to_bytes()).hash == wanted.hash
    tuned = find_source(str(tmp_path / "saved"))
    assert tuned.encoder((FIRST, SECOND), LENGTH) == source.encoder((FIRST, SECOND), LENGTH)
    save(tuned, tmp_path / "again", TASKS["mrpc"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_a_broken_post_processor_is_named(tmp_path: Path) -> None:
    source = find_source(str(write_tiny_model(tmp_path / "tiny")))
    save(source, tmp_path / "saved", TASKS["mrpc"])
    file = tmp_path / "saved" / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"pretraining_post_processor": {"type": "Unknown"}}
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="is not a readable tokenizer"):
        Tokenizer.load(tmp_path / "saved")


def test_an_export_is_told_how_pairs_are_read(tmp_path: Path, auto: Any) -> None:
    """Its tokenizer closes no prompt; the card's lines make it that of a classifier, which keeps them when saved."""
    model = write_tiny_model(tmp_path / "tiny")
    exported = export_model(model, tmp_path / "export")
    assert PAIRS in (exported / "README.md").read_text(encoding="utf-8")
    tokenizer, _ = auto(exported)
    assert tokenizer("the cat")["input_ids"] == Tokenizer.load(model).encode("the cat")
    code = PAIRS.split("```")[1].removeprefix("python").replace("PATH_OR_ID", str(exported))
    names: dict[str, Any] = {}
    exec(code, names)
    names["tokenizer"].save_pretrained(tmp_path / "kept")
    kept = type(tokenizer).from_pretrained(tmp_path / "kept")
    rows = find_source(str(model)).encoder((FIRST[:2], SECOND[:2]), 128)
    for found in (names["tokenizer"](FIRST[:2], SECOND[:2]), kept(FIRST[:2], SECOND[:2])):
        assert found["input_ids"] == [row["input_ids"] for row in rows]
        assert found["token_type_ids"] == [row["token_type_ids"] for row in rows]


# ---- other commands


def refusal(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    capsys.readouterr()
    assert main([str(x) for x in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_classifier_is_refused_where_a_diffusion_model_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = find_source(str(write_tiny_model(tmp_path / "tiny")))
    tuned = tmp_path / "tuned"
    save(source, tuned, TASKS["mrpc"])
    for command in (
        ["generate", "{4}", "--model", tuned],
        ["evaluate", "--model", tuned, "--judge", "none", "--out", tmp_path / "results"],
        ["export", tuned, "--out", tmp_path / "out"],
        ["serve", "--model", tuned],
    ):
        line = refusal(capsys, *command)
        assert f"{tuned} is a fine-tuned classifier: load it with AutoModelFor" in line, command
        assert "`ddlm finetune --model`" in line


def test_a_baseline_is_refused_where_a_diffusion_model_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    baseline = tmp_path / "baseline"
    baseline.mkdir()
    (baseline / "plan.json").write_text("{}")
    (baseline / "config.json").write_text("{}")
    for command in (
        ["generate", "{4}", "--model", baseline],
        ["export", baseline, "--out", tmp_path / "out"],
        ["push", baseline, "--to", "me/tiny"],
    ):
        line = refusal(capsys, *command)
        assert f"{baseline} is an autoregressive baseline: load it with AutoModelForC" in line
        assert "`ddlm evaluate`" in line


# ---- code that a model brings


@pytest.mark.parametrize("part", ["config", "classifier"])
def test_a_strangers_code_is_neither_run_nor_asked_about(tmp_path: Path, part: str) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    from downstream.test_sources import VOCABULARY, write_auto

    folder, mark = tmp_path / "model", tmp_path / "mark"
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1
    )  # has no classifier in transformers
    write_auto(folder, MambaForCausalLM(config))
    content = json.loads((folder / "config.json").read_text())
    if part == "config":
        content |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.C"}}
    else:
        content |= {"auto_map": {"AutoModelForSequenceClassification": "strange.M"}}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "strange.py").write_text(
        f"open({str(mark)!r}, 'w').write('ran')\n"
        "from transformers import MambaConfig as C, MambaModel as M\n"
        "C.model_type = 'strange'\n"
    )
    code = "import sys; from ddlm.cli import main; sys.exit(main(sys.argv[1:]))"
    data = tmp_path / "data" / "cola"
    data.mkdir(parents=True)
    rows = "".join(json.dumps({"sentence": s, "label": i % 2}) + "\n" for i, s in enumerate(FIRST))
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text(rows)
    options = ["--task", "cola", "--model", folder, "--data", data.parent, "--out", tmp_path / "o"]
    command = [sys.executable, "-c", code, "finetune", *map(str, options), "--length", "32"]
    run = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert not mark.exists()
    assert "[y/N]" not in run.stdout + run.stderr
    (line,) = run.stderr.splitlines()
    assert f"{folder} needs code of its own, which ddlm does not run" in line
