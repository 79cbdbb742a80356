"""A model folder that `ddlm` and `transformers` both load, and its way to the hub.

The exported folder is still a model folder (manifest, sha256 of every file). Beside it come ``config.json`` with the
auto classes, the code of the network (:mod:`ddlm.integrations.remote_code`) and a model card.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddlm import __version__
from ddlm.checkpoint import (
    FINETUNED,
    TIME_WARP,
    TOKENIZER_FILES,
    LoadedModel,
    load_model,
    save_model,
)
from ddlm.config import Config, SampleConfig, check_config
from ddlm.files import INDEX, SHARD_BYTES, WEIGHTS, read_manifest
from ddlm.integrations.card import model_card
from ddlm.integrations.remote_code import remote_code
from ddlm.settings import override, split_override
from ddlm.types import ConfigError, local

AUTO_MAP = {
    "AutoConfig": "modeling_ddlm.DDLMConfig",
    "AutoModel": "modeling_ddlm.DDLMModel",
    "AutoModelForSequenceClassification": "modeling_ddlm.DDLMForSequenceClassification",
}

# What an earlier upload may have left on the hub: transformers would read a single old file of weights before new
# shards, and the old tokenizer's files beside the new one's.
_EARLIER = [WEIGHTS, INDEX, "model-?????-of-?????.safetensors", TIME_WARP, *TOKENIZER_FILES]


def export_model(
    model: str | Path,
    out: Path,
    *,
    dtype: str = "float32",
    card: Path | None = None,
    sample: Sequence[str] = (),
) -> Path:
    """Write ``model`` as a folder for ``ddlm.load`` and for ``AutoModel.from_pretrained(trust_remote_code=True)``.

    Weights of more than 16 MiB become shards with an index.

    Args:
        model: A model folder, a run folder or a hub id.
        out: Folder to write; an older export there is replaced, anything else is left alone.
        dtype: float32, bfloat16 or float16: precision of the stored weights.
        card: Markdown file that becomes the model card; None: the model's own, or one of what is known about it.
        sample: Defaults of generation to store, such as ``["solver=sde", "steps=100"]``; the others stay.

    Returns:
        ``out``.

    Raises:
        ConfigError: when there is no model at ``model``, no ``card`` that can be read, no such default or one that the
            model cannot generate with, or ``out`` holds something that is no export.
    """
    out = local(out)
    if card is not None:
        if not card.is_file():
            raise ConfigError(
                f"there is no file {card}: name a Markdown file as card, or leave it out"
            )
        _read_card(card)  # before the model is
    itself = f"{out} is the model itself: choose another folder for the export"
    if out.resolve() == local(model).resolve():
        raise ConfigError(itself)
    _check_free(out)
    loaded = load_model(model)
    for text in sample:
        name, value = split_override(text)
        if name not in (known := [f.name for f in dataclasses.fields(SampleConfig)]):
            raise ConfigError(
                f"'{name}' is not a setting of the sampler, which has {', '.join(known)}"
            )
        override(loaded.config, f"sample.{name}", value)
    check_config(loaded.config)
    if loaded.config.sample.grid == "warp" and loaded.time_warp is None:
        raise ConfigError(
            f"grid 'warp' needs a learned time warp, {model} has none: store sample grid=uniform or grid=karras"
        )
    if out.resolve() == loaded.folder.resolve():
        raise ConfigError(itself)

    def add(folder: Path) -> None:
        _write_json(folder / "config.json", auto_config(loaded.config, dtype))
        for name, text in remote_code().items():
            (folder / name).write_text(text, encoding="utf-8")
        _complete_tokenizer_config(folder)
        given = card or loaded.folder / "README.md"
        text = _read_card(given) if given.is_file() else _card(loaded)
        (folder / "README.md").write_text(text, encoding="utf-8")

    return save_model(
        out,
        loaded.model,
        loaded.config,
        tokenizer_from=loaded.folder,
        time_warp=loaded.time_warp,
        step=loaded.step,
        provenance=loaded.provenance,
        dtype=dtype,
        shard_bytes=SHARD_BYTES,
        extra=add,
    )


def push_model(
    model: str | Path, to: str, *, private: bool = False, message: str = "Upload the model"
) -> str:
    """Export ``model`` and upload it to the Hugging Face hub.

    The token is the one of the environment (``HF_TOKEN``) or of ``hf auth login``; it is never an argument, so that
    it stands in no shell history and no record.

    Args:
        model: A model folder, a run folder or a hub id.
        to: ``owner/name`` on the hub; made when it is not there.
        private: Make a new repository private; one that is there and public is refused.
        message: Commit message on the hub.

    Returns:
        Address of the commit.

    Raises:
        ConfigError: when ``to`` is no hub id, there is no token, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(to)
    except ValueError as error:
        raise ConfigError(f"'{to}' is not a hub id like owner/name: {_first_line(error)}") from None
    if "/" not in to:  # the hub would make owner/name of it, and then find no name to upload to
        raise ConfigError(f"'{to}' is not a hub id like owner/name: the owner is missing")
    if get_token() is None:
        raise ConfigError("no hub token was found: set HF_TOKEN or run 'hf auth login'")
    with tempfile.TemporaryDirectory() as temporary:
        folder = export_model(model, Path(temporary) / "model")
        api = HfApi()
        try:
            api.create_repo(to, private=private, exist_ok=True)
            if private and not api.model_info(to).private:
                raise ConfigError(
                    "it is there already and public: make it private on the hub, or leave --private out"
                )
            commit = api.upload_folder(
                repo_id=to,
                folder_path=folder,
                commit_message=message,
                delete_patterns=_EARLIER,
            )
        except Exception as error:  # the hub's own errors have many unrelated bases
            raise ConfigError(f"the hub did not take {to}: {_first_line(error)}") from None
    return str(commit.commit_url)


