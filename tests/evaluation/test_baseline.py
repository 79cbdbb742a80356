"""The autoregressive baseline: trained by transformers, resumable, sampled precisely, never judging its own data."""

import json
import shutil
from dataclasses import replace
from functools import cached_property

import numpy as np
import pytest
import torch

from ddlm.evaluation import baseline, progress
from ddlm.evaluation.autoregressive import (
    draw,
    held_out_loss,
    load_baseline,
    sample_autoregressive,
)
from ddlm.evaluation.judges import Judge
from ddlm.files import read_tensors
from ddlm.types import ConfigError, DataError
from evaluation.small import baseline_config as small


def loss_of(model, shards, plan):
    return held_out_loss(model, shards, context=plan.context, batch=plan.batch)[0]


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("baseline") / "gpt"
    plan = baseline.make_plan(small(), shards, "gpt-neox", None)
    return out, plan, baseline.train_baseline(plan, shards, out)


def test_gradients_are_clipped_where_the_configuration_says(shards, tmp_path):
    """Adam's updates have no size of their own until gradients are below its epsilon: then nothing moves."""
    config = small(steps=5)
    config.train.clip = 1e-14
    plan = baseline.make_plan(config, shards, "gpt2", 16)
    torch.manual_seed(plan.seed)
    untrained = baseline.build(plan, shards.end_id)
    baseline.train_baseline(plan, shards, tmp_path / "gpt")
    moved = load_baseline(tmp_path / "gpt").cpu()
    for a, b in zip(untrained.parameters(), moved.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_published_baselines_plan_is_read(root):
    plan = baseline.read_plan(root / "models" / "ddlm-tiny-ar")
    assert (plan.steps, plan.optimizer, plan.weight_decay) == (9000, "muon", 0.0)


def test_thirds_of_a_fused_matrix_are_not_queries_keys_and_values(shards):
    """Why Muon takes GPT-NeoX's whole: its rows are read head by head."""
    plan = baseline.make_plan(small(), shards, "gpt-neox", None)
    width, heads = plan.model["width"], plan.model["heads"]

    def mixed(values):
        """Largest entry of what attention mixes, without the rows that would make the values."""
        attention = (model := baseline.build(plan, 0)).gpt_neox.layers[0].attention
        seen = []
        attention.dense.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        with torch.no_grad():
            attention.query_key_value.weight[values] = 0
            model(input_ids=torch.arange(8)[None])
        return float(seen[0].abs().max())

    rows = torch.arange(3 * width)
    assert mixed(rows.view(heads, 3, -1)[:, 2].flatten()) == 0
    assert mixed(rows.view(3, -1)[2]) > 0


def test_training_lowers_the_loss_and_saves_a_folder_that_judges(trained, shards, tmp_path):
    out, plan, results = trained
    untrained = loss_of(baseline.build(plan, shards.end_id), shards, plan)
    assert results["held_out_nll"] < untrained - 1
    assert results["tokens"] == 30 * plan.batch * plan.context
    judge = Judge(str(out), cache=tmp_path)
    assert judge.context == 64
    assert judge.trained_on()["documents"] == shards.documents("train")
    text = shards.tokenizer.decode(shards.document("val", 0)[:20].tolist())
    ids = [shards.end_id, *shards.tokenizer.encode(text)]
    model = load_baseline(out)
    expected = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.detach()
    score = judge.score([text])[0]
    assert score.nll / score.tokens == pytest.approx(float(expected), rel=1e-5)


def test_a_judge_trained_here_refuses_its_own_documents(trained, shards, tmp_path):
    judge = Judge(str(trained[0]), cache=tmp_path)
    judge.check_held_out(shards.document_hashes("val").tolist())
    with pytest.raises(DataError, match="a judge never scores what it was trained on"):
        judge.check_held_out(shards.document_hashes("train")[:2].tolist(), "the prompts")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    shards, tmp_path, monkeypatch, trained, optimizer
):
    plan, whole = trained[1:]
    if optimizer == "muon":
        plan = replace(plan, optimizer="muon")
        whole = baseline.train_baseline(plan, shards, tmp_path / "whole")
    steps = []
    over = baseline._Clock.over

    class StopError(Exception):
        pass

    def stop(self):
        steps.append(1)
        if len(steps) == 15:  # a checkpoint was written at 6 and 12 steps
            raise StopError
        return False

    monkeypatch.setattr(baseline._Clock, "over", property(stop))
    with pytest.raises(StopError):
        baseline.train_baseline(plan, shards, tmp_path / "gpt")
    assert not baseline.is_finished(tmp_path / "gpt")
    monkeypatch.setattr(baseline._Clock, "over", over)
    resumed = baseline.train_baseline(plan, shards, tmp_path / "gpt")
    assert resumed["steps"] == 30
    assert resumed["held_out_nll"] == pytest.approx(whole["held_out_nll"], abs=1e-5)


