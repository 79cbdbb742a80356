"""The one way to say what is to be written: ``"The river {32} sea."``.

``{n}`` stands for n tokens to generate, everything else is kept; literal braces are doubled. Spaces around the number
and zeros before it count for nothing: ``{ 032 }`` is ``{32}``. One space before a slot belongs to the slot: tokens
carry the space before their word, so the first generated token brings its own.

T positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ddlm.sampling.values import sequence, whole
from ddlm.types import ConfigError

_PART = re.compile(r"(\{\{)|(\}\})|\{([^{}]*)\}|([{}])")
MOST_TOKENS = 1_000_000  # more are surely a slip of the keyboard


class Encoder(Protocol):
    """What a template asks of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, no special token added."""
        ...


@dataclass(frozen=True, eq=False)
class Template:
    """Tokens and what is to be generated among them.

    Attributes:
        text: The template as written.
        tokens: ``(T,)`` int64; 0 where a token is to be generated.
        is_noised: ``(T,)`` bool, True there.

    Raises:
        ConfigError: for tensors that are no such sequence (:func:`ddlm.sampling.values.sequence`).
    """

    text: str
    tokens: Tensor
    is_noised: Tensor

    def __post_init__(self) -> None:
        tokens, is_noised = sequence(self.tokens, self.is_noised)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "is_noised", is_noised)

    def __len__(self) -> int:
        return len(self.tokens)


def split(text: str) -> list[str | int]:
    """Texts to keep and lengths of slots, in order.

    Raises:
        ConfigError: for unbalanced braces, a slot that is not a positive whole number, no slot at all, or what is
            no text (:func:`check_text`).
    """
    if not isinstance(text, str):
        raise ConfigError(
            f"template {text!r} was given, it must be text such as 'The river {{32}}'"
        )
    check_text("template", text)
    parts: list[str | int] = []
    literal = ""
    end = 0
    for match in _PART.finditer(text):
        literal += text[end : match.start()]
        end = match.end()
        opened, closed, inside, stray = match.groups()
        if opened or closed:
            literal += (opened or closed)[0]
        elif stray:
            raise ConfigError(
                f"template has an unbalanced '{stray}' at character {match.start() + 1}: "
                f"write {{32}} for 32 tokens, {stray * 2} for a literal brace"
            )
        else:
            count = _slot(inside, match.start())
            if literal.endswith(" "):
                literal = literal[:-1]
            if literal:
                parts.append(literal)
            literal = ""
            parts.append(count)
    literal += text[end:]
    if literal:
        parts.append(literal)
    if not any(isinstance(part, int) for part in parts):
        raise ConfigError(
            f"template {_short(text)} has nothing to generate: add a slot such as {{32}} for 32 tokens"
        )
    return parts


def parse(text: str, encoder: Encoder) -> Template:
    """Tokens of a template.

    Args:
        text: For example ``"{64}"``, ``"The river {32}"``, ``"In the beginning {32} the end."``.
        encoder: The model's tokenizer.

    Raises:
        ConfigError: see :func:`split`.
    """
    tokens: list[int] = []
    noised: list[bool] = []
    for part in split(text):
        ids = [0] * part if isinstance(part, int) else encoder.encode(part)
        tokens += ids
        noised += [isinstance(part, int)] * len(ids)
    return Template(text, torch.tensor(tokens), torch.tensor(noised))


def escape(text: str) -> str:
    """Double the braces of a text that is to be kept literally."""
    return text.replace("{", "{{").replace("}", "}}")


def check_text(name: str, text: str) -> None:
    """Refuse half a character (a lone surrogate): no tokenizer reads it and no UTF-8 file holds it.

    Args:
        name: What the text is, for the message.
        text: The text.

    Raises:
        ConfigError: naming the first such character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} has {text[error.start]!r} at character {error.start + 1}, which is no whole character: "
            "write it in UTF-8"
        ) from None


def from_tokens(tokens: Sequence[int], generate: int, text: str = "") -> Template:
    """A prefix of tokens followed by ``generate`` tokens to write (evaluation continues exact token prompts).

    Raises:
        ConfigError: when nothing is to be generated.
    """
    generate = whole("generate", generate)
    if generate < 1:
        raise ConfigError(f"{generate} tokens to generate were asked for, at least 1 is needed")
    noised = [False] * len(tokens) + [True] * generate
    return Template(text, torch.tensor([*tokens, *[0] * generate]), torch.tensor(noised))


def _slot(inside: str, at: int) -> int:
    if not re.fullmatch(r"[0-9]+", inside.strip()):
        raise ConfigError(
            f"template slot {{{inside}}} at character {at + 1} must hold a positive whole number "
            "of tokens, as in {32}"
        )
    # Python refuses to read thousands of digits: behind the zeros, nine are too many tokens already
    count = int(inside.strip().lstrip("0")[:9] or "0")
    if not 1 <= count <= MOST_TOKENS:
        raise ConfigError(
            f"template slot {{{inside}}} at character {at + 1} must hold between 1 and {MOST_TOKENS} tokens"
        )
    return count


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
