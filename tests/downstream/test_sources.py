"""Models of transformers and fine-tuned DDLMs as sources: padding, labels, positions, what cannot be fine-tuned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ddlm.cli import main
from ddlm.data.tokenizer import Tokenizer
from ddlm.downstream.finetune import _collator
from ddlm.downstream.glue import TASKS
from ddlm.downstream.models import find_source
from ddlm.integrations.transformers import DDLMForSequenceClassification
from ddlm.types import ConfigError
from downstream.test_command import data  # noqa: F401 - a fixture
from downstream.tiny import sentences, write_tiny_model

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
VOCABULARY = 303


def write_auto(folder: Path, model: Any, **tokens: str) -> Path:
    """A random model with a tokenizer of 300 pieces and the special tokens that are named."""
    from transformers import PreTrainedTokenizerFast

    Tokenizer.train(sentences(200), 300).save(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|end|>", **tokens
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def bert(folder: Path, positions: int = 64) -> Path:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY, intermediate_size=16, max_position_embeddings=positions, **SIZES
    )
    model = BertModel(config)
    return write_auto(folder, model, sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]")


def roberta(folder: Path, positions: int = 66) -> Path:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=VOCABULARY, intermediate_size=16, max_position_embeddings=positions, **SIZES
    )
    model = RobertaModel(config)
    return write_auto(folder, model, sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]")


def opt(folder: Path, **tokens: str) -> Path:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY,
        word_embed_proj_dim=16,
        ffn_dim=16,
        max_position_embeddings=64,
        pad_token_id=300,
        **SIZES,
    )
    return write_auto(folder, OPTForCausalLM(config), **tokens)


def bloom(folder: Path, **tokens: str) -> Path:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=VOCABULARY, hidden_size=16, n_head=2, n_layer=1, pad_token_id=300
    )
    return write_auto(folder, BloomForCausalLM(config), **tokens)


@pytest.mark.parametrize("write", [opt, bloom])
@pytest.mark.parametrize("tokens", [{"pad_token": "<pad>"}, {}])
def test_a_decoders_answer_does_not_depend_on_the_batch(
    tmp_path: Path, write: Any, tokens: dict[str, str]
) -> None:
    """Its configuration names a padding token; the tokenizer has the same one, or none."""
    source = find_source(str(write(tmp_path / "model", **tokens)))
    assert source.encoder.pad_id == (300 if tokens else 0)
    torch.manual_seed(0)
    model = source.classifier(TASKS["mrpc"], None, "mean", True).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rows = source.encoder((["a cat", "the red dog sees a river"], ["no dog", "no cat"]), 64)
    collate = _collator(source.encoder.pad_id, TASKS["mrpc"])
    batches = [collate([{**row, "labels": 0} for row in part]) for part in (rows, rows[:1])]
    together, alone = (
        model(b["input_ids"], attention_mask=b["attention_mask"]).logits for b in batches
    )
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


# ---- a fine-tuned DDLM


def test_a_saved_ddlm_is_whole(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = find_source(str(write_tiny_model(tmp_path / "tiny")))
    torch.manual_seed(0)
    model: Any = source.classifier(TASKS["rte"], 5.0, "mean", True)
    torch.nn.init.normal_(model.segment.weight)
    source.save(model, tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    padded = tokenizer(["the cat", "the red dog sees a river"], padding=True)
    assert len({len(ids) for ids in padded["input_ids"]}) == 1
    again: Any = DDLMForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert again.config.id2label == {0: "entailment", 1: "not_entailment"}
    assert again.config.label2id == {"entailment": 0, "not_entailment": 1}
    assert again.config.pad_token_id == tokenizer.pad_token_id == 0
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_saved_ddlm_is_fine_tuned_on_another_task(tmp_path: Path) -> None:
    source = find_source(str(write_tiny_model(tmp_path / "tiny")))
    model: Any = source.classifier(TASKS["rte"], 5.0, "mean", True)
    torch.nn.init.normal_(model.denoiser.embedding)
    source.save(model, tmp_path / "saved")
    tuned = find_source(str(tmp_path / "saved"))
    assert tuned.label == "saved"
    assert tuned.has_time
    assert tuned.fingerprint != source.fingerprint
    further: Any = tuned.classifier(TASKS["mnli"], 1.0, "mean", True)
    assert further.classifier.out.weight.shape[0] == 3
    for name, value in model.denoiser.state_dict().items():
        assert torch.equal(further.denoiser.state_dict()[name], value), name
    file = tmp_path / "saved" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ConfigError, match="is damaged"):
        find_source(str(tmp_path / "saved"))


def test_a_saved_model_of_transformers_is_one_again(tmp_path: Path) -> None:
    source = find_source(str(bert(tmp_path / "bert")))
    model: Any = source.classifier(TASKS["mnli"], None, "mean", True)
    source.save(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "manifest.json").is_file()
    again: Any = find_source(str(tmp_path / "saved")).classifier(TASKS["mnli"], None, "mean", True)
    assert again.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}


# ---- what cannot be fine-tuned, said before the first run


def gpt2(folder: Path) -> Path:
    from downstream.test_models import write_gpt2

    return write_gpt2(folder)


def without_weights(folder: Path) -> Path:
    (bert(folder) / "model.safetensors").unlink()
    return folder


def mamba(folder: Path) -> Path:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1)
    return write_auto(folder, MambaForCausalLM(config))


def three_classes(folder: Path) -> Path:
    source = find_source(str(bert(folder.with_name("plain"))))
    source.save(source.classifier(TASKS["mnli"], None, "mean", True), folder)
    return folder


@pytest.mark.parametrize(
    "write, options, message",
    [
        (bert, [], "positions for 64 tokens: give --length 64 or less"),
        (gpt2, [], "positions for 64 tokens: give --length 64 or less"),
        (roberta, ["--length", 66], "--length 66 is too long for model"),
        (without_weights, ["--length", 64], "cannot be fine-tuned on rte: Error no file named"),
        (mamba, [], "cannot be fine-tuned on rte: Unrecognized configuration class"),
        (three_classes, ["--length", 64], "rte: it is a classifier of other classes"),
        (bert, ["--length", 64, "--pooling", "pair"], "--pooling pair is for a DDLM"),
        (bert, ["--length", 64, "--no-segments"], "--no-segments is for a DDLM"),
        (bert, ["--tokenizer", "/nonexistent"], "--tokenizer is for --model scratch"),
    ],
)
def test_what_cannot_be_fine_tuned_fails_in_one_line_before_training(
    data: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write: Any,
    options: list[Any],
    message: str,
) -> None:
    folder = write(tmp_path / "model")
    command = ["finetune", "--task", "rte", "--model", folder, "--data", data]
    fast = ["--batch", 16, "--lr", 1e-3, "--seeds", 1, "--epochs", 1, "--device", "cpu"]
    capsys.readouterr()
    status = main([str(x) for x in [*command, "--out", tmp_path / "out", *fast, *options]])
    stderr = capsys.readouterr().err.strip()
    assert status == 2
    assert message in stderr
    assert "\n" not in stderr
    assert not (tmp_path / "out").exists()


def test_the_longest_input_that_fits_is_taken(tmp_path: Path) -> None:
    for write, length in ((bert, 64), (gpt2, 64), (roberta, 64), (opt, 64), (bloom, 200)):
        source = find_source(str(write(tmp_path / "model")))
        for task in ("cola", "rte", "stsb"):
            source.check(TASKS[task], length, "mean", True)
        shutil.rmtree(tmp_path / "model")
