"""Configurations: strict in every way in, one line out, nothing lost on the way through YAML."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ddlm.config import (
    Config,
    check_config,
    config_from_dict,
    config_to_dict,
    dump_config,
    load_config,
    read_config,
    shipped_configs,
)
from ddlm.settings import convert
from ddlm.types import ConfigError


def refused(*overrides: str, source: Any = None) -> str:
    """The message with which settings are refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_are_read_as_the_fields_types() -> None:
    config = load_config(
        None,
        [
            "train.lr=1e-3",
            "train.steps=2e3",
            "train.betas=[0.9, 0.95]",
            "train.budget=30",
            "train.micro_batch=null",
            "time.warp=True",
            "mask.strategy=prefix",
            "data.path=2024",
        ],
    )
    assert (config.train.lr, config.train.steps) == (1e-3, 2000)
    assert isinstance(config.train.steps, int)
    assert isinstance(config.train.budget, float)
    assert config.train.betas == (0.9, 0.95)
    assert config.train.micro_batch is None
    assert config.time.warp is True
    assert config.mask.strategy == "prefix"
    assert config.data.path == "2024"


def test_whole_numbers_keep_every_digit() -> None:
    large = 2**62 + 1
    assert load_config(None, {"train.seed": large}).train.seed == large
    assert load_config(None, [f"train.seed={large}"]).train.seed == large


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.lrr=1", "did you mean 'train.lr'?"),
        ("lr=1", "did you mean 'time.lr' or 'train.lr'?"),
        ("model.lr=1", "did you mean 'time.lr' or 'train.lr'?"),
        ("trian.steps=1", "did you mean 'train.steps' or 'sample.steps'?"),
        ("quite.else=1", "unknown setting 'quite.else'"),
        ("model=3", "unknown setting 'model'"),
        ("train.lr=abc", "train.lr is 'abc', it must be a number"),
        ("train.lr=nan", "train.lr is 'nan', it must be a number"),
        ("train.steps=1.5", "train.steps is '1.5', it must be a whole number"),
        ("train.steps=inf", "train.steps is 'inf', it must be a whole number"),
        ("train.steps=true", "it must be a whole number"),
        ("time.warp=1", "it must be true or false"),
        ("train.betas=0.9", "it must be a list of 2 numbers"),
        ("sample.solver=eulr", "one of euler, heun, dpmpp_2m, sde; did you mean 'euler'?"),
        ("train.budget=soon", "it must be a number"),
        ("train.lr=" + "9" * 400, "it must be a number of at most 2e+308"),
        ("train.lr", "write it as in train.lr=1e-3"),
    ],
)
def test_a_wrong_override_is_refused_with_what_is_needed(override: str, said: str) -> None:
    message = refused(override)
    if override.startswith("trian"):  # either section has such a leaf
        assert "did you mean" in message
    else:
        assert said in message


@pytest.mark.parametrize(
    "overrides, said",
    [
        (
            ("process.t_min=10",),
            "process.t_min is 10.0, it must be below process.t_max, which is 10.0",
        ),
        (("process.t_min=11",), "below process.t_max"),
        (("process.t_min=0",), "above 0"),
        (("model.heads=3",), "model.width is 1024, it must be a multiple of 2 x model.heads (6)"),
        (("model.layers=0",), "model.layers is 0, it must be at least 1"),
        (("train.lr=-1",), "train.lr is -1.0, it must be above 0"),
        (("train.betas=0.9,1.0",), "train.betas"),
        (("train.ema=1",), "in [0, 1)"),
        (("train.budget=0",), "or null"),
        (("sample.temperature=0.0001",), "sample.temperature is 0.0001, it must be 0.001 or more"),
        (("sample.temperature=inf",), "0.001 or more"),
        (("process.t_max=inf",), "process.t_max is inf, it must be a finite number"),
        (("sample.noise_scale=inf",), "0 or more and finite"),
        (("time.lr=inf",), "above 0 and finite"),
        (("train.weight_decay=inf",), "0 or more and finite"),
        (
            ("sample.steps=10000000",),
            "sample.steps is 10000000, it must be between 1 and 1,000,000",
        ),
    ],
)
def test_values_that_cannot_work_are_refused(overrides: tuple[str, ...], said: str) -> None:
    assert said in refused(*overrides)


