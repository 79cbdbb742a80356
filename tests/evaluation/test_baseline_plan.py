"""What a baseline is matched to: sizes, tokens, optimisation; and folders of earlier plans."""

import json
import math
from dataclasses import asdict, replace

import pytest

from ddlm.checkpoint import save_model
from ddlm.cli import main
from ddlm.commands.baseline import baseline as command
from ddlm.config import Config
from ddlm.diffusion.process import NoiseProcess
from ddlm.evaluation import baseline
from ddlm.network.denoiser import DDLM
from ddlm.training.optim import learning_rate
from ddlm.types import ConfigError
from evaluation.small import baseline_config as small


def test_it_is_matched_in_size_and_tokens(shards):
    config = small()
    plan = baseline.make_plan(config, shards, "gpt-neox", None)
    assert plan.context == 64
    assert plan.batch * plan.context == config.train.batch * config.model.length
    for architecture in ("gpt-neox", "gpt2"):
        model = baseline.build(baseline.make_plan(config, shards, architecture, 16), shards.end_id)
        assert model.config.vocab_size == shards.vocab_size
        blocks = [
            p.numel() for n, p in model.named_parameters() if ".layers.0." in n or ".h.0." in n
        ]
        matrices = 4 * 32 * 32 + 2 * 32 * 64
        assert matrices < sum(blocks) < 1.1 * matrices


def test_it_matches_the_tokens_that_a_model_has_seen(shards, tmp_path):
    config = small(steps=1000)
    config.train.budget, config.train.warmup = 1.0, 0
    config.model.vocab_size, config.data.path = shards.vocab_size, str(shards.folder)
    model = str(tmp_path / "model")
    before = {"step": 2, "tokens_seen": 512, "flops": 1.0}
    network = DDLM(config.model, NoiseProcess(1.0, 10.0))
    save_model(
        model, network, config, step=3, provenance={"initial": before}, tokenizer_from=shards.folder
    )
    command(Config(), tmp_path / "gpt", "gpt2", 16, match=model)
    plan = baseline.read_plan(tmp_path / "gpt")
    assert (plan.steps, plan.budget, plan.lr) == (5, None, 3e-3)
    assert json.loads((tmp_path / "gpt" / "record.json").read_text())["results"]["tokens"] == 1280
    with pytest.raises(ConfigError, match="leave out one of the two"):
        command(small(), tmp_path / "other", match=model)
    save_model(tmp_path / "unknown", network, config, tokenizer_from=shards.folder)
    with pytest.raises(ConfigError, match="does not say how many updates it had"):
        command(Config(), tmp_path / "other", match=str(tmp_path / "unknown"))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6, 7, 11, 13])
@pytest.mark.parametrize("context", [16, 40, None])
def test_its_tokens_are_those_of_the_diffusion_model(shards, batch, context):
    config = small(steps=1001)
    config.train.batch, config.train.warmup = batch, 100
    plan = baseline.make_plan(config, shards, "gpt2", context)
    each = plan.batch * plan.context
    assert abs(plan.steps * each - 1001 * batch * 16) <= each / 2  # to the nearest whole step
    assert abs(plan.warmup * each - 100 * batch * 16) <= each / 2
    assert plan.matched_to == {"batch": batch, "steps": 1001, "warmup": 100}


def test_it_is_optimised_as_the_diffusion_model_is(shards):
    config = small()
    t = config.train
    t.betas, t.weight_decay, t.clip, t.final_lr = (0.8, 0.95), 0.07, 0.3, 0.25
    plan = baseline.make_plan(config, shards, "gpt-neox", None)
    assert (plan.betas, plan.weight_decay, plan.clip) == ((0.8, 0.95), 0.07, 0.3)
    groups = baseline._optimizer(baseline.build(plan, 0), plan).param_groups
    assert [g["betas"] for g in groups] == [(0.8, 0.95)] * 3
    assert [g["weight_decay"] for g in groups] == [0.07, 0.0, 0.07]
    clock = baseline._Clock(plan, before=0.0)
    assert clock.factor(plan.steps) == pytest.approx(0.25)
    t.warmup, t.steps = 500, 1000
    plan = baseline.make_plan(
        config, shards, "gpt2", config.model.length
    )  # step by step as its own
    for budget, seconds in ((None, 0.0), (8.0, 2.0)):
        t.budget = budget
        clock = baseline._Clock(replace(plan, budget=budget), before=seconds)
        for step in (0, 250, 500, 600, 999):
            wanted = learning_rate(t, step, seconds) / t.lr
            assert clock.factor(step) == pytest.approx(wanted, rel=1e-3)


def as_before(folder, plan):
    """A folder as it was begun when steps were the configuration's and four settings were constants."""
    old = asdict(plan) | {k: plan.matched_to[k] for k in ("steps", "warmup")}
    for name in ("betas", "weight_decay", "clip", "final_lr", "matched_to", "decay_from"):
        del old[name]
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(old))


def test_a_folder_from_before_goes_on_as_it_was_begun(shards, tmp_path):
    config = small(steps=4)
    config.train.batch = 5
    plan = baseline.make_plan(config, shards, "gpt2", 64)
    as_before(tmp_path / "gpt", plan)
    assert (plan.steps, plan.weight_decay) == (5, 0.0)
    assert baseline.has_plan(tmp_path / "gpt", plan)
    assert baseline.train_baseline(plan, shards, tmp_path / "gpt")["steps"] == 4
    kept = baseline.read_plan(tmp_path / "gpt")
    assert (kept.betas, kept.weight_decay, kept.clip, kept.final_lr) == (
        (0.9, 0.98),
        0.01,
        1.0,
        0.0,
    )
    config.train.steps = 5
    other = baseline.make_plan(config, shards, "gpt2", 64)
    assert not baseline.has_plan(tmp_path / "gpt", other)
    with pytest.raises(ConfigError, match=r"another baseline \(steps: 4, wanted 5\)"):
        baseline.train_baseline(other, shards, tmp_path / "gpt")


def test_a_context_longer_than_the_text_claims_no_folder(shards, tmp_path, capsys):
    """Given a shorter one the same command goes on in the same folder."""
    data = (
        "--data.path",
        str(shards.folder),
        "--model.length",
        "16",
        "--out",
        str(tmp_path / "gpt"),
    )
    assert main(["baseline", *data, "--context", "1000000"]) == 2
    assert "fewer than one sequence of 1000000" in capsys.readouterr().err
    assert not (tmp_path / "gpt").exists()


def test_without_held_out_text_no_number_is_printed(shards, tmp_path, monkeypatch, capsys):
    found = {"parameters": 10, "tokens": 20, "held_out_nll": math.nan, "held_out_tokens": 0}
    monkeypatch.setattr(baseline, "train_baseline", lambda plan, shards, out, dtype: found)
    config = small()
    config.data.path = str(shards.folder)
    monkeypatch.setattr(
        baseline, "read_plan", lambda out: baseline.make_plan(config, shards, "gpt2", 32)
    )
    command(config, out=tmp_path / "gpt", context=32)
    line = capsys.readouterr().out
    assert line.endswith("20 tokens, no held-out text of 32 tokens to measure it on\n")
