"""Text to token ids and back: one class over HF tokenizers and SentencePiece models."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers as hf

from ddlm.files import read_json
from ddlm.types import ConfigError, local

END_TOKEN = "<|end|>"
"""End-of-document token of the tokenizers trained here; always id 0."""

PRETRAINING_POST_PROCESSOR = "pretraining_post_processor"
"""Key of a fine-tuned folder's tokenizer_config.json: the post-processor that tokenizer.json had before fine-tuning."""

_END_CANDIDATES = (END_TOKEN, "<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
_BYTES = 256


class Tokenizer:
    """A fixed vocabulary with ``encode`` and ``decode``; made by :meth:`train` or :meth:`load`.

    Encoding never adds special tokens, and text that merely looks like one (``"<|end|>"``) is encoded as ordinary
    text, so a document cannot smuggle in a document boundary. Byte-level models decode to exactly the bytes that
    were encoded; WordPiece (BERT) and normalising SentencePiece models (T5) cannot.

    Attributes:
        vocab_size: Number of ids; every id is below it.
        end_id: Id of the token that closes a document.
        hash: SHA-256 (hex) of the tokenizer's content: equal hashes mean equal ids for every text.
    """

    def __init__(self, backend: _Fast | _SentencePiece, end_id: int) -> None:
        self._backend = backend
        self.end_id = end_id
        self.vocab_size = backend.vocab_size
        self.hash = hashlib.sha256(backend.blob + f"\nend={end_id}".encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a lossless byte-level BPE (as in GPT-2); the same texts give the same tokenizer.

        Args:
            texts: Training text, consumed once.
            vocab_size: Entries wanted, the end token and the 256 bytes included; a small corpus may give fewer.

        Raises:
            ConfigError: if ``vocab_size`` has no room for the bytes and the end token, or ``texts`` is a single one.
        """
        if isinstance(texts, str):
            raise ConfigError("texts is one text: a tokenizer is trained on a list of them, [text]")
        if vocab_size < _BYTES + 1:
            raise ConfigError(
                f"vocab_size {vocab_size} is too small: a byte-level tokenizer needs at least {_BYTES + 1}"
                " (256 bytes and the end token)"
            )
        model = hf.Tokenizer(hf.models.BPE())
        model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = hf.decoders.ByteLevel()
        trainer = hf.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_TOKEN],
            initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer=trainer)
        return cls._from_fast(model, [END_TOKEN], "the trained tokenizer")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Load a tokenizer from a file, a folder or the hub.

        Args:
            path: A ``tokenizer.json``, a SentencePiece ``.model``, a BERT ``vocab.txt``, a GPT-2 ``vocab.json`` (its
                ``merges.txt`` beside it), a folder holding one of these, or a hub id such as ``"gpt2"``.

        Raises:
            ConfigError: if nothing loadable is there, the file is malformed, or it has no end token.
        """
        place = local(path)
        if place.is_dir():
            return cls._load_folder(place)
        if place.is_file():
            return cls._load_file(place)
        if _looks_like_hub_id(str(path)):
            return cls._load_folder(_download(str(path)), name=str(path))
        raise ConfigError(
            f"no tokenizer at {path}: give a tokenizer.json, a SentencePiece .model, a folder with one, or a hub id"
        )

    @classmethod
    def _load_folder(cls, folder: Path, name: str | None = None) -> Tokenizer:
        for pattern in ("tokenizer.json", "*.model", "vocab.json", "vocab.txt"):
            found = sorted(folder.glob(pattern))
            if len(found) > 1:
                names = ", ".join(f.name for f in found)
                raise ConfigError(
                    f"{name or folder} holds several tokenizers ({names}): name one file"
                )
            if found:
                return cls._load_file(found[0])
        raise ConfigError(
            f"{name or folder} holds no tokenizer: need tokenizer.json, a SentencePiece .model,"
            " vocab.json with merges.txt, or vocab.txt"
        )

    @classmethod
    def _load_file(cls, file: Path) -> Tokenizer:
        config_file = file.parent / "tokenizer_config.json"
        try:
            config = read_json(config_file) if config_file.is_file() else {}
            eos = config.get("eos_token")
            eos = eos.get("content") if isinstance(eos, dict) else eos
            ends = [*([eos] if isinstance(eos, str) else []), *_END_CANDIDATES]
            if file.suffix == ".model":
                return cls._from_sentencepiece(file.read_bytes(), str(file))
            if file.name == "vocab.txt":
                return cls._from_fast(
                    _word_piece(file, config.get("do_lower_case")), ends, str(file)
                )
            if file.suffix == ".json" and (merges := _merges_beside(file)) is not None:
                return cls._from_fast(_gpt2(file, merges), ends, str(file))
            return cls._from_fast(_complete(file, config), ends, str(file))
        except ConfigError:
            raise
        except Exception as error:  # the Rust and C++ parsers raise bare Exception and RuntimeError
            raise ConfigError(f"{file} is not a readable tokenizer: {_one_line(error)}") from error

    @classmethod
    def _from_fast(cls, model: hf.Tokenizer, ends: Sequence[str], name: str) -> Tokenizer:
        for token in ends:
            end_id = model.token_to_id(token)
            if end_id is not None:
                return cls(_Fast(model), end_id)
        raise ConfigError(
            f"{name} has no end token: none of {', '.join(dict.fromkeys(ends))} is in its vocabulary"
        )

    @classmethod
    def _from_sentencepiece(cls, blob: bytes, name: str) -> Tokenizer:
        backend = _SentencePiece(blob)
        if backend.processor.eos_id() < 0:
            raise ConfigError(f"{name} has no end token: its eos_id is disabled")
        return cls(backend, backend.processor.eos_id())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer into ``folder`` (made if missing); :meth:`load` of the folder gives it back.

        transformers' ``AutoTokenizer`` reads the folder of a BPE or WordPiece tokenizer too.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        end = self._backend.piece(self.end_id)
        config = {"tokenizer_class": self._backend.transformers_class, "eos_token": end}
        _write_atomic(target / self._backend.file_name, self._backend.blob)
        _write_atomic(
            target / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode()
        )

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, no special token added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; the same as encoding them one by one, in parallel where the backend can."""
        return self._backend.encode(texts)

    def decode(self, ids: Iterable[int], *, show_special: bool = False) -> str:
        """Text of ``ids``; special tokens (the end token) are left out unless ``show_special``.

        Ids that do not form valid UTF-8 (a sequence cut inside a character) decode to U+FFFD there.
        """
        return self._backend.decode([int(i) for i in ids], show_special)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """One readable string for each id, for display; partial characters show as U+FFFD."""
        return [self.decode([i], show_special=True) for i in ids]

    def to_bytes(self) -> bytes:
        """Everything needed to rebuild the tokenizer in another process with :meth:`from_bytes`."""
        head = json.dumps({"kind": self._backend.file_name, "end_id": self.end_id}).encode()
        return head + b"\n" + self._backend.blob

    @classmethod
    def from_bytes(cls, data: bytes) -> Tokenizer:
        """Inverse of :meth:`to_bytes`."""
        head, blob = data.split(b"\n", 1)
        fields = json.loads(head)
        if fields["kind"] == _SentencePiece.file_name:
            return cls(_SentencePiece(blob), fields["end_id"])
        return cls(_Fast(hf.Tokenizer.from_str(blob.decode())), fields["end_id"])

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, end_id={self.end_id}, hash={self.hash[:12]})"
        )


class _Fast:
    """A tokenizer of the HF `tokenizers` library."""

    file_name = "tokenizer.json"
    transformers_class = "PreTrainedTokenizerFast"

    def __init__(self, model: hf.Tokenizer) -> None:
        model.no_padding()
        model.no_truncation()
        self.blob = model.to_str().encode()
        model.encode_special_tokens = True  # text that looks like a special token stays text
        self.model = model
        # Ids can have holes: what a model needs is one more than the largest.
        self.vocab_size = 1 + max(model.get_vocab(with_added_tokens=True).values())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], show_special: bool) -> str:
        return str(self.model.decode(ids, skip_special_tokens=not show_special))

    def piece(self, index: int) -> str:
        return str(self.model.id_to_token(index))


class _SentencePiece:
    """A SentencePiece model; needs the extra `data`."""

    file_name = "tokenizer.model"
    transformers_class = "LlamaTokenizer"

    def __init__(self, blob: bytes) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise ConfigError(
                "SentencePiece models need an extra: pip install 'ddlm[data]'"
            ) from error
        self.blob = blob
        self.processor: Any = sentencepiece.SentencePieceProcessor(model_proto=blob)
        self.vocab_size: int = self.processor.vocab_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.processor.encode(list(texts), out_type=int)
        return ids

    def decode(self, ids: list[int], show_special: bool) -> str:
        if not show_special:
            return str(self.processor.decode([i for i in ids if not self.processor.is_control(i)]))
        if (
            len(ids) == 1
        ):  # one piece for display: keep the space that decoding a text's start would strip
            piece = self.piece(ids[0])
            return (
                str(self.processor.decode(ids))
                if self.processor.is_byte(ids[0])
                else piece.replace("▁", " ")
            )
        runs: list[str] = []
        start = 0
        for position, index in enumerate([*ids, None]):
            if index is None or self.processor.is_control(index):
                runs.append(str(self.processor.decode(ids[start:position])))
                runs.append("" if index is None else self.piece(index))
                start = position + 1
        return "".join(runs)

    def piece(self, index: int) -> str:
        return str(self.processor.id_to_piece(index))


def _complete(file: Path, config: dict[str, Any]) -> hf.Tokenizer:
    """A tokenizer.json as it was in pretraining.

    A fine-tuned folder's own post-processor changes no id of :meth:`Tokenizer.encode`, so it must not change the hash.
    """
    if PRETRAINING_POST_PROCESSOR not in config:
        return hf.Tokenizer.from_file(str(file))
    content = json.loads(file.read_text("utf-8"))
    content["post_processor"] = config[PRETRAINING_POST_PROCESSOR]
    return hf.Tokenizer.from_str(json.dumps(content))


def _gpt2(vocab: Path, merges: Path) -> hf.Tokenizer:
    model = hf.Tokenizer(hf.models.BPE.from_file(str(vocab), str(merges)))
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    model.add_special_tokens([t for t in _END_CANDIDATES if model.token_to_id(t) is not None])
    return model


def _word_piece(vocab: Path, lowercase: bool | None) -> hf.Tokenizer:
    entries = vocab.read_text("utf-8").splitlines()
    special = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in entries]
    if (
        lowercase is None
    ):  # the file does not say: a vocabulary without capitals was made from lower-cased text
        lowercase = not any("A" <= c <= "Z" for t in entries if not t.startswith("[") for c in t)
    model = hf.Tokenizer(hf.models.WordPiece.from_file(str(vocab), unk_token="[UNK]"))
    model.normalizer = hf.normalizers.BertNormalizer(lowercase=lowercase)
    model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    model.decoder = hf.decoders.WordPiece()
    model.add_special_tokens(special)
    return model


def _merges_beside(file: Path) -> Path | None:
    """The merges of a GPT-2 vocabulary, or None for a complete tokenizer.json."""
    merges = file.parent / "merges.txt"
    if file.name == "tokenizer.json" or not merges.is_file():
        return None
    return merges


def _looks_like_hub_id(text: str) -> bool:
    is_file = Path(text).suffix.lower() in {
        ".json",
        ".model",
        ".txt",
    }  # names like gpt-neo-1.3B have dots, too
    return text.count("/") <= 1 and not text.startswith((".", "/", "~")) and not is_file


def _download(repo: str) -> Path:
    import huggingface_hub

    names = [
        "tokenizer.json",
        "tokenizer_config.json",
        "*.model",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
    ]
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=names))
    except Exception as error:  # offline, unknown id and refused access all raise their own classes
        raise ConfigError(
            f"no folder or file named {repo}, and the hub did not give a tokenizer of that id"
            f" ({_one_line(error)}): check the name and the network, or give a local tokenizer.json"
        ) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _write_atomic(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
