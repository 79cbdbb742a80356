"""Runs of the harness on a small question with a known answer: does the sentence hold the word "no"?"""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from ddlm.downstream.finetune import Outcome, Setting, _optimizer, finetune, predict
from ddlm.downstream.glue import TASKS, GlueData, Split
from ddlm.downstream.models import Source, find_source
from ddlm.downstream.search import Grid, Study, median_rule
from ddlm.types import ConfigError
from downstream.test_models import write_gpt2
from downstream.tiny import sentences, write_tiny_model

SETTING = Setting(batch=16, lr=3e-3, time=1.0, seed=1, epochs=6)


def split(count: int, seed: int, task: str = "cola") -> Split:
    texts = sentences(2 * count, seed)
    labels = [float(" no " in f" {t[:-1]} ") for t in texts]
    positive = [i for i, x in enumerate(labels) if x][: count // 2]
    negative = [i for i, x in enumerate(labels) if not x][: count // 2]
    rows = sorted(positive + negative)
    chosen = [texts[i] for i in rows]
    pair = (chosen,) if len(TASKS[task].columns) == 1 else (chosen, ["a cat"] * len(rows))
    return Split(pair, [labels[i] for i in rows], list(range(len(rows))))


def made_up(task: str = "cola", count: int = 160) -> GlueData:
    splits = {
        name: split(n, s, task)
        for s, (name, n) in enumerate([("train", count), ("validation", 60), ("test", 40)])
    }
    return GlueData(TASKS[task], splits, ["made up"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return find_source(str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")))


def test_a_ddlm_learns_and_the_best_epoch_predicts(source: Source) -> None:
    data = made_up("mrpc")
    told: list[float] = []
    outcome = finetune(
        source,
        data,
        SETTING,
        progress=lambda share, _: told.append(share),
        predict_test=True,
        keep_model=True,
        device="cpu",
    )
    assert [e["epoch"] for e in outcome.history] == [1, 2, 3, 4, 5, 6]
    assert outcome.best["accuracy"] == max(e["accuracy"] for e in outcome.history)
    assert outcome.best["accuracy"] > 0.85, outcome.history
    assert told == sorted(told)
    assert told[-1] == 1.0
    test = data.splits["test"]
    assert len(outcome.predictions["test"]) == len(test)
    right = [p == y for p, y in zip(outcome.predictions["test"], test.labels, strict=True)]
    assert sum(right) / len(right) >= 0.7, "predictions come in the order of the split"
    # the kept weights are those of the best epoch
    assert outcome.model is not None
    rows = source.encoder(data.splits["validation"].texts, 128)
    again = predict(
        outcome.model, [{**r, "labels": 0} for r in rows], data.task, source.encoder.pad_id, SETTING
    )
    hits = [p == y for p, y in zip(again, data.splits["validation"].labels, strict=True)]
    assert sum(hits) / len(hits) == pytest.approx(outcome.best["accuracy"])


def test_a_run_is_a_function_of_its_seed(source: Source) -> None:
    short = dataclasses.replace(SETTING, epochs=2)
    a, b = (finetune(source, made_up(count=48), short, device="cpu") for _ in range(2))
    other = finetune(
        source, made_up(count=48), dataclasses.replace(short, seed=2), device="cpu", keep_model=True
    )
    drop = {"tokens_per_second"}
    strip = lambda o: [{k: v for k, v in e.items() if k not in drop} for e in o.history]  # noqa: E731
    assert strip(a) == strip(b)
    same = finetune(
        source, made_up(count=48), dataclasses.replace(short, seed=2), device="cpu", keep_model=True
    )
    assert other.model is not None
    assert same.model is not None
    for x, y in zip(other.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_regression_learns(source: Source) -> None:
    data = made_up("stsb")
    splits = {
        n: Split(s.texts, [4.0 * x + 0.1 * (i % 5) for i, x in enumerate(s.labels)], s.index)
        for n, s in data.splits.items()
    }
    longer = dataclasses.replace(SETTING, epochs=15)
    outcome = finetune(source, GlueData(TASKS["stsb"], splits, ["made up"]), longer, device="cpu")
    assert outcome.best["pearson"] > 0.7, outcome.history


def test_bf16_learns_too(source: Source) -> None:
    outcome = finetune(source, made_up(), dataclasses.replace(SETTING, precision="bf16"))
    assert outcome.best["matthews"] > 0.6, outcome.history


def test_a_decoder_goes_through_the_same_loop(tmp_path: Path) -> None:
    gpt2 = find_source(str(write_gpt2(tmp_path / "gpt2")))
    setting = dataclasses.replace(SETTING, time=None, epochs=8, lr=1e-2)
    outcome = finetune(gpt2, made_up("mrpc"), setting, device="cpu")
    assert outcome.best["accuracy"] > 0.6, outcome.history


def test_a_diverged_run_says_so(source: Source) -> None:
    outcome = finetune(
        source, made_up(count=48), dataclasses.replace(SETTING, lr=1e30), device="cpu"
    )
    assert outcome.diverged
    assert len(outcome.history) < SETTING.epochs


def test_layer_decay_slows_lower_layers(source: Source) -> None:
    model = source.classifier(TASKS["cola"], 1.0, "mean", True)
    setting = dataclasses.replace(SETTING, lr=1.0, layer_decay=0.5)
    optimizer, _ = _optimizer(model, setting, torch.device("cpu"))
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    names = {n: rate.get(id(p)) for n, p in model.named_parameters()}
    assert names["classifier.out.weight"] == 1.0
    assert names["denoiser.transformer.blocks.1.attention.qkv.weight"] == 0.5
    assert names["denoiser.transformer.blocks.0.attention.qkv.weight"] == 0.25
    assert names["denoiser.embedding"] == 0.125
    assert names["segment.weight"] == 1.0, "new, though it is added to the embeddings"
    assert names["denoiser.transformer.output_norm.film.weight"] == 1.0
    assert names["denoiser.head.weight"] is None, "the head of pretraining is not trained"
    decay = {g["weight_decay"] for g in optimizer.param_groups}
    assert decay == {0.0, SETTING.weight_decay}


def _neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForSequenceClassification

    return GPTNeoXForSequenceClassification(
        GPTNeoXConfig(
            vocab_size=300,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )


def _opt() -> Any:
    from transformers import OPTConfig, OPTForSequenceClassification

    return OPTForSequenceClassification(
        OPTConfig(
            vocab_size=300,
            hidden_size=16,
            word_embed_proj_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=16,
        )
    )


@pytest.mark.parametrize(
    "make, above, first, below",
    [
        (
            _neox,
            ["gpt_neox.final_layer_norm.weight", "score.weight"],
            "gpt_neox.layers.0.mlp.dense_h_to_4h.weight",
            ["gpt_neox.embed_in.weight"],
        ),
        (
            _opt,
            ["model.decoder.final_layer_norm.weight", "score.weight"],
            "model.decoder.layers.0.final_layer_norm.weight",
            ["model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"],
        ),
    ],
)
def test_layer_decay_spares_the_last_norm(
    make: Any, above: list[str], first: str, below: list[str]
) -> None:
    model = make()
    setting = dataclasses.replace(SETTING, lr=1.0, layer_decay=0.5)
    optimizer, _ = _optimizer(model, setting, torch.device("cpu"))
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    names = {n: rate[id(p)] for n, p in model.named_parameters()}
    assert [names[n] for n in above] == [1.0, 1.0]
    assert names[first] == 0.25
    assert {names[n] for n in below} == {0.125}


def test_the_history_holds_what_its_docstring_names(source: Source) -> None:
    text = (Outcome.__doc__ or "").partition("history:")[2].partition("best:")[0]
    named = set(re.findall(r"``(\w+)``", text)) - {"metric"}
    short = dataclasses.replace(SETTING, epochs=1)
    (entry,) = finetune(source, made_up("mrpc", 32), short, device="cpu").history
    assert named == {"epoch", "tokens_per_second"}
    assert set(entry) == named | set(TASKS["mrpc"].metrics)


# ---- the search


def test_median_rule() -> None:
    finished = [[0.1, 0.5, 0.4], [0.2, 0.3, 0.6], [0.3, 0.1, 0.9]]
    stop = median_rule(finished, epochs=10)
    assert not stop(2, 0.0), "three tenths of the epochs are safe"
    assert stop(3, 0.59), "medians of 0.5, 0.6, 0.9 after three epochs"
    assert not stop(3, 0.6)
    assert stop(3, float("nan"))
    assert not median_rule(finished[:2], epochs=10)(9, 0.0), "three finished runs are needed"


def test_search_seeds_and_resumption(source: Source, tmp_path: Path) -> None:
    runs: list[str] = []

    def tell(run: str, share: float, line: str) -> None:
        if run not in runs:
            runs.append(run)

    base = dataclasses.replace(SETTING, epochs=2)
    grid = Grid(batch=[16], lr=[1e-5, 3e-3], time=[1, 10], base=base)
    study = Study(source, made_up("mrpc", 96), tmp_path / "tiny" / "mrpc-subset", "cpu", tell)
    summary = study.run(grid, 2, prune=True, predict_test=False, save=None)
    names = {p.relative_to(study.folder).as_posix() for p in study.folder.rglob("*.json")}
    best = summary["setting"]
    assert names == {
        *(f"search/batch16-lr{lr}-t{t}-seed0.json" for lr in ("1e-05", "0.003") for t in (1, 10)),
        *(f"final/batch16-lr{best['lr']:g}-t{best['time']:g}-seed{s}.json" for s in (1, 2)),
        "summary.json",
    }
    search = [json.loads(p.read_text()) for p in (study.folder / "search").iterdir()]
    top = max(search, key=lambda r: r["results"]["best"]["accuracy"])
    assert top["results"]["best"]["accuracy"] == max(
        r["results"]["best"]["accuracy"] for r in search if r["config"]["lr"] == best["lr"]
    )
    assert "median" in search[0]["pruning"]
    accuracy = summary["metrics"]["accuracy"]
    assert len(accuracy["values"]) == 2
    assert accuracy["mean"] == pytest.approx(sum(accuracy["values"]) / 2)
    assert len(runs) == 6

    # one record lost: only that run is made again
    (
        study.folder / "final" / next(n for n in names if n.startswith("final")).partition("/")[2]
    ).unlink()
    runs.clear()
    again = study.run(grid, 2, prune=True, predict_test=False, save=None)
    assert len(runs) == 1
    assert again["metrics"]["accuracy"]["values"] == pytest.approx(accuracy["values"])

    other = find_source("scratch", config=str(_folder_of(tmp_path)), name="tiny")
    with pytest.raises(ConfigError, match="is of another model: choose another --name or --out"):
        dataclasses.replace(study, source=other).run(
            grid, 1, prune=True, predict_test=False, save=None
        )
    longer = dataclasses.replace(grid, base=dataclasses.replace(base, epochs=3))
    with pytest.raises(ConfigError, match="made with other settings or data"):
        study.run(longer, 1, prune=True, predict_test=False, save=None)


def test_without_pruning_a_pruned_run_is_made_again(source: Source, tmp_path: Path) -> None:
    base = dataclasses.replace(SETTING, epochs=4)
    grid = Grid(batch=[16], lr=[3e-3, 1e-3, 5e-4, 1e-7], time=[1], base=base)
    study = Study(source, made_up("mrpc", 48), tmp_path / "tiny" / "mrpc-subset", "cpu")
    study.run(grid, 1, prune=True, predict_test=False, save=None)

    def pruned() -> dict[str, bool]:
        files = sorted((study.folder / "search").iterdir())
        return {p.name: json.loads(p.read_text())["results"]["pruned"] for p in files}

    def times() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in (study.folder / "search").iterdir()}

    stopped, before = {n for n, p in pruned().items() if p}, times()
    assert stopped == {"batch16-lr1e-07-t1-seed0.json"}
    summary = study.run(grid, 1, prune=False, predict_test=False, save=None)
    assert not any(pruned().values())
    assert not summary["pruned"]
    assert {n for n, t in times().items() if t != before[n]} == stopped
    # whole runs serve a search with pruning as well
    after = times()
    study.run(grid, 1, prune=True, predict_test=False, save=None)
    assert times() == after


def test_other_data_of_equal_size_is_refused(source: Source, tmp_path: Path) -> None:
    data = made_up("mrpc", 48)
    grid = Grid(batch=[16], lr=[3e-3], time=[1], base=dataclasses.replace(SETTING, epochs=1))
    study = Study(source, data, tmp_path / "tiny" / "mrpc-subset", "cpu")
    study.run(grid, 1, prune=True, predict_test=False, save=None)
    train = data.splits["train"]
    turned = Split(train.texts, [1 - x for x in train.labels], train.index)
    other = Study(
        source, GlueData(data.task, {**data.splits, "train": turned}, ["made up"]), study.folder
    )
    with pytest.raises(ConfigError, match="made with other settings or data"):
        other.run(grid, 1, prune=True, predict_test=False, save=None)
    # a folder from before the hash was kept: sizes are compared, as they were
    (record,) = (study.folder / "final").iterdir()
    content = json.loads(record.read_text())
    assert set(content.pop("data_sha256")) == set(data.splits)
    record.write_text(json.dumps(content))
    (study.folder / "summary.json").unlink()
    other.run(grid, 1, prune=True, predict_test=False, save=None)


def test_several_visible_gpus_do_not_multiply_the_batch(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer counts two devices, as on a machine with two GPUs: a run has as many updates as with one."""
    import transformers

    real = transformers.TrainingArguments._setup_devices.func

    def two(self: Any) -> torch.device:
        device: torch.device = real(self)
        self._n_gpu = 2
        return device

    once = cached_property(two)
    once.__set_name__(transformers.TrainingArguments, "_setup_devices")
    monkeypatch.setattr(transformers.TrainingArguments, "_setup_devices", once)
    told: list[float] = []

    def tell(share: float, line: str) -> None:
        if not line:
            told.append(share)

    short = dataclasses.replace(SETTING, epochs=1)
    finetune(source, made_up(count=48), short, progress=tell, device="cpu")
    assert len(told) == 3


def _folder_of(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "again")
