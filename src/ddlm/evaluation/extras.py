"""Libraries that only some commands need: imported late, named when missing, kept off the terminal."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
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
