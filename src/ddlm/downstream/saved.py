"""Tokenizer files of a fine-tuned model: `transformers` reads text by them as it was read in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ddlm.data.tokenizer import PRETRAINING_POST_PROCESSOR, Tokenizer


def complete_tokenizer(
    folder: Path, *, segments: bool, length: int | None, plain: bool = True
) -> None:
    """Let AutoTokenizer give ``first <end> second <end>``, cut and padded as :class:`PairEncoder` does.

    The post-processor of pretraining is kept in tokenizer_config.json, so that :class:`Tokenizer` stays the one of the
    pretrained model. A SentencePiece model has no place for a post-processor and is left alone.

    Args:
        folder: Holds the tokenizer's files.
        segments: Whether the network reads ``token_type_ids``.
        length: Longest input of the fine-tuning, in tokens; None says nothing about it.
        plain: Whether text that looks like a special token stays text, as in :class:`Tokenizer`.
    """
    from ddlm.integrations.export import _complete_tokenizer_config

    file, settings_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file():
        return
    _complete_tokenizer_config(folder)
    content = json.loads(file.read_text(encoding="utf-8"))
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    if settings["pad_token"] is None:  # GPT-2's own class writes it so
        settings["pad_token"] = settings["eos_token"]
    # One that was fine-tuned before has the closing template already.
    settings.setdefault(PRETRAINING_POST_PROCESSOR, content["post_processor"])
    settings["model_input_names"] = [
        "input_ids",
        *(["token_type_ids"] if segments else []),
        "attention_mask",
    ]
    # A decoder's own class may put its own template, or its beginning-of-text token, in the place of this one.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["padding_side"] = settings["truncation_side"] = "right"
    if plain:
        settings["split_special_tokens"] = True
    if length is not None:
        settings["model_max_length"] = length
    end = settings["eos_token"]
    end = end["content"] if isinstance(end, dict) else end
    content["post_processor"] = _closing(end, Tokenizer.load(folder).end_id)
    content["truncation"] = content["padding"] = None
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _closing(end: str, end_id: int) -> dict[str, Any]:
    """``$A <end>`` and ``$A <end> $B:1 <end>:1``; spelt out, since an end token may look like a part of a template."""

    def closed(text: str, segment: int) -> list[dict[str, Any]]:
        return [
            {"Sequence": {"id": text, "type_id": segment}},
            {"SpecialToken": {"id": end, "type_id": segment}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": closed("A", 0),
        "pair": closed("A", 0) + closed("B", 1),
        "special_tokens": {end: {"id": end, "ids": [end_id], "tokens": [end]}},
    }
