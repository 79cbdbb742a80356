"""The sampler of a study: every KL in its traces, a solver and a temperature other than the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddlm.analysis.paper import what_was_run
from ddlm.analysis.trajectories import Trajectories
from ddlm.checkpoint import load_model, save_model
from ddlm.config import SampleConfig
from ddlm.lm import load
from ddlm.sampling import halting
from ddlm.studied import StudiedLM
from ddlm.study import Recording, Study, labels_of
from ddlm.types import ConfigError
from sampling.models import write_model

SEQUENCES, STEPS = 6, 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that samples with another solver and temperature than the paper's."""
    home = tmp_path_factory.mktemp("model")
    own = SampleConfig(solver="sde", temperature=0.8, refine=1)
    loaded = load_model(write_model(home, 16, sample=own))
    loaded.model.head.weight.data.mul_(8)  # surer of its tokens: the KL falls while they settle
    return save_model(
        home / "surer", loaded.model, loaded.config, tokenizer_from=home / "tokenizer"
    )


def recorded(model: Path, out: Path, **options: Any) -> Trajectories:
    """The trajectories of a study, and nothing beside them."""
    recording = Recording(Study(str(model), out, sequences=SEQUENCES, device="cpu", **options))
    recording._labels = labels_of([model])
    recording._trajectories(model, STEPS, 1.0)
    return Trajectories.load(out / "records" / recording._name(model, STEPS, 1.0))


@pytest.mark.parametrize("template", [None, "the river {6} sea"])
def test_kl_exits_of_a_study_are_those_of_the_engine(
    template: str | None, model: Path, tmp_path: Path
) -> None:
    t = recorded(model, tmp_path, template=template)
    values = t.values("kl")
    assert np.isfinite(values[:, 1:]).all()
    lm, spread = load(model, device="cpu"), set()
    # lowest so far: each is a threshold that ends some sequence at another step
    known = np.unique(np.fmin.accumulate(values, 1)[:, 1:])
    for q in (0.05, 0.3, 0.6, 0.9):
        i = int(q * (len(known) - 1))
        threshold = float((known[i] + known[i + 1]) / 2)
        real = lm.generate(
            template or "{16}", SEQUENCES, STEPS, halt=halting.KLBelow(threshold), refine=0
        )
        exits = t.exit_steps("kl", threshold)
        assert exits.tolist() == [g.steps for g in real]
        assert t.tokens_at(exits).tolist() == [g.tokens for g in real]
        spread |= set(exits.tolist())
    assert len(spread) > 3  # or the comparison would say nothing


def test_the_sampler_is_the_models_own_unless_it_is_named(model: Path, tmp_path: Path) -> None:
    own = recorded(model, tmp_path / "own")
    assert f"{STEPS} SDE steps on a uniform grid, t from 5 to 0.5, temperature 0.8" in what_was_run(
        own
    )
    t = recorded(model, tmp_path / "named", solver="dpmpp_2m", temperature=0.7)
    assert "DPM-Solver++(2M) steps" in what_was_run(t)
    assert "temperature 0.7" in what_was_run(t)
    assert t.header["settings"]["solver"] == t.header["config"]["sample"]["solver"] == "dpmpp_2m"
    assert t.header["settings"]["temperature"] == 0.7
    assert (
        StudiedLM(load(model, device="cpu"), SampleConfig(solver="heun")).plain.config.sample.solver
        == "heun"
    )
    lm = load(model, device="cpu")
    for drawn, chosen in ((own, {}), (t, {"solver": "dpmpp_2m", "temperature": 0.7})):
        real = lm.generate("{16}", SEQUENCES, STEPS, refine=0, **chosen)
        assert drawn.tokens[:, -1].tolist() == [g.tokens for g in real]
    assert not np.array_equal(own.tokens, t.tokens)


def test_a_study_goes_on_with_the_sampler_it_was_begun_with(model: Path, tmp_path: Path) -> None:
    recorded(model, tmp_path)
    recorded(model, tmp_path, solver="sde", temperature=0.8)  # the model's own
    with pytest.raises(ConfigError, match="was recorded with other solver: give another --out"):
        recorded(model, tmp_path, solver="euler")
    with pytest.raises(ConfigError, match="was recorded with other temperature: give another"):
        recorded(model, tmp_path, temperature=1.0)
    with pytest.raises(ConfigError, match="temperature"):
        recorded(model, tmp_path / "new", temperature=0.0)
    assert not (tmp_path / "new").exists()