@pytest.mark.parametrize(
    "text, said",
    [
        ("train:\n  lr: 1.0e-3\n  lrr: 1\n", "unknown setting 'train.lrr' in "),
        ("modle:\n  layers: 3\n", "did you mean 'model"),
        ("train:\n  lr: 1\n  steps: 3\n  lr: 2\n", "line 4: the key 'lr' occurs twice"),
        ("train: 3\n", "train is 3 in"),
        ("- a\n", "needed are sections"),
        ("train:\n  lr: [1\n", "line"),
        ("train:\n  lr: !!python/name:os.system\n", "line 2"),
        ("train:\n  lr: true\n", "it must be a number"),
        ("train: " + "[" * 3000, "is not YAML"),
        ("model:\n  layers: '3 '\n  width: x\n", "model.width is 'x'"),
    ],
)
def test_a_wrong_file_is_refused_naming_it(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    message = refused(source=path)
    assert said in message
    assert "mine.yaml" in message


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"data:\n  path: caf\xe9\n")
    assert "not UTF-8 (byte 17)" in refused(source=path)


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    assert "did you mean 'tiny'?" in refused(source="tinny")
    assert "shipped configurations: " in refused(source=tmp_path / "nothing.yaml")


def test_a_file_wins_over_nothing_and_loses_to_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  lr: 1e-3\n  steps: 7\n")
    config = load_config(path, ["train.lr=5e-4"])
    assert (config.train.lr, config.train.steps) == (5e-4, 7)
    assert load_config(tmp_path.joinpath(path)) == read_config(path)
    path.rename(tmp_path / "config.yaml")
    assert (
        load_config(tmp_path, {"train.lr": 5e-4}) == config
    )  # a run folder stands for its configuration


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == Config()
    assert load_config() == Config()


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_shipped_configurations_load_and_survive_a_dump(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert read_config(write(tmp_path, dump_config(config))) == config
    assert config_from_dict(config_to_dict(config)) == config


def test_configurations_are_shipped() -> None:
    assert {"tiny", "small", "base"} <= set(shipped_configs())


@settings(max_examples=200, deadline=None)
@given(st.text(), st.floats(allow_nan=False), st.integers())
@example("\x85\u2028 é\n: #", 1e-5, 2**63)
def test_any_value_survives_yaml_bit_for_bit(text: str, number: float, whole: int) -> None:
    """What a run dumps is what a later one reads, whatever the text or the number."""
    config = Config()
    config.data.path, config.train.lr, config.train.seed = text, number, whole
    back = yaml.safe_load(dump_config(config))
    assert convert(back["data"]["path"], str, "") == text
    assert convert(back["train"]["lr"], float, "") == number
    assert convert(back["train"]["seed"], int, "") == whole


def test_every_field_is_documented_and_checked() -> None:
    """Help comes from the fields' docstrings: a new field without one is noticed here."""
    import docstring_parser

    for section in dataclasses.fields(Config):
        kind = type(getattr(Config(), section.name))
        documented = {
            p.arg_name for p in docstring_parser.parse_from_object(kind).params if p.description
        }
        assert {f.name for f in dataclasses.fields(kind)} <= documented, kind
    check_config(Config())


def test_numbers_of_yaml_are_read_as_people_read_them(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train: {steps: 010, batch: 0x10, seed: 1_000, lr: 1e-3}")
    train = read_config(file).train
    assert (train.steps, train.batch, train.seed, train.lr) == (10, 16, 1000, 1e-3)
    for text in ("steps: 1:30", "lr: 1:30.5"):
        file.write_text(f"train: {{{text}}}")
        with pytest.raises(ConfigError, match="is '1:30"):
            read_config(file)


def test_values_of_other_kinds_become_plain_ones() -> None:
    config = Config()
    config.train.batch, config.train.lr = np.int64(8), np.float32(0.5)  # type: ignore[assignment]
    config.data.path = Path("shards")  # type: ignore[assignment]
    check_config(config)
    assert (type(config.train.batch), type(config.train.lr)) == (int, float)
    assert config.data.path == "shards"
    config.train.batch = "many"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"train\.batch is 'many', it must be a whole number"):
        check_config(config)


def test_a_configuration_made_in_python_is_written_with_plain_values() -> None:
    config = Config()
    config.train.seed, config.train.lr = np.int64(8), np.float32(0.5)  # type: ignore[assignment]
    config.data.path = Path("shards")  # type: ignore[assignment]
    values = config_to_dict(config)
    assert (values["train"]["seed"], values["train"]["lr"]) == (8, 0.5)
    assert values["data"]["path"] == "shards"
    config.train.betas = 0.9  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"train\.betas is 0\.9, it must be a list"):
        dump_config(config)