def auto_config(config: Config, dtype: str = "float32") -> dict[str, Any]:
    """Content of ``config.json``: the sizes, and which classes of the folder's code serve the auto classes."""
    return {
        "architectures": ["DDLMModel"],
        "auto_map": AUTO_MAP,
        "model_type": "ddlm",
        "model": dataclasses.asdict(config.model),
        "process": {"t_min": config.process.t_min, "t_max": config.process.t_max},
        "dtype": dtype,
        "ddlm_version": __version__,
    }


def _check_free(out: Path) -> None:
    """Refuse to replace anything but an older export: a training checkpoint has a manifest too.

    Raises:
        ConfigError: naming what makes ``out`` something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    code = AUTO_MAP["AutoModel"].partition(".")[0] + ".py"
    reason = ""
    try:
        manifest = read_manifest(out) if out.is_dir() else {}
    except ConfigError:
        manifest = {}
    listed = manifest.get("files", {}).keys()
    if manifest.get("kind") == FINETUNED:
        reason = ": it holds a fine-tuned one"
    elif code in listed:
        found = (p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir())
        others = sorted(set(found) - listed - {"manifest.json"})
        if (out / "training").exists():
            others.insert(0, "training/")
        if not others:
            return
        reason = f" alone: it holds {others[0]}"
    raise ConfigError(
        f"{out} exists and is not an exported model{reason}: choose an empty or a new folder"
    )


def _complete_tokenizer_config(folder: Path) -> None:
    """Let AutoTokenizer pad: with the end token, as GPT-2's users do; the attention mask marks what is padding."""
    path = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file() or not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.setdefault("pad_token", settings.get("eos_token"))
    settings.setdefault("clean_up_tokenization_spaces", False)
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    _write_json(path, settings)


def _read_card(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the card {path} is not UTF-8 (byte {error.start}): save it as UTF-8 text"
        ) from None


def _card(loaded: LoadedModel) -> str:
    return model_card(
        loaded.config,
        parameters=loaded.model.parameter_counts(),
        step=loaded.step,
        provenance=loaded.provenance,
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
