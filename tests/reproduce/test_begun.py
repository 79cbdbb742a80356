"""Trainings that were interrupted, and are asked for again with other settings."""

import json

import pytest

from ddlm.reproduce import recipes
from ddlm.reproduce.checks import check
from ddlm.reproduce.milestones import Milestones
from ddlm.reproduce.recipes import find
from ddlm.reproduce.trainings import DONE
from ddlm.reproduce.workshop import Workshop
from ddlm.types import ConfigError
from reproduce.test_reproduce import again, shop, small_config  # noqa: F401 - a fixture

ITEM = find("table8")


@pytest.fixture
def begun(shop, monkeypatch):  # noqa: F811
    """A training of 20 updates that was stopped after its first checkpoint."""

    def stop(self, model, step):
        raise KeyboardInterrupt

    mine = again(shop, steps=20)
    with monkeypatch.context() as patch:
        patch.setattr(Milestones, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            mine.train(ITEM)
    assert [p.name for p in mine.main_folder.glob("checkpoints/step-*")] == ["step-5"]
    return mine


def other_rate(source, overrides=()):
    config = small_config(source, overrides)
    config.train.lr = 5e-4
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 15}, "with --steps 20, wanted is 15: name another --out"),
        ({"steps": None, "budget": 40.0}, "with --steps 20, wanted is unset"),
        ({"lr": 5e-4}, "with train.lr 0.001, wanted is 0.0005"),
    ],
)
def test_a_begun_training_of_other_settings_is_not_gone_on_with(
    changes, message, begun, monkeypatch
):
    if "lr" in changes:
        monkeypatch.setattr(recipes, "load_config", other_rate)
        changes = {}
    for refuse in (lambda s: check(s, [ITEM]), lambda s: s.train(ITEM)):
        with pytest.raises(ConfigError, match=message):
            refuse(again(begun, **changes))
    assert not (begun.main_folder / DONE).exists()


def test_the_same_command_goes_on(begun):
    begun.train(ITEM)
    found = json.loads((begun.main_folder / DONE).read_text())
    assert (found["steps"], found["wanted"]["steps"]) == (20, 20)


def test_what_left_no_checkpoint_binds_nobody(shop, monkeypatch):  # noqa: F811
    seconds = []

    def fail(self, train, folder, share):
        seconds.append(self._kept_share(folder, share))
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        raise ConfigError("no memory")

    monkeypatch.setattr(Workshop, "_train_model", fail)
    for changes in ({"steps": 20}, {"budget": 40.0}, {"budget": 50.0}):
        with pytest.raises(ConfigError, match="no memory"):
            again(shop, **{"steps": None} | changes).train(ITEM)
    assert seconds == [None, 40.0, 50.0]
