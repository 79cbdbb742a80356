"""Classifiers of `transformers` with the outputs of a task, and why there is none of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ddlm.downstream.encoders import Encoder
from ddlm.downstream.glue import Task
from ddlm.types import ConfigError


def head(task: Task) -> dict[str, Any]:
    """Outputs of a classifier for ``task`` in the configuration's terms."""
    if task.is_regression:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(task.labels),
        "problem_type": "single_label_classification",
        "id2label": dict(enumerate(task.labels)),
        "label2id": {label: i for i, label in enumerate(task.labels)},
    }


def auto_classifier(path: str, task: Task, encoder: Encoder) -> nn.Module:
    """What AutoModelForSequenceClassification makes of ``path``, padding as ``encoder`` does.

    Raises:
        ConfigError: when the weights are missing or damaged, the type of model has no classifier, or the tokenizer
            has more entries than the model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    refused = f"{path} cannot be fine-tuned on {task.name}"
    try:
        with quiet():
            model = AutoModelForSequenceClassification.from_pretrained(
                path, trust_remote_code=False, **head(task)
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if "ignore_mismatched_sizes" in str(
            error
        ):  # the library points at a report that is not shown
            raise ConfigError(
                f"{refused}: it is a classifier of other classes, or its weights are not those of its "
                "configuration: name the model from before it was fine-tuned"
            ) from None
        raise load_error(path, refused, error) from None
    text = model.config.get_text_config()
    if text.vocab_size < encoder.vocab_size:
        raise vocabulary_error(path, text.vocab_size, encoder.vocab_size)
    # A decoder pools the last token that is not padding: it has to know what the batches are padded with, also
    # where its own configuration names another token.
    model.config.pad_token_id = text.pad_token_id = encoder.pad_id
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hundreds of runs: transformers' notes about each of them are silenced, its errors are not."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def vocabulary_error(label: str, model: int, tokenizer: int) -> ConfigError:
    """For a model with a smaller vocabulary than its tokenizer."""
    return ConfigError(
        f"{label} has a vocabulary of {model:,} and its tokenizer one of {tokenizer:,}: they do not belong together"
    )


def load_error(path: str, refused: str, error: Exception) -> ConfigError:
    """For a model that transformers does not load: ``refused`` and why, or that it would run the model's own code."""
    if "trust_remote_code" in str(error):
        return ConfigError(
            f"{path} needs code of its own, which ddlm does not run: name a model that transformers has the code of"
        )
    return ConfigError(f"{refused}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """Of an error's message, its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
