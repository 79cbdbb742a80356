"""AR-NLL: the negative log-likelihood of samples under an autoregressive judge (DDLM, section 3.2).

Axes: B texts of a batch, T judge tokens of the longest, V the judge's vocabulary.

The text is tokenised again by the judge and follows the judge's beginning-of-text token. Unconditional: every token
after it counts. Conditional: the whole text is read but only the generated tokens count, those that hold at least one
generated character. The log-softmax is taken in float32 whatever the precision of the network.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from ddlm.evaluation.extras import NOT_LOADED, missing_extra, quiet, why_not_loaded
from ddlm.evaluation.hub import (
    DEFAULT_JUDGE,
    cache_folder,
    fingerprint,
    local_folder,
)
from ddlm.files import read_json, read_tensors
from ddlm.types import ConfigError, DataError

TRAINED_ON = "trained_on.json"
TRAINED_HASHES = "trained_on.safetensors"  # the hashes' bits as int64, sorted
"""Beside a judge trained here: what it was trained on, and the sorted uint64 hashes of those documents."""

Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of one text.

    Attributes:
        nll: Sum over the generated tokens, nats.
        tokens: Number of generated judge tokens.
        whole_nll: Sum over all tokens of the text, nats.
        whole_tokens: Number of all judge tokens.
    """

    nll: float
    tokens: int
    whole_nll: float
    whole_tokens: int


@dataclass(frozen=True)
class Likelihood:
    """Likelihood of a set of texts: nats per judge token, over all tokens together.

    Attributes:
        nll: Mean over the generated tokens; for unconditional texts all of them.
        tokens: Tokens that mean is over.
        whole_nll: Mean over the whole texts, prompts included.
        whole_tokens: Tokens that mean is over.
    """

    nll: float
    tokens: int
    whole_nll: float
    whole_tokens: int


def mean_nll(scores: Sequence[Score]) -> Likelihood:
    """Mean negative log-likelihood per judge token, every token counting the same."""
    tokens, whole = sum(s.tokens for s in scores), sum(s.whole_tokens for s in scores)
    return Likelihood(
        nll=math.fsum(s.nll for s in scores) / tokens,
        tokens=tokens,
        whole_nll=math.fsum(s.whole_nll for s in scores) / whole,
        whole_tokens=whole,
    )


