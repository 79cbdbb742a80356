"""Which characters of a text were generated, for any tokenizer and however many slots; the order of texts."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import tokenizers as hf

from ddlm.data.tokenizer import END_TOKEN, Tokenizer
from ddlm.sampling.template import parse
from ddlm.sampling.text import decoded_lengths, generated_ranges

UNICODE = "Die Größe, 川は海へ流れる。 🌊👩‍👩‍👧 naïve café\n\ttab\u2028line {{x}} a  b"


def byte_level() -> Tokenizer:
    return Tokenizer.train(["the river runs to the sea and the sun is on it again. " * 20], 300)


def loaded(model: hf.Tokenizer) -> Tokenizer:
    model.add_special_tokens([END_TOKEN])
    return Tokenizer._from_fast(model, [END_TOKEN], "test")


def byte_fallback() -> Tokenizer:
    """As Llama's: a run of bytes that is not UTF-8 as a whole is U+FFFD for every byte."""
    pieces = [
        "<unk>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "▁the",
        "▁a",
        "a",
        "sea",
        "▁川",
        "川",
        "é",
        ".",
    ]
    model = hf.Tokenizer(
        hf.models.BPE(
            {p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    model.decoder = hf.decoders.Sequence(
        [
            hf.decoders.Replace("▁", " "),
            hf.decoders.ByteFallback(),
            hf.decoders.Fuse(),
            hf.decoders.Strip(" ", 1, 0),
        ]
    )
    return loaded(model)


def word_piece() -> Tokenizer:
    pieces = [
        "[UNK]",
        "the",
        "##s",
        "river",
        "sea",
        ".",
        ",",
        "川",
        "##川",
        "a",
        "##a",
        "é",
        "don",
        "'",
        "t",
    ]
    model = hf.Tokenizer(
        hf.models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]")
    )
    model.decoder = hf.decoders.WordPiece()
    return loaded(model)


def metaspace() -> Tokenizer:
    pieces = ["<unk>", "▁", "▁the", "sea", "▁川", "a", "▁▁", "é"]
    model = hf.Tokenizer(
        hf.models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>")
    )
    model.decoder = hf.decoders.Metaspace()
    return loaded(model)


def sentence_piece() -> Tokenizer:
    import io

    spm = pytest.importorskip("sentencepiece", reason="needs sentencepiece: 'ddlm[data]'")
    blob = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the river {i} runs to the sea a b" for i in range(40)]),
        model_writer=blob,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return Tokenizer._from_sentencepiece(blob.getvalue(), "test")


TOKENIZERS = [sentence_piece, byte_level, byte_fallback, word_piece, metaspace]


@pytest.mark.parametrize("make", TOKENIZERS)
def test_lengths_are_those_of_the_decoded_beginnings(make) -> None:
    tokenizer = make()
    rng = random.Random(0)
    special = tokenizer.end_id
    for turn in range(150):
        size = rng.choice([3, 12, 60])
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(size)]
        if turn % 2:  # mostly runs of bytes, or of few tokens
            few = [rng.randrange(tokenizer.vocab_size) for _ in range(3)] + [special]
            ids = [rng.choice(few) for _ in range(size)]
        ends = sorted(rng.sample(range(size + 1), rng.randrange(1, size + 1)))
        expected = [len(tokenizer.decode(ids[:e])) for e in ends]
        assert decoded_lengths(ids, ends, tokenizer.decode) == expected, ids


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_characters_of_several_tokens(make) -> None:
    tokenizer = make()
    ids = tokenizer.encode(UNICODE * 2)
    assert len(ids) > len(UNICODE) * 2  # characters are split over tokens
    ends = list(range(len(ids) + 1))
    expected = [len(tokenizer.decode(ids[:e])) for e in ends]
    assert decoded_lengths(ids, ends, tokenizer.decode) == expected


def quadratic(
    ids: Sequence[int], noised: Sequence[bool], tokenizer: Tokenizer
) -> list[tuple[int, int]]:
    """What the ranges are: every beginning decoded anew."""
    text = tokenizer.decode(ids)
    flags = [False, *noised, False]
    at = [
        min(len(text), len(tokenizer.decode(ids[:i])))
        for i in range(len(ids) + 1)
        if flags[i] != flags[i + 1]
    ]
    return list(zip(at[::2], at[1::2], strict=True))


@pytest.mark.parametrize(
    "template", ["{3}", UNICODE + "{2}", f"{{1}}{UNICODE}{{4}} é{{1}}川{{2}}🌊"]
)
def test_ranges_of_templates_with_every_kind_of_character(template: str) -> None:
    tokenizer = byte_level()
    rng = random.Random(1)
    for _ in range(30):
        t = parse(template * 3, tokenizer)
        noised = t.is_noised.tolist()
        ids = [rng.randrange(300) if n else int(i) for i, n in zip(t.tokens, noised, strict=True)]
        text = tokenizer.decode(ids)
        found = generated_ranges(ids, noised, text, tokenizer.decode)
        assert found == quadratic(ids, noised, tokenizer)


def test_the_work_grows_with_the_text_and_not_with_its_square() -> None:
    tokenizer = byte_level()
    t = parse("The river {1}" * 2000, tokenizer)
    rng = random.Random(2)
    ids = [
        rng.randrange(257, 300) if n else i
        for i, n in zip(t.tokens.tolist(), t.is_noised.tolist(), strict=True)
    ]
    decoded = 0

    def decode(part: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(part)
        return tokenizer.decode(part)

    ranges = generated_ranges(ids, t.is_noised.tolist(), tokenizer.decode(ids), decode)
    assert len(ranges) == 2000
    assert decoded < 5 * len(ids)
