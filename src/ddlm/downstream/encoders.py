"""How a model reads one text or a pair: a tokenizer of ours or of `transformers`, texts to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ddlm.data.tokenizer import Tokenizer

Encoded = dict[str, list[int]]


class Encoder(Protocol):
    """Texts of a split to token ids."""

    vocab_size: int
    pad_id: int

    def __call__(self, texts: tuple[list[str], ...], length: int) -> list[Encoded]:
        """``input_ids`` (and ``token_type_ids``) of each example, at most ``length`` tokens."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        ...


class PairEncoder:
    """``first <end>`` or ``first <end> second <end>``, segments 0 and 1 (DDLM and decoders without a separator).

    The end token closed documents in pretraining, so the network knows it as the border of two texts. A pair that is
    too long loses tokens at the end of its longer text, one after the other.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_id: int,
        vocab_size: int,
        segments: bool = True,
        pad_id: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._segments = segments
        self._end = end_id
        self.pad_id = end_id if pad_id is None else pad_id  # masked out: any valid id serves
        self.vocab_size = vocab_size

    def __call__(self, texts: tuple[list[str], ...], length: int) -> list[Encoded]:
        """See :class:`Encoder`."""
        parts = [self._ids(column) for column in texts]
        return [self._join(row, length) for row in zip(*parts, strict=True)]

    def save(self, folder: Path) -> None:
        """See :class:`Encoder`."""
        if isinstance(self._tokenizer, Tokenizer):
            self._tokenizer.save(folder)
        else:
            self._tokenizer.save_pretrained(folder)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if isinstance(self._tokenizer, Tokenizer):
            return self._tokenizer.encode_batch(texts)
        # verbose: it would warn of texts that are not cut yet
        out = self._tokenizer(texts, add_special_tokens=False, verbose=False)
        ids: list[list[int]] = out["input_ids"]
        return ids

    def _join(self, row: Sequence[list[int]], length: int) -> Encoded:
        keep = _shares([len(ids) for ids in row], length - len(row))
        tokens: list[int] = []
        segments: list[int] = []
        for segment, (ids, count) in enumerate(zip(row, keep, strict=True)):
            tokens += [*ids[:count], self._end]
            segments += [segment] * (count + 1)
        return {"input_ids": tokens} | ({"token_type_ids": segments} if self._segments else {})


class HubEncoder:
    """The tokenizer's own way with pairs ([CLS] first [SEP] second [SEP] in BERT)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.pad_id = int(tokenizer.pad_token_id)
        self.vocab_size = len(tokenizer)

    def __call__(self, texts: tuple[list[str], ...], length: int) -> list[Encoded]:
        """See :class:`Encoder`."""
        out = self._tokenizer(*texts, truncation=True, max_length=length)
        names = [n for n in ("input_ids", "token_type_ids") if n in out]
        return [
            dict(zip(names, row, strict=True)) for row in zip(*(out[n] for n in names), strict=True)
        ]

    def save(self, folder: Path) -> None:
        """See :class:`Encoder`."""
        self._tokenizer.save_pretrained(folder)


def _shares(lengths: list[int], room: int) -> list[int]:
    """Tokens of each text that fit into ``room``: the longer text is cut first."""
    lengths = list(lengths)
    excess = sum(lengths) - room
    if excess <= 0:
        return lengths
    if len(lengths) == 1:
        return [room]
    longer = 0 if lengths[0] >= lengths[1] else 1
    cut = min(excess, lengths[longer] - lengths[1 - longer])
    lengths[longer] -= cut
    rest = excess - cut  # now both are equally long, and the rest is shared
    lengths[longer] -= rest - rest // 2
    lengths[1 - longer] -= rest // 2
    return lengths
