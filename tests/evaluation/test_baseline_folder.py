"""The folder of a baseline: one command at a time holds it, and its weights have the type that was asked for."""

import json

import pytest
import torch

from ddlm.cli import main
from ddlm.data.shards import TokenShards
from ddlm.evaluation import baseline
from ddlm.evaluation.autoregressive import held_out_loss, load_baseline, saved_dtype
from ddlm.evaluation.judges import Judge
from ddlm.files import read_tensors
from ddlm.training.distributed import World
from ddlm.training.saving import held
from evaluation.small import baseline_config as small
from evaluation.small import sentences


def command(shards, out, *more):
    sizes = {"layers": 2, "heads": 2, "width": 32, "feed_forward": 64, "length": 16}
    train = {"steps": 5, "batch": 16, "warmup": 1, "precision": "fp32"}
    settings = {f"model.{k}": v for k, v in sizes.items()} | {
        f"train.{k}": v for k, v in train.items()
    }
    options = [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
    data = ["--data.path", str(shards.folder), "--context", "16", "--out", str(out)]
    return ["baseline", *data, *options, *more]


def refused(capsys, argv):
    capsys.readouterr()
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


class Asking(TokenShards):
    """What a second command answers is noted when the first one comes to its end."""

    def __init__(self, folder, ask):
        super().__init__(folder)
        self.ask, self.said = ask, []

    def document_hashes(self, split):
        self.said.append(self.ask())
        return super().document_hashes(split)


def test_two_commands_do_not_share_a_folder(shards, tmp_path, capsys):
    out = tmp_path / "gpt"
    asking = Asking(shards.folder, lambda: refused(capsys, command(shards, out)))
    plan = baseline.make_plan(small(steps=2), shards, "gpt2", 16)
    baseline.train_baseline(plan, asking, out)
    ways = "wait for it, stop it, or name another folder"
    assert asking.said == [f"error: another process is training in {out}: {ways}"]
    assert main(command(shards, tmp_path / "other")) == 0


def test_it_is_kept_out_of_the_folder_of_a_run(shards, tmp_path, capsys):
    with held(tmp_path / "run", World(0, 1, torch.device("cpu"))):
        line = refused(capsys, command(shards, tmp_path / "run"))
    assert line.startswith(f"error: another process is training in {tmp_path / 'run'}: ")


def test_finished_weights_in_bfloat16(shards, tmp_path, capsys):
    out = tmp_path / "gpt"
    assert main(command(shards, out, "--dtype", "bfloat16")) == 0
    assert {t.dtype for t in read_tensors(out / "model.safetensors").values()} == {torch.bfloat16}
    (checkpoint, *_) = (out / "checkpoints").glob("checkpoint-*")
    kept = read_tensors(checkpoint / "model.safetensors")
    assert {t.dtype for t in kept.values()} == {torch.float32}
    results = json.loads((out / "record.json").read_text())["results"]
    assert results["dtype"] == "bfloat16"
    loss, _ = held_out_loss(load_baseline(out), shards, context=16, batch=16)
    assert results["held_out_nll"] == pytest.approx(loss, abs=1e-6)
    # the same command has nothing left to do, one that asks for other weights is not ignored
    capsys.readouterr()
    assert main(command(shards, out, "--dtype", "bfloat16")) == 0
    assert "is finished already" in capsys.readouterr().out
    line = refused(capsys, command(shards, out))
    assert "finished already, with weights in bfloat16 and not in float32: give --dtype" in line


def test_what_is_finished_in_bfloat16_is_evaluated_and_judges(shards, tmp_path):
    out = tmp_path / "gpt"
    assert main(command(shards, out, "--dtype", "bfloat16")) == 0
    few = ["--prompts", "4", "--continuations", "1", "--no-sanity"]
    model = ["--model", str(out), "--data", str(shards.folder), "--out", str(tmp_path / "measured")]
    assert main(["evaluate", *model, "--judge", "none", "--features", "none", *few]) == 0
    record = json.loads((tmp_path / "measured/record.json").read_text())
    assert record["results"]["rows"][0]["facts"]["samples"] > 0
    assert record["results"]["curves"], "without --no-curves there are some"
    assert Judge(str(out), cache=tmp_path).score(sentences(1, words=3))[0].nll > 0


def test_weights_are_float32_unless_asked_otherwise(shards, tmp_path):
    assert main(command(shards, tmp_path / "gpt")) == 0
    assert saved_dtype(tmp_path / "gpt") == "float32"
    assert saved_dtype(tmp_path) is None
