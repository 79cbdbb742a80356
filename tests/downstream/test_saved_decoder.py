"""A fine-tuned decoder's folder reads text in transformers as the harness did; a DDLM's is taken from the hub, too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ddlm.downstream.finetune import _collator
from ddlm.downstream.glue import TASKS
from ddlm.downstream.models import find_source
from ddlm.types import ConfigError
from downstream.test_models import write_gpt2
from downstream.test_saved import FIRST, LENGTH, SECOND, save
from downstream.test_sources import opt, write_auto
from downstream.tiny import write_tiny_model

SIZES = {"vocab_size": 303, "layers": 1, "heads": 2, "width": 16, "feed_forward": 16}


def neox(folder: Path) -> Path:
    """As `ddlm baseline` writes it: an end token alone, no post-processor."""
    from ddlm.evaluation.autoregressive import untrained

    return write_auto(folder, untrained("gpt-neox", SIZES, 64, bos_token_id=0, eos_token_id=0))


def gpt2(folder: Path) -> Path:
    """Of GPT-2's own tokenizer class."""
    from transformers import GPT2Tokenizer

    write_gpt2(folder)
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|end|>")
    pairs = [tuple(x) for x in model["merges"]]
    GPT2Tokenizer(vocab=model["vocab"], merges=pairs, **ends).save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    """A tokenizer that begins every text with a token, pads and cuts on the left, and has a token for padding."""
    import tokenizers as hf
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=303,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
    )
    sides = {"padding_side": "left", "truncation_side": "left"}
    write_auto(folder, LlamaForCausalLM(config), bos_token="<s>", pad_token="<pad>", **sides)
    file = folder / "tokenizer.json"
    tokenizer = hf.Tokenizer.from_file(str(file))
    begins = {"single": "<s> $A", "pair": "<s> $A <s> $B:1"}
    number = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        **begins, special_tokens=[("<s>", number)]
    )
    tokenizer.save(str(file))
    return folder


def opt_padded(folder: Path) -> Path:
    return opt(folder, pad_token="<pad>")


@pytest.mark.parametrize("write", [neox, gpt2, llama, opt_padded])
@pytest.mark.parametrize("texts", [(FIRST,), (FIRST, SECOND)], ids=["single", "pair"])
def test_transformers_answers_as_the_harness(
    tmp_path: Path, write: Any, texts: tuple[list[str], ...]
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = find_source(str(write(tmp_path / "model")))
    task = TASKS["cola" if len(texts) == 1 else "mrpc"]
    model = save(source, tmp_path / "saved", task)
    rows = source.encoder(texts, LENGTH)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    batch = _collator(source.encoder.pad_id, task)([{**row, "labels": 0} for row in rows])
    del batch["labels"]
    padded = tokenizer(*texts, truncation=True, padding=True, return_tensors="pt")
    assert padded.keys() == batch.keys(), "no segments"
    for name, value in batch.items():
        assert torch.equal(padded[name], value), name
    assert batch["input_ids"].shape[1] == LENGTH, "some are cut"
    with torch.no_grad():
        expected, logits = model(**batch).logits, theirs(**padded).logits
    torch.testing.assert_close(logits, expected)
    assert (expected.amax(0) - expected.amin(0)).min() > 0.01, "the texts differ"


@pytest.mark.parametrize("write", [neox, llama])
def test_a_saved_decoder_is_fine_tuned_and_saved_again(tmp_path: Path, write: Any) -> None:
    source = find_source(str(write(tmp_path / "model")))
    save(source, tmp_path / "saved", TASKS["mrpc"])
    tuned = find_source(str(tmp_path / "saved"))
    assert tuned.encoder((FIRST, SECOND), LENGTH) == source.encoder((FIRST, SECOND), LENGTH)
    save(tuned, tmp_path / "again", TASKS["mrpc"])
    names = ("tokenizer.json", "tokenizer_config.json")
    once, twice = (
        [json.loads((tmp_path / place / name).read_text("utf-8")) for name in names]
        for place in ("saved", "again")
    )
    assert once == twice


# ---- a fine-tuned DDLM from the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub whose files are all that is had of it, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def push(folder: Path, hub: Path, owner: str, name: str) -> Path:
    place = hub / f"models--{owner}--{name}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("c0ffee")
    return shutil.copytree(folder, place / "snapshots" / "c0ffee")


def test_a_fine_tuned_ddlm_is_taken_by_its_hub_id(tmp_path: Path, hub: Path) -> None:
    pretrained = write_tiny_model(tmp_path / "tiny")
    model = save(find_source(str(pretrained)), tmp_path / "saved", TASKS["mrpc"])
    copied = push(tmp_path / "saved", hub, "me", "tuned")
    here, there = find_source(str(tmp_path / "saved")), find_source("me/tuned")
    assert (there.label, there.fingerprint) == ("tuned", here.fingerprint)
    assert find_source("me/tuned", name="mine").label == "mine"
    further: Any = there.classifier(TASKS["mnli"], 1.0, "mean", True)
    for name, value in model.denoiser.state_dict().items():
        assert torch.equal(further.denoiser.state_dict()[name], value), name
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ConfigError, match="is damaged"):
        find_source("me/tuned")


def test_other_models_of_the_hub_stay_what_they_were(tmp_path: Path, hub: Path) -> None:
    push(write_gpt2(tmp_path / "gpt2"), hub, "me", "decoder")
    assert not find_source("me/decoder").has_time
    with pytest.raises(ConfigError, match="neither a DDLM folder nor a model transformers"):
        find_source("me/nothing")