def unfinish(out):
    """As if it had been killed after its last checkpoint."""
    for name in ("trained_on.json", "trained_on.safetensors", "model.safetensors", "config.json"):
        (out / name).unlink()


def test_what_was_killed_after_its_last_checkpoint_is_finished(shards, tmp_path):
    out = tmp_path / "gpt"
    plan = baseline.make_plan(small(steps=3), shards, "gpt2", 16)
    whole = baseline.train_baseline(plan, shards, out)
    unfinish(out)
    again = baseline.train_baseline(plan, shards, out)
    assert baseline.is_finished(out)
    assert again["steps"] == 3
    for key in ("tokens", "held_out_nll", "parameters"):
        assert again[key] == pytest.approx(whole[key])
    assert loss_of(load_baseline(out), shards, plan) == pytest.approx(whole["held_out_nll"])


def test_what_was_killed_after_its_time_makes_no_further_step(shards, tmp_path):
    out = tmp_path / "gpt"
    config = small(steps=10)
    config.train.budget = 1000.0
    plan = baseline.make_plan(config, shards, "gpt2", 16)
    baseline.train_baseline(plan, shards, out)
    unfinish(out)
    shutil.rmtree(out / "checkpoints" / "checkpoint-10")  # what is left is 8 steps, and no time
    (out / "checkpoints" / "clock.json").write_text('{"elapsed": 1000.5}')
    assert baseline.train_baseline(plan, shards, out)["steps"] == 8


def test_without_a_compiler_it_trains_uncompiled(shards, tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("on CUDA no C++ compiler is needed")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    config = small(steps=2)
    config.train.compile = True
    plan = baseline.make_plan(config, shards, "gpt2", 16)
    assert baseline.train_baseline(plan, shards, tmp_path / "gpt")["steps"] == 2
    assert "no C++ compiler" in capsys.readouterr().out
    assert baseline.has_plan(tmp_path / "gpt", plan)  # where there is one it goes on compiled


def test_a_budget_ends_the_training_on_time(shards, tmp_path):
    config = small(steps=100_000)
    config.train.budget = 2.0
    results = baseline.train_baseline(
        baseline.make_plan(config, shards, "gpt2", 16), shards, tmp_path / "gpt"
    )
    assert results["steps"] < 10_000
    assert results["seconds"] < 20
    factor = baseline._Clock(baseline.make_plan(config, shards, "gpt2", 16), before=2.0).factor(200)
    assert factor == pytest.approx(0, abs=1e-6)


def test_progress_is_of_what_ends_the_training(shards, tmp_path, monkeypatch, capsys):
    config = small(steps=10**6)
    config.train.budget = 1
    plan = baseline.make_plan(config, shards, "gpt2", None)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    baseline.train_baseline(plan, shards, tmp_path / "gpt")
    found = capsys.readouterr()
    told = found.err.splitlines()
    assert told[-1].startswith("training, seconds: 1 of 1")
    assert all(line.startswith("training, seconds: ") for line in told), "no bar of transformers"
    assert "{'loss'" not in found.out
    clock = baseline._Clock(replace(plan, steps=100), before=0.25)
    assert clock.progress(90) == ("training, steps", 90, 100)
    clock = baseline._Clock(replace(plan, budget=None), before=0.0)
    assert clock.progress(7) == ("training, steps", 7, plan.steps)


def test_a_context_shorter_than_a_sample_is_refused(shards):
    with pytest.raises(ConfigError, match=r"context 8 is shorter than model.length, the 16 tokens"):
        baseline.make_plan(small(), shards, "gpt2", 8)
    assert baseline.make_plan(small(), shards, "gpt2", 16).context == 16


def test_several_visible_gpus_do_not_multiply_the_batch(shards, tmp_path, monkeypatch):
    """The Trainer counts two devices, as on a machine with two GPUs; the batch stays that of the plan."""
    import transformers

    real = transformers.TrainingArguments._setup_devices.func

    def two(self):
        device = real(self)
        self._n_gpu = 2
        return device

    once = cached_property(two)
    once.__set_name__(transformers.TrainingArguments, "_setup_devices")
    monkeypatch.setattr(transformers.TrainingArguments, "_setup_devices", once)
    sizes = []
    forward = transformers.GPT2LMHeadModel.forward

    def noting(self, *args, **options):
        if self.training:
            sizes.append(len(options["input_ids"]))
        return forward(self, *args, **options)

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", noting)
    plan = baseline.make_plan(small(steps=3), shards, "gpt2", 16)
    assert baseline.train_baseline(plan, shards, tmp_path / "gpt")["steps"] == 3
    assert sizes == [plan.batch] * 3


def test_another_training_is_not_overwritten(trained, shards, tmp_path):
    out, plan, _ = trained
    other = baseline.make_plan(small(steps=31), shards, "gpt-neox", None)
    with pytest.raises(ConfigError, match=r"another baseline \(steps: 30, wanted 31\)"):
        baseline.train_baseline(other, shards, out)
    (tmp_path / "file").write_text("something")
    with pytest.raises(ConfigError, match="not empty and holds no baseline"):
        baseline.train_baseline(plan, shards, tmp_path)


def test_samples_depend_on_their_own_seed_and_keep_the_prompt(trained, shards):
    model = load_baseline(trained[0])
    tokens = torch.from_numpy(shards.read("val", 0, 48)).reshape(3, 16)
    noised = torch.zeros(3, 16, dtype=torch.bool)
    noised[:, 6:] = True
    out = sample_autoregressive(model, tokens, noised, [5, 6, 7], start=shards.end_id)
    assert torch.equal(out[:, :6], tokens[:, :6])
    alone = sample_autoregressive(model, tokens[1:2], noised[1:2], [6], start=shards.end_id)
    assert torch.equal(alone[0], out[1])
    noised[:, -1] = False
    with pytest.raises(ConfigError, match="cannot fill in a middle"):
        sample_autoregressive(model, tokens, noised, [1, 2, 3], start=shards.end_id)


def test_draws_follow_the_probabilities():
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2]], dtype=torch.float64)
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = np.bincount(draw(p.expand(20_000, 4).contiguous(), u).numpy(), minlength=4) / 20_000
    np.testing.assert_allclose(share, p[0].numpy(), atol=0.012)
    assert share[1] == 0
    edges = draw(p.expand(2, 4).contiguous(), torch.tensor([0.0, 1.0 - 1e-16], dtype=torch.float64))
    assert edges.tolist() == [0, 3]


