"""Files that were cut off, and options or folders that cannot be used, end in one line before anything is measured."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from ddlm.cli import main
from ddlm.commands.evaluate import evaluate, load_generator
from ddlm.evaluation import baseline
from ddlm.evaluation.autoregressive import load_baseline
from ddlm.evaluation.judges import TRAINED_HASHES, TRAINED_ON, Judge, count_seen
from ddlm.evaluation.mauve import Featurizer
from ddlm.evaluation.samples import Sample, write_samples
from ddlm.files import write_tensors
from ddlm.reproduce.subjects import count_parameters, read_subject
from ddlm.types import ConfigError
from evaluation.small import baseline_config, sentences


@pytest.fixture
def truncated(judge_folder, tmp_path):
    folder = shutil.copytree(judge_folder, tmp_path / "truncated")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


def test_truncated_weights_are_named(truncated, tmp_path):
    judge = Judge(str(truncated), cache=tmp_path)
    with pytest.raises(ConfigError, match=f"cannot load the judge {truncated}"):
        judge.score(["a river"])
    with pytest.raises(ConfigError, match=f"the feature model {truncated} cannot be loaded"):
        Featurizer(str(truncated), cache=tmp_path)
    with pytest.raises(ConfigError, match=f"cannot load {truncated}"):
        load_baseline(truncated)
    with pytest.raises(ConfigError, match=r"model.safetensors is damaged"):
        count_parameters(truncated)


@pytest.fixture
def planned(shards, judge_folder, tmp_path):
    """What `ddlm baseline` leaves, its weights aside."""
    folder = shutil.copytree(judge_folder, tmp_path / "gpt")
    plan = baseline.make_plan(baseline_config(), shards, "gpt2", None)
    baseline._note_training_data(folder, shards, {"tokens": 640})
    (folder / "plan.json").write_text(json.dumps(vars(plan)))
    return folder, plan


@pytest.mark.parametrize("content", ['{"length": 64}', '{"context": 64, "len', "[]", "\x00\x01"])
def test_a_damaged_plan_is_named(planned, content):
    folder, plan = planned
    assert read_subject(folder.parent, "gpt").values["tokens"] == 640
    (folder / "plan.json").write_text(content)
    with pytest.raises(ConfigError, match=r"plan.json is damaged"):
        load_generator(str(folder))
    with pytest.raises(ConfigError, match=r"plan.json is damaged"):
        baseline.read_plan(folder)
    with pytest.raises(ConfigError, match=r"plan.json is damaged"):
        read_subject(folder.parent, "gpt")
    if "64}" not in content:  # what is read is another plan
        with pytest.raises(ConfigError, match=r"plan.json is damaged"):
            baseline.has_plan(folder, plan)


def test_a_plan_with_other_fields_is_named(planned):
    folder, _ = planned
    plan = json.loads((folder / "plan.json").read_text())
    assert baseline.read_plan(folder).length == plan["length"]
    for wrong in (plan | {"colour": 1}, plan | {"betas": None}, plan | {"length": "64"}):
        (folder / "plan.json").write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match=r"plan.json is damaged"):
            baseline.read_plan(folder)
    del plan["lr"]
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match=r"plan.json is damaged .*lr"):
        baseline.read_plan(folder)


def test_a_damaged_note_of_the_training_data_is_named(planned, tmp_path):
    folder, _ = planned
    assert Judge(str(folder), cache=tmp_path).trained_on()["tokens"] == 640
    (folder / TRAINED_ON).write_text('{"documents": 3}')
    with pytest.raises(ConfigError, match=r"trained_on.json is damaged \('tokens' is missing"):
        read_subject(folder.parent, "gpt")
    (folder / TRAINED_ON).write_text('{"docu')
    with pytest.raises(ConfigError, match=r"trained_on.json is damaged \(it is no JSON object\)"):
        read_subject(folder.parent, "gpt")
    # Before a sample is drawn or scored, not when the record is written.
    with pytest.raises(ConfigError, match=r"trained_on.json is damaged"):
        Judge(str(folder), cache=tmp_path)


@pytest.mark.parametrize("tensors", [{}, {"hashes": torch.zeros(2)}])
def test_damaged_hashes_of_the_training_data_are_named(planned, tensors):
    folder, _ = planned
    assert count_seen(folder, [1]) == 0
    write_tensors(folder / TRAINED_HASHES, tensors)
    with pytest.raises(
        ConfigError, match=r"trained_on.safetensors is damaged \(it has no 'hashes'"
    ):
        count_seen(folder, [1])


def test_a_folder_that_cannot_be_written_is_refused_before_anything_else(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    made = tmp_path / "made.jsonl"
    write_samples(made, [Sample(t) for t in sentences(5)])
    for out in (file, file / "below"):
        with pytest.raises(ConfigError, match=f"--out {out}: {file} is no folder: name another"):
            evaluate(samples=made, judge="no-such-judge", out=out)
        # The model is not there either: it is not looked for first.
        with pytest.raises(ConfigError, match=f"--out {out}: {file} is no folder: name another"):
            evaluate(model="no-such-model", out=out)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples").write_text("in the way")
    with pytest.raises(ConfigError, match=r"out/samples is no folder"):
        evaluate(model="no-such-model", out=tmp_path / "out")


@pytest.mark.parametrize("protocol", ["paper", "quick"])
@pytest.mark.parametrize("curves", ["--curves", "--no-curves"])
def test_options_of_a_protocol_are_refused_beside_samples(tmp_path, capsys, protocol, curves):
    """Also where they say what holds without them."""
    made = tmp_path / "made.jsonl"
    write_samples(made, [Sample(t) for t in sentences(5)])
    with_samples = ["evaluate", "--samples", str(made), "--judge", "none", "--out", str(tmp_path)]
    for option in (["--protocol", protocol], [curves]):
        assert main([*with_samples, *option]) == 2
        wanted = f"error: {option[0]} goes with --model, and --samples was given: leave it out\n"
        assert capsys.readouterr().err == wanted
    assert main(with_samples) == 0
