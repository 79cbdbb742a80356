"""A generated text as users see it, and which of its characters were generated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddlm.sampling.trace import Trace


@dataclass(frozen=True)
class Generated:
    """One generated text.

    Attributes:
        text: The whole text, what was given included.
        tokens: Ids of the whole text.
        is_noised: True where a token was generated, one entry for each of ``tokens``.
        prompt: The template it was written from.
        generated: Ranges ``[start, end)`` of characters of ``text`` that were generated.
        steps: Solver steps made (of all windows together, for a text longer than the model).
        reason: Why it ended: ``completed``, ``patience``, ``entropy``, ``kl`` or ``fixed``.
        seed: Seed of this text: the same template and settings with this seed give it again.
        traces: The trajectory of each window, when asked for.
    """

    text: str
    tokens: list[int]
    is_noised: list[bool]
    prompt: str
    generated: list[tuple[int, int]]
    steps: int
    reason: str
    seed: int
    traces: tuple[Trace, ...] = ()

    def to_row(self) -> dict[str, Any]:
        """The JSON object of a sample file."""
        row = {k: v for k, v in vars(self).items() if k != "traces"}
        return row | {"generated": [list(r) for r in self.generated]}


def in_order(finished: Iterable[tuple[int, Generated]]) -> Iterator[Generated]:
    """Numbered texts, all numbers from 0 on, in their order: what comes too early waits."""
    waiting: dict[int, Generated] = {}
    following = 0
    for number, text in finished:
        waiting[number] = text
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def generated_ranges(
    ids: Sequence[int], is_noised: Sequence[bool], text: str, decode: Callable[[Sequence[int]], str]
) -> list[tuple[int, int]]:
    """Ranges ``[start, end)`` of the characters that were generated.

    A range begins and ends where the decoded beginning of the text does.

    Args:
        ids: Tokens of the whole text.
        is_noised: True where a token was generated.
        text: ``decode(ids)``.
        decode: Text of tokens.
    """
    flags = [False, *is_noised, False]
    edges = [i for i in range(len(ids) + 1) if flags[i] != flags[i + 1]]
    at = [min(len(text), n) for n in decoded_lengths(ids, edges, decode)]
    return list(zip(at[::2], at[1::2], strict=True))


def decoded_lengths(
    ids: Sequence[int], ends: Iterable[int], decode: Callable[[Sequence[int]], str]
) -> list[int]:
    """``len(decode(ids[:end]))`` for every one of ``ends``, which rise, without decoding the beginning every time.

    What follows is decoded together with the last token that :func:`_stands_alone`, and that token's own characters
    are taken off again: whatever a tokenizer does at the beginning of a text, such as leaving out a space, it does to
    both. Tokens that do not, parts of a character for instance, are decoded with all that follows the last one.
    """
    lengths = []
    # where decoding begins; characters up to that token, itself among them, and of it alone
    joint, before, alone = 0, 0, 0
    for end in ends:
        for i in range(end - 1, joint, -1):
            piece = decode(ids[i : i + 1])
            if _stands_alone(piece):
                before += len(decode(ids[joint : i + 1])) - alone
                joint, alone = i, len(piece)
                break
        lengths.append(before + len(decode(ids[joint:end])) - alone)
    return lengths


def _stands_alone(piece: str) -> bool:
    """Whether a token of this text decodes to the same in any company and leaves its neighbours as they are.

    A part of a character does not. Nor does one ASCII character for certain: some tokenizers have tokens of single
    bytes, and decode such a byte to U+FFFD when the next one fits no character.
    """
    return "\N{REPLACEMENT CHARACTER}" not in piece and (len(piece) > 1 or piece > "\x7f")