def test_sampling_equals_the_models_own_probabilities(trained, shards):
    """The first token over many seeds follows softmax(logits) of the model itself."""
    model = load_baseline(trained[0])
    n = 4000
    tokens, noised = torch.zeros(n, 1, dtype=torch.long), torch.ones(n, 1, dtype=torch.bool)
    out = sample_autoregressive(model, tokens, noised, list(range(n)), start=shards.end_id)
    start = torch.tensor([[shards.end_id]], device=model.device)
    p = torch.softmax(model(input_ids=start).logits[0, -1].detach().cpu().double(), -1)
    share = torch.bincount(out[:, 0], minlength=len(p)) / n
    assert float((share - p).abs().max()) < 0.04


def test_the_note_of_what_it_was_trained_on_is_whole(trained, shards):
    note = json.loads((trained[0] / "trained_on.json").read_text())
    stored = read_tensors(trained[0] / "trained_on.safetensors")["hashes"]
    hashes = stored.numpy().view(np.uint64)
    assert note["data"] == shards.hash
    assert sorted(shards.document_hashes("train").tolist()) == hashes.tolist()


def test_a_tokenizer_that_transformers_reads_differently_is_refused_before_training(
    shared_data, tmp_path
):
    from ddlm.data.prepare import prepare
    from ddlm.data.shards import TokenShards
    from evaluation.small import sentences

    spiece = shared_data / "tokenizers" / "t5" / "spiece.model"
    if not spiece.is_file():
        pytest.skip("needs T5's SentencePiece model in ../shared/data/tokenizers")
    lines = [json.dumps({"text": " ".join(sentences(6, seed=i))}) for i in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    prepare(
        str(tmp_path / "text.jsonl"),
        tmp_path / "s",
        tokenizer=str(spiece),
        val_fraction=0.2,
        processes=1,
    )
    shards = TokenShards(tmp_path / "s")
    plan = baseline.make_plan(small(), shards, "gpt2", 16)
    with pytest.raises(ConfigError, match="does not read the tokenizer"):
        baseline.train_baseline(plan, shards, tmp_path / "gpt")
