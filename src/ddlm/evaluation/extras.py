"""Libraries that only some commands need: imported late, named when missing, kept off the terminal."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ddlm.types import ConfigError

NOT_LOADED = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
"""What transformers raises for a folder whose weights are missing, truncated or another model's."""


def missing_extra(module: str, extra: str) -> Any:
    """Import ``module``, or say which extra brings it.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{module} is not installed ({error}): pip install 'ddlm[{extra}]'"
        ) from error


def why_not_loaded(error: Exception) -> str:
    """One short line of what transformers raised."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it brings code of its own, which is never run here: name a model that transformers knows"
    return text if len(text) <= 200 else text[:197] + "..."


@contextlib.contextmanager
def no_stderr() -> Iterator[None]:
    """Keep off the terminal what a library's compiled code writes to stderr, which Python's own streams never see."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # it is closed: there is nothing to keep it off
        yield
        return
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal."""
    transformers = missing_extra("transformers", "eval")
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
