from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ddlm.downstream.models import find_source
from ddlm.downstream.speed import _bert_config, compare, main
from ddlm.types import ConfigError
from downstream.test_finetune import SETTING, made_up
from downstream.tiny import write_tiny_model


def test_the_bert_has_no_dropout_as_the_ddlm_has_none(tmp_path: Path) -> None:
    config = _bert_config(find_source(str(write_tiny_model(tmp_path / "tiny"))))
    assert config.hidden_dropout_prob == 0.0
    assert config.attention_probs_dropout_prob == 0.0


def test_a_round_without_a_step_to_time_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    setting = dataclasses.replace(SETTING, epochs=1, batch=8)
    with pytest.raises(ConfigError, match="of 8 are 3 steps, at least 4 are needed"):
        compare(str(folder), made_up("mrpc", 24), setting, rounds=1)
    found: dict[str, Any] = compare(str(folder), made_up("mrpc", 32), setting, rounds=1)
    assert found["wall"]["ratio"] > 0, "four steps: one is timed"
    capsys.readouterr()
    command = ["--model", str(folder), "--data", str(tmp_path), "--task", "rte"]
    assert main([*command, "--precision", "fp32"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'rte'} is not there")


def test_both_models_are_timed_in_turns(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    setting = dataclasses.replace(SETTING, epochs=1, batch=8)
    found: dict[str, Any] = compare(str(folder), made_up("mrpc", 64), setting, rounds=2)
    for kind in ("wall", "cpu"):
        assert len(found[kind]["ratios"]) == 2
        assert all(r > 0 for r in found[kind]["ratios"])
    # V*D embeddings, two blocks, time embedding, input, norms, segments and head, counted by hand
    w, d, c, v, f = 32, 16, 16, 300, 64
    block = 2 * (c * 2 * w) + (w * 3 * w + 3 * w) + (w * w + w) + (w * f + f) + (f * w + w)
    rest = 2 * (c * c + c) + ((3 * d + 1) * w + w) + c * 2 * w
    head = 2 * d + (w * w + w) + (2 * w + 2)
    assert found["parameters_in_use"]["ddlm"] == v * d + 2 * block + rest + head