class Judge:
    """A causal language model that scores texts; scores are cached by the content of judge and text.

    Args:
        name: A folder in transformers' format, or a hub id, ``id@revision`` to pin it.
        precision: Precision of the network's forward pass.
        device: torch device; None takes the GPU when there is one.
        batch_tokens: Judge tokens of a batch, padding included.
        cache: Folder of the cache; None means the user's (``DDLM_CACHE``, or ``~/.cache/ddlm``).

    Raises:
        ConfigError: if the judge cannot be found or loaded, the note of its training data is damaged, or its tokenizer
            does not tell the characters of a token.
    """

    def __init__(
        self,
        name: str = DEFAULT_JUDGE,
        *,
        precision: Literal["fp32", "bf16"] = "fp32",
        device: str | None = None,
        batch_tokens: int = 2048,
        cache: Path | None = None,
    ) -> None:
        self.name, self.precision, self.batch_tokens = name, precision, batch_tokens
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.folder, self.revision = local_folder(name, what="judge", flag="--judge")
        self.cache = cache_folder(cache) / "judge"
        self.fingerprint = fingerprint(self.folder, cache_folder(cache))
        self.trained_on()  # the record needs it in the end: a damaged note is named before anything is scored
        self._model: Any = None
        transformers = missing_extra("transformers", "eval")
        try:
            with quiet():
                # False: None would ask, and run the folder's code where the answer is yes.
                own = {"trust_remote_code": False}
                self.config = transformers.AutoConfig.from_pretrained(self.folder, **own)
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, **own)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"the judge {name} is not a causal language model with its tokenizer: {why_not_loaded(error)}"
            ) from error
        if not getattr(self.tokenizer, "is_fast", False):
            raise ConfigError(
                f"the judge {name} has no fast tokenizer, which tells the characters of a token:"
                " convert it or take another"
            )
        first = self.tokenizer.bos_token_id
        first = self.tokenizer.eos_token_id if first is None else first
        if first is None:
            raise ConfigError(f"the judge {name} has neither a beginning- nor an end-of-text token")
        self.start = int(first)
        self.context = context_length(self.config)

    def describe(self) -> dict[str, Any]:
        """What a record needs to say about the judge."""
        return {
            "judge": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "precision": self.precision,
            "context": self.context,
            "beginning_of_text": self.tokenizer.convert_ids_to_tokens(self.start),
            "trained_here_on": self.trained_on(),
        }

    def score(
        self,
        texts: Sequence[str],
        ranges: Sequence[Ranges] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Score]:
        """Score every text.

        Interrupted runs lose at most one batch: finished scores are in the cache.

        Args:
            texts: Whole texts, prompts included.
            ranges: For each text the character ranges ``[start, end)`` that were generated; None: all of it.
            progress: Called with (texts done, texts in all) after each batch.

        Raises:
            DataError: naming the text (counted from 1) that is empty, too long for the judge's context, has nothing
                generated, or has a likelihood that is not finite.
        """
        spans = [[(0, len(t))] for t in texts] if ranges is None else [list(r) for r in ranges]
        if len(spans) != len(texts):
            raise DataError(f"{len(texts)} texts but {len(spans)} entries of generated ranges")
        keys = [_key(t, r) for t, r in zip(texts, spans, strict=True)]
        known = self._read_cache()
        todo = list({k: i for i, k in enumerate(keys) if k not in known}.values())
        rows = self._tokenize([texts[i] for i in todo], [spans[i] for i in todo], todo)
        done = len(texts) - len(todo)
        if progress is not None:
            progress(done, len(texts))
        for batch in length_batches([len(ids) for ids, _ in rows], self.batch_tokens):
            fresh = self._forward([rows[b] for b in batch], [todo[b] + 1 for b in batch])
            found = {keys[todo[b]]: score for b, score in zip(batch, fresh, strict=True)}
            self._append_cache(found)
            known |= found
            done += len(batch)
            if progress is not None:
                progress(done, len(texts))
        return [known[k] for k in keys]

    def _tokenize(
        self, texts: list[str], ranges: list[list[tuple[int, int]]], numbers: list[int]
    ) -> list[tuple[list[int], list[bool]]]:
        """Judge ids of each text and which of them were generated."""
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,  # text that merely looks like a special token is text
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        rows = []
        for ids, offsets, spans, number in zip(
            encoded["input_ids"], encoded["offset_mapping"], ranges, numbers, strict=True
        ):
            if not ids:
                raise DataError(f"text {number + 1} is empty: it has no likelihood")
            if self.context is not None and len(ids) + 1 > self.context:
                raise DataError(
                    f"text {number + 1} has {len(ids)} judge tokens and the beginning-of-text token, but the context of"
                    f" {self.name} is {self.context}: take a judge with a longer context or shorter samples"
                )
            generated = _generated(offsets, spans)
            if not any(generated):
                raise DataError(f"text {number + 1} has no generated character to score")
            rows.append((list(ids), generated))
        return rows

    @torch.inference_mode()
    def _forward(self, rows: list[tuple[list[int], list[bool]]], numbers: list[int]) -> list[Score]:
        model = self._load()
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), longest + 1), self.start, dtype=torch.long)  # (B, 1 + T)
        valid = torch.zeros(len(rows), longest + 1, dtype=torch.long)
        counted = torch.zeros(len(rows), longest, dtype=torch.bool)  # (B, T)
        for b, (tokens, generated) in enumerate(rows):
            ids[b, 1 : len(tokens) + 1] = torch.tensor(tokens)
            valid[b, : len(tokens) + 1] = 1
            counted[b, : len(tokens)] = torch.tensor(generated)
        # Padding stands on the right: a causal network never looks at it.
        ids, valid = ids.to(self.device), valid.to(self.device)
        logits = model(input_ids=ids, attention_mask=valid, use_cache=False).logits  # (B, 1 + T, V)
        nll = (
            torch.stack(
                [
                    F.cross_entropy(row[:-1].float(), target[1:], reduction="none")
                    for row, target in zip(logits, ids, strict=True)
                ]
            )
            .double()
            .cpu()
        )  # (B, T)
        here = valid[:, 1:].bool().cpu()
        scores = []
        for b, number in enumerate(numbers):
            whole, some = nll[b][here[b]], nll[b][counted[b]]
            if not bool(torch.isfinite(whole).all()):
                raise DataError(
                    f"text {number}: the likelihood under {self.name} is not finite: the judge's weights are damaged"
                    f" or {self.precision} overflows; try fp32"
                )
            scores.append(Score(float(some.sum()), len(some), float(whole.sum()), len(whole)))
        return scores

    def _load(self) -> Any:
        if self._model is None:
            transformers = missing_extra("transformers", "eval")
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
            try:
                with quiet():
                    model = transformers.AutoModelForCausalLM.from_pretrained(
                        self.folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
                    )
            except NOT_LOADED as error:
                raise ConfigError(
                    f"cannot load the judge {self.name}: {why_not_loaded(error)}"
                ) from error
            self._model = model.to(self.device).eval()
        return self._model

    # What the judge was trained on.

    def trained_on(self) -> dict[str, Any] | None:
        """What `ddlm baseline` wrote about the judge's training data; None for a judge from elsewhere."""
        file = self.folder / TRAINED_ON
        return read_json(file) if file.is_file() else None

    def check_held_out(self, hashes: Sequence[int], what: str = "the evaluation text") -> None:
        """Refuse documents that the judge was trained on.

        Args:
            hashes: Hashes of the documents (:func:`ddlm.data.encode.document_hash`).
            what: How to name the documents in the message.

        Raises:
            DataError: if any of them was training data of the judge.
        """
        seen = count_seen(self.folder, hashes)
        if seen:
            raise DataError(
                f"{seen} of {len(hashes)} documents of {what} are training data of the judge {self.name}:"
                " a judge never scores what it was trained on; take held-out documents or another judge"
            )

    # The cache: one file for a judge and precision, one line for a text; a torn last line is ignored.

    @property
    def _cache_file(self) -> Path:
        return self.cache / f"{self.fingerprint[:24]}-{self.precision}.jsonl"

    def _read_cache(self) -> dict[str, Score]:
        known: dict[str, Score] = {}
        if self._cache_file.is_file():
            for line in self._cache_file.read_text("utf-8", errors="replace").split("\n"):
                try:
                    key, values = json.loads(line)
                    known[key] = Score(*values)
                except (ValueError, TypeError):
                    continue
        return known

    def _append_cache(self, found: dict[str, Score]) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps([key, [s.nll, s.tokens, s.whole_nll, s.whole_tokens]])
            for key, s in found.items()
        ]
        with self._cache_file.open("a", encoding="utf-8") as file:
            # A line feed first: what a killed run left unfinished stays a line of its own.
            file.write("\n" + "\n".join(lines) + "\n")


