"""Weights kept on the way through the main model's training, for the curves of figure1."""

import json
from pathlib import Path

import pytest
import torch

from ddlm.config import Config
from ddlm.data.shards import TokenShards
from ddlm.diffusion.process import NoiseProcess
from ddlm.network.denoiser import DDLM
from ddlm.reproduce import recipes, traces
from ddlm.reproduce.items import listing
from ddlm.reproduce.milestones import MOST, Milestones, gib, milestones
from ddlm.reproduce.recipes import MAIN, find
from ddlm.reproduce.workshop import Workshop
from reproduce.test_reproduce import shop, small_config  # noqa: F401 - a fixture


def names(run: Path) -> list[int]:
    return [int(p.name[5:]) for p in milestones(run)]


def test_they_are_few_and_evenly_spaced_however_long_the_training(shards, tmp_path):
    config = small_config(None)
    config.model.vocab_size = TokenShards(shards).vocab_size
    model = DDLM(config.model, NoiseProcess(config.process.t_min, config.process.t_max))
    keep = Milestones(tmp_path, config, shards)
    for step in range(100, 2001, 100):
        if step == 1300:  # another process goes on with the training
            keep = Milestones(tmp_path, config, shards)
            keep(model, 1200)  # which was written before
        keep(model, step)
        found = names(tmp_path)
        apart = found[0]
        assert found == list(range(apart, step + 1, apart))
        assert len(found) <= MOST
        assert len(found) >= MOST // 2 or step < 400
    assert found == [400, 800, 1200, 1600, 2000]
    assert gib(2**28) == 8.0


def test_figure_1_has_a_curve_for_each_of_them(shop, monkeypatch):  # noqa: F811
    def often(source: str, overrides: dict[str, object] | None = None) -> Config:
        config = small_config(source, overrides or ())
        config.train.checkpoint_every, config.train.eval_every = 2, 0
        return config

    monkeypatch.setattr(recipes, "load_config", often)
    again = {k: v for k, v in vars(shop).items() if not k.startswith("_")}
    mine = Workshop(**again | {"steps": 20, "judge": "none", "features": "none"})
    mine.train(find("figure1"))
    run = mine.main_folder
    assert names(run) == [4, 8, 12, 16, 20]
    monkeypatch.setattr(traces, "SEQUENCES", 2)
    monkeypatch.setattr(traces, "STEPS", 3)
    paths, what = traces.trace_checkpoints(mine)
    assert [p.header["label"] for p in paths] == [f"step {i}" for i in (4, 8, 12, 16, 20)]
    assert what == f"Curves: 5 checkpoints of the run folder {run.name}"
    assert not torch.equal(*(torch.tensor(p.values("entropy")) for p in paths[:2]))
    other = {**MAIN, "mask": "random"}
    folder = mine.training_folder("model", other)
    mine._train_model(other, folder, None)
    assert names(folder) == []
    # A model that was finished by an earlier version is still the one that is wanted.
    file = run / "finished.json"
    assert "train.sample_every" in (content := json.loads(file.read_text()))["wanted"]["config"]
    assert content["wanted"]["config"]["train.sample_every"] == 0


@pytest.mark.parametrize("scale", ["tiny", "base"])
def test_the_list_counts_their_disk(scale):
    heads, lines = listing(scale)
    disk = {line[0]: line[heads.index("GiB disk")] for line in lines}
    size = recipes.SIZES[scale].gib
    trainings = 2 if scale == "tiny" else 1  # a judge is trained, too
    assert float(disk["figure1"]) > trainings * size + 0.1
    # table7's two models: random and span masking, the latter is the main model
    assert float(disk["table7"]) > 2 * size + 0.1
    assert disk["table1"] == "-"
