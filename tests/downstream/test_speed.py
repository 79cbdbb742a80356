from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest

from ddlm.checkpoint import save_model
from ddlm.data.tokenizer import Tokenizer
from ddlm.diffusion.process import NoiseProcess
from ddlm.downstream.finetune import Setting
from ddlm.downstream.models import find_source
from ddlm.downstream.speed import _bert_config, _bert_like, compare, main
from ddlm.network.denoiser import DDLM
from ddlm.types import ConfigError
from downstream.test_finetune import SETTING, made_up
from downstream.tiny import sentences, tiny_config, write_tiny_model


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


def test_the_precision_is_that_of_the_processor_which_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("ddlm.device.has_bf16", lambda device: device.type == "cuda")
    monkeypatch.setattr("ddlm.downstream.speed.read_task", lambda *a: None)

    def timed(model: str, data: None, setting: Setting, rounds: int) -> None:
        raise ConfigError(f"in {setting.precision}")

    monkeypatch.setattr("ddlm.downstream.speed.compare", timed)
    output = io.StringIO()
    with contextlib.redirect_stderr(output):
        assert main(["--model", "m", "--data", "d", "--precision", "auto"]) == 2
    assert output.getvalue() == "error: in fp32\n"


def model_with(folder: Path, file: str, content: bytes) -> Path:
    """A random DDLM with a tokenizer from elsewhere."""
    place = folder / "tokenizer"
    place.mkdir(parents=True)
    (place / file).write_bytes(content)
    Tokenizer.load(place / file).save(folder / "saved")
    config = tiny_config(Tokenizer.load(folder / "saved").vocab_size)
    model = DDLM(config.model, NoiseProcess(config.process.t_min, config.process.t_max))
    return save_model(folder / "model", model, config, tokenizer_from=folder / "saved")


def test_a_tokenizer_with_another_end_token_is_shared(tmp_path: Path) -> None:
    Tokenizer.train(sentences(200), 300).save(tmp_path / "ours")
    text = (tmp_path / "ours" / "tokenizer.json").read_text(encoding="utf-8")
    content = text.replace("<|end|>", "</s>").encode()
    source = find_source(str(model_with(tmp_path / "other", "tokenizer.json", content)))
    texts = (["the cat sees a river"], ["no dog"])
    (tmp_path / "bert").mkdir()
    bert = _bert_like(source, made_up("mrpc", 32), tmp_path / "bert")
    rows = [s.encoder(texts, 64)[0]["input_ids"] for s in (source, bert)]
    assert rows[0] == rows[1]


def test_a_tokenizer_that_transformers_reads_otherwise_is_one_line(tmp_path: Path) -> None:
    pieces = pytest.importorskip("sentencepiece", reason="the extra `data` is not installed")
    blob = io.BytesIO()
    pieces.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)),
        model_writer=blob,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder = model_with(tmp_path / "other", "tokenizer.model", blob.getvalue())
    setting = dataclasses.replace(SETTING, epochs=1, batch=8)
    with pytest.raises(ConfigError, match=r"give a BERT the tokenizer of model \("):
        compare(str(folder), made_up("mrpc", 32), setting, rounds=1)


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
