from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddlm.data.tokenizer import END_TOKEN, Tokenizer
from ddlm.types import ConfigError

from .conftest import make_texts


@given(text=st.text())
def test_byte_level_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, show_special=True) == text
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.end_id for i in ids)


@given(
    parts=st.lists(st.sampled_from([END_TOKEN, "<|", "end", "|>", " ", "\r\n", "\x00", "\ufeff"]))
)
def test_text_that_looks_like_the_end_token_stays_text(
    tokenizer: Tokenizer, parts: list[str]
) -> None:
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.end_id not in ids
    assert tokenizer.decode(ids) == text


def test_training_is_deterministic_and_names_its_end_token(tokenizer: Tokenizer) -> None:
    again = Tokenizer.train(iter(make_texts(200)), 400)
    assert again.hash == tokenizer.hash
    assert Tokenizer.train(make_texts(200, seed=1), 400).hash != tokenizer.hash
    assert tokenizer.end_id == 0
    assert tokenizer.vocab_size == len(tokenizer) == 400


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    texts = make_texts(20, seed=3)
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


def test_end_token_is_hidden_or_shown(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("one"), tokenizer.end_id, *tokenizer.encode("two")]
    assert tokenizer.decode(ids) == "onetwo"
    assert tokenizer.decode(ids, show_special=True) == f"one{END_TOKEN}two"
    assert END_TOKEN in tokenizer.pieces(ids)
    assert "".join(tokenizer.pieces(tokenizer.encode("the river"))) == "the river"


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new")
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.hash == tokenizer.hash
        assert loaded.end_id == tokenizer.end_id
        assert loaded.encode("naïve river 🙂") == tokenizer.encode("naïve river 🙂")
    assert Tokenizer.from_bytes(tokenizer.to_bytes()).hash == tokenizer.hash


def test_transformers_reads_the_saved_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `eval` is not installed")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the naïve river becomes  text"
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.end_id


TEXT = "  The naïve cat\n\tsat — on 42 mats. 🙂 </s> <|endoftext|> [SEP]\r\n "


@pytest.mark.parametrize(
    ("name", "size", "end", "lossless"),
    [
        ("gpt2", 50257, 50256, True),
        ("gpt2/vocab.json", 50257, 50256, True),
        ("llama2/tokenizer.model", 32000, 2, True),
        ("t5", 32000, 1, False),
        ("bert-base-uncased", 30522, 102, False),
    ],
)
def test_published_tokenizers(
    shared_data: Path, tmp_path: Path, name: str, size: int, end: int, lossless: bool
) -> None:
    loaded = Tokenizer.load(shared_data / "tokenizers" / name)
    assert (loaded.vocab_size, loaded.end_id) == (size, end)
    ids = loaded.encode(TEXT)
    assert end not in ids
    assert (loaded.decode(ids) == TEXT) is lossless
    if not lossless:
        assert "cat sat" in loaded.decode(loaded.encode("The cat sat."))
    loaded.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash == loaded.hash
    assert again.encode(TEXT) == ids
    assert Tokenizer.from_bytes(loaded.to_bytes()).encode(TEXT) == ids


def test_gpt2_ids_are_those_published(shared_data: Path) -> None:
    gpt2 = Tokenizer.load(shared_data / "tokenizers" / "gpt2")
    assert gpt2.encode("Hello world") == [15496, 995]


def test_bert_lower_cases_as_its_vocabulary_demands(shared_data: Path) -> None:
    bert = Tokenizer.load(shared_data / "tokenizers" / "bert-base-uncased")
    assert bert.encode("Hello World") == [7592, 2088]


def test_bad_tokenizers_are_refused_in_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 257"):
        Tokenizer.train(["text"], 256)
    broken = tmp_path / "tokenizer.json"
    broken.write_text('{"version": ')
    no_end = tmp_path / "no_end"
    no_end.mkdir()
    (no_end / "vocab.txt").write_text("[UNK]\ncat\n")
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.model", "b.model"):
        (two / name).write_bytes(b"x")
    garbage = tmp_path / "garbage.model"
    garbage.write_bytes(b"not a model")
    for path, word in [
        (tmp_path / "absent.json", "no tokenizer at"),
        (broken, "not a readable tokenizer"),
        (no_end, "no end token"),
        (two, "several tokenizers"),
        (garbage, "not a readable tokenizer"),
        (tmp_path, "not a readable tokenizer"),
    ]:
        with pytest.raises(ConfigError, match=word) as error:
            Tokenizer.load(path)
        assert "\n" not in str(error.value)
    beside = tmp_path / "beside"
    tokenizer.save(beside)
    (beside / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is damaged"):
        Tokenizer.load(beside)
    shutil.rmtree(two)
    two.mkdir()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        Tokenizer.load(two)


def test_hub_id_offline_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="no folder or file named nobody/nothing") as error:
        Tokenizer.load("nobody/nothing")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("EleutherAI/gpt-neo-1.3B", True),
        ("gpt2", True),
        ("a/tokenizer.json", False),
        ("~/x", False),
    ],
)
def test_a_hub_id_may_have_dots(name: str, is_id: bool) -> None:
    from ddlm.data.tokenizer import _looks_like_hub_id

    assert _looks_like_hub_id(name) is is_id


def test_one_text_is_not_a_list_of_its_characters() -> None:
    with pytest.raises(ConfigError, match="one text"):
        Tokenizer.train("a text", 300)
