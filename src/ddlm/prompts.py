"""Prompt files: a template a line, or JSON lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ddlm.sampling.template import Template, check_text, escape, parse
from ddlm.types import ConfigError, DataError

if TYPE_CHECKING:
    from typing import TextIO

    from ddlm.lm import DiffusionLM


@dataclass(frozen=True, eq=False)
class Prompt:
    """One line of a prompt file.

    Attributes:
        template: What is to be written.
        reference: The real text of the same prompt, or None; it goes into the sample file.
    """

    template: Template
    reference: str | None = None


def read_prompts(
    lines: TextIO, name: str, lm: DiffusionLM, tokens: int | None = None
) -> list[Prompt]:
    """Prompts from a text file (a template a line) or JSON lines.

    A JSON line holds ``template`` (or ``prompt``, the same), or ``tokens`` with ``is_noised``; and optionally
    ``reference``. The file is taken for JSON lines when it is named so or its first line is a JSON object.

    Args:
        lines: The open file.
        name: Its name, for messages and the kind.
        lm: The model: its tokenizer and vocabulary.
        tokens: Tokens to write after a prompt without a slot; None refuses those.

    Raises:
        DataError: for an empty line, invalid JSON, a bad template or what is no text, naming the line; for an empty
            file.
    """
    try:
        # what some editors put before a file's text is no part of its first prompt
        rows = lines.read().removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text (byte {error.start})") from error
    if rows and rows[-1] == "":
        rows.pop()  # the end of the last line
    if not rows:
        raise DataError(
            f"{name} holds no prompts: write one template a line, such as: The river {{32}}"
        )
    as_json = name.endswith((".jsonl", ".json", ".ndjson")) or rows[0].lstrip().startswith('{"')
    prompts = []
    for number, row in enumerate(rows, 1):
        where = f"{name}, line {number}"
        if not row.strip():
            raise DataError(
                f"{where} is empty: remove it or write a template such as The river {{32}}"
            )
        try:
            prompts.append(
                _from_json(row, lm, tokens) if as_json else Prompt(_template(row, lm, tokens))
            )
        except ConfigError as error:
            raise DataError(f"{where}: {error}") from error
    return prompts


def _template(text: str, lm: DiffusionLM, tokens: int | None) -> Template:
    if tokens is not None and not has_slot(text):
        text = f"{text}{{{tokens}}}"
    return parse(text, lm.tokenizer)


def has_slot(text: str) -> bool:
    """Whether a template says what is to be written."""
    return "{" in text.replace("{{", "")


def _from_json(row: str, lm: DiffusionLM, tokens: int | None) -> Prompt:
    try:
        fields = json.loads(row)
    except ValueError as error:
        raise DataError(f"not JSON ({error})") from error
    except RecursionError:
        raise DataError("not JSON that can be read (too many brackets inside each other)") from None
    if not isinstance(fields, dict):
        raise DataError(f"need a JSON object, got {type(fields).__name__}")
    reference = fields.get("reference")
    if not isinstance(reference, str | None):
        raise DataError(f"'reference' must be a string, got {type(reference).__name__}")
    check_text("'reference'", reference or "")
    if "tokens" in fields:
        return Prompt(_exact(fields, lm), reference)
    text = fields.get("template", fields.get("prompt"))
    if not isinstance(text, str):
        raise DataError("need a string 'template' (or 'prompt'), or 'tokens' with 'is_noised'")
    return Prompt(_template(text, lm, tokens), reference)


def _exact(fields: dict[str, Any], lm: DiffusionLM) -> Template:
    """A prompt given by its tokens; for display its text, escaped, with the slots as a template has them."""
    ids, noised = fields["tokens"], fields.get("is_noised")
    if (
        not (isinstance(ids, list) and isinstance(noised, list))
        # true and false are integers to Python, but no ids
        or not len(ids) == len(noised) > 0
        or not all(isinstance(flag, int) and flag in (0, 1) for flag in noised)
        # what stands where text is to be written is never read: often -100 or a mask's id
        or not all(
            type(i) is int and (flag or 0 <= i < lm.config.model.vocab_size)
            for i, flag in zip(ids, noised, strict=True)
        )
    ):
        raise DataError(
            f"'tokens' must be ids below {lm.config.model.vocab_size} where they are kept, and 'is_noised' as many "
            "true and false (1, 0)"
        )
    ids = [0 if flag else i for i, flag in zip(ids, noised, strict=True)]
    flags = torch.tensor([bool(flag) for flag in noised])
    if not bool(flags.any()):
        raise DataError("nothing is to be generated: 'is_noised' is false everywhere")
    text, start = "", 0
    while start < len(ids):
        end = start
        while end < len(ids) and flags[end] == flags[start]:
            end += 1
        kept = escape(lm.tokenizer.decode(ids[start:end]))
        text += f"{{{end - start}}}" if flags[start] else kept
        start = end
    return Template(text, torch.tensor(ids), flags)