def count_seen(folder: Path, hashes: Sequence[int]) -> int:
    """How many documents a model of `ddlm baseline` was trained on; 0 where the folder does not say."""
    file = folder / TRAINED_HASHES
    if not file.is_file():
        return 0
    known = read_tensors(file).get("hashes")
    if known is None or known.dtype != torch.int64:
        raise ConfigError(f"{file} is damaged (it has no 'hashes' of int64): copy the file again")
    return int(np.isin(np.asarray(hashes, dtype=np.uint64), known.numpy().view(np.uint64)).sum())


def refuse_seen(folder: Path, hashes: Sequence[int], what: str) -> None:
    """Refuse to measure a model of `ddlm baseline` on documents that it was trained on.

    Raises:
        DataError: if any of them was training data of the model.
    """
    seen = count_seen(folder, hashes)
    if seen:
        raise DataError(
            f"{seen} of {len(hashes)} documents of {what} are training data of the model {folder}: it would continue"
            " prompts that it has read; take held-out documents"
        )


def context_length(config: Any) -> int | None:
    """Positions a transformers model can read, or None when its configuration names no limit."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _generated(offsets: Sequence[tuple[int, int]], spans: Ranges) -> list[bool]:
    """Whether each token holds at least one generated character.

    A token reaches from the end of the one before it: byte-level tokenizers leave the space before a word out of the
    offsets though it is part of the token.
    """
    out, previous = [], 0
    for start, end in offsets:
        low = min(start, previous)
        out.append(any(low < b and max(end, low + 1) > a for a, b in spans))
        previous = max(previous, end)
    return out


def length_batches(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, each of at most ``limit`` tokens with its padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    room = 0
    for i in order:
        if room < 1:
            batches.append([])
            room = max(1, limit // (lengths[i] + 1))
        batches[-1].append(i)
        room -= 1
    return batches


def _key(text: str, spans: Ranges) -> str:
    content = json.dumps([text, [list(s) for s in spans]], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]
