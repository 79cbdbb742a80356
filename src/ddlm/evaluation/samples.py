"""The sample file: one JSON object a line, whatever model wrote it.

    {"text", "tokens", "prompt", "is_noised", "steps", "reason", "seed", "reference", "generated"}

Only ``text`` is required: the whole sequence, prompt included. Everything a metric needs beyond it is optional, and
a metric that needs what is not there says so instead of guessing.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ddlm.types import DataError

# {32}: a slot of 32 tokens; {{ and }}: literal braces (the template notation of ddlm.sampling).
_MOST = 2**63 - 1  # what the tables of ids hold
_SLOT = re.compile(r"\{\{|\}\}|\{(\d+)\}")


@dataclass(frozen=True)
class Sample:
    """One generated sequence.

    Attributes:
        text: The whole text, prompt included.
        tokens: Ids of the whole sequence in the model's own vocabulary, or None.
        prompt: What was given: the beginning of ``text``, or a template such as ``"Once {32} end."``; None or an
            empty string for unconditional samples.
        is_noised: True where a token was generated, one entry for each of ``tokens``, or None (all of them).
        steps: Solver steps performed.
        reason: Why sampling ended.
        seed: Seed of the draw; samples of one seed form a replicate for intervals.
        reference: The real text of the same prompt (prompt included), or None.
        generated: Ranges ``[start, end)`` of characters of ``text`` that were generated, or None where the prompt
            tells them.
    """

    text: str
    tokens: list[int] | None = None
    prompt: str | None = None
    is_noised: list[bool] | None = None
    steps: int | None = None
    reason: str | None = None
    seed: int | None = None
    reference: str | None = None
    generated: list[tuple[int, int]] | None = None

    @property
    def conditional(self) -> bool:
        """Whether part of the text was given."""
        if self.generated is not None:
            return self.generated != [(0, len(self.text))]
        if self.prompt:
            return bool(_SLOT.sub("", self.prompt))  # "{64}" alone gives nothing
        return self.is_noised is not None and not all(self.is_noised)

    @property
    def tells_generated_tokens(self) -> bool:
        """Whether the sample has tokens and says which of them were generated."""
        return self.tokens is not None and (self.is_noised is not None or not self.conditional)

    def generated_tokens(self, gap: int = -1) -> list[int]:
        """Ids that were generated; separate runs are joined by ``gap``, so that no n-gram crosses a kept part.

        Raises:
            DataError: if the sample has no tokens, or keeps some and does not say which.
        """
        if self.tokens is None:
            raise DataError("a sample has no tokens: give a tokenizer or use words as units")
        if not self.tells_generated_tokens:
            raise DataError(
                "a sample was given a part of its text and does not say by 'is_noised' which tokens it wrote: add it, "
                "give a tokenizer or use words as units"
            )
        if self.is_noised is None:
            return list(self.tokens)
        out: list[int] = []
        previous = False
        for token, noised in zip(self.tokens, self.is_noised, strict=True):
            if noised:
                if out and not previous:
                    out.append(gap)
                out.append(token)
            previous = noised
        return out

    def ranges(self) -> list[tuple[int, int]]:
        """Ranges ``[start, end)`` of characters of ``text`` that were generated.

        Taken from ``generated`` where it is given; else from ``prompt``, which is either the beginning of the text
        or a template with one slot; else the whole text.

        Raises:
            DataError: if the prompt does not match the text.
        """
        if self.generated is not None:
            return self.generated
        if self.prompt:
            return _match(self.prompt, self.text)
        if self.is_noised is not None and not all(self.is_noised):
            raise DataError(
                "a sample keeps tokens but says neither by 'prompt' nor by 'generated' which characters were given"
            )
        return [(0, len(self.text))]

    def generated_text(self) -> str:
        """The generated characters; separate ranges are joined by a newline."""
        return "\n".join(self.text[a:b] for a, b in self.ranges())


def _match(prompt: str, text: str) -> list[tuple[int, int]]:
    if text.startswith(prompt):
        return [(len(prompt), len(text))]
    slots = [m for m in _SLOT.finditer(prompt) if m.group(1)]
    if len(slots) != 1:
        raise DataError(
            f"the text does not start with its prompt {prompt[:40]!r}"
            + (" and the template has several slots: add 'generated' ranges" if slots else "")
        )
    before, after = (_unescape(s) for s in (prompt[: slots[0].start()], prompt[slots[0].end() :]))
    before = before.removesuffix(" ")  # one space before a slot belongs to the slot
    if not (
        text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)
    ):
        raise DataError(f"the text does not match its template {prompt[:40]!r}")
    return [(len(before), len(text) - len(after))]


def _unescape(text: str) -> str:
    return text.replace("{{", "{").replace("}}", "}")


def read_samples(path: str | Path) -> list[Sample]:
    """Read a sample file.

    Args:
        path: JSON lines, packed where the name ends in .gz; unknown fields are ignored, empty lines too.

    Raises:
        DataError: naming file and line when the file is missing, damaged, empty, not JSON lines, when a text is missing
            or empty, or when a field has the wrong type or length.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(
            f"no sample file at {file}: give a JSON-lines file with a 'text' field in every line"
        )
    samples = []
    content = file.read_bytes()
    try:
        if file.suffix == ".gz":
            content = gzip.decompress(content)
        # Some editors put a byte-order mark before the first line.
        for number, line in enumerate(content.decode("utf-8-sig").split("\n"), 1):
            if line.strip():
                samples.append(_parse(line, f"{file}, line {number}"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} is damaged and cannot be unpacked: {error}") from error
    if not samples:
        raise DataError(f"{file} holds no samples")
    return samples


def _parse(line: str, where: str) -> Sample:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not JSON ({error}): need one object with a 'text' field in every line"
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: need a JSON object with a 'text' field, got {type(row).__name__}"
        )
    return from_row(row, where)


def from_row(row: Mapping[str, Any], where: str = "sample") -> Sample:
    """Check one row of a sample file and make a :class:`Sample` of it.

    Raises:
        DataError: naming ``where`` and what is wrong.
    """
    text = row.get("text")
    if not isinstance(text, str):
        found = (
            f"got {type(text).__name__}" if "text" in row else f"found {', '.join(row) or 'none'}"
        )
        raise DataError(f"{where}: need a string 'text', {found}")
    if not text or (row.get("tokens") is None and not text.strip()):
        raise DataError(f"{where}: the text is empty; remove the line or mend the model's output")
    for name in ("prompt", "reference", "reason"):
        if not isinstance(row.get(name), str | None):
            raise DataError(f"{where}: '{name}' must be a string, got {type(row[name]).__name__}")
    for name in ("text", "prompt", "reference"):
        _check_text(row.get(name), f"{where}: '{name}'")
    for name in ("steps", "seed"):
        value = row.get(name)
        if not (value is None or (isinstance(value, int) and abs(value) <= _MOST)):
            raise DataError(f"{where}: '{name}' must be an integer of 64 bits, got {_short(value)}")
    tokens, noised = row.get("tokens"), row.get("is_noised")
    if tokens is not None and not (
        isinstance(tokens, list) and all(isinstance(i, int) and 0 <= i <= _MOST for i in tokens)
    ):
        raise DataError(f"{where}: 'tokens' must be a list of ids from 0 to {_MOST}")
    if noised is not None:
        if not (isinstance(noised, list) and all(isinstance(i, bool | int) for i in noised)):
            raise DataError(f"{where}: 'is_noised' must be a list of true and false")
        if tokens is None or len(noised) != len(tokens):
            found = "none" if tokens is None else str(len(tokens))
            raise DataError(f"{where}: 'is_noised' has {len(noised)} entries for {found} tokens")
        noised = [bool(i) for i in noised]
    sample = Sample(
        text=text,
        tokens=tokens,
        prompt=row.get("prompt"),
        is_noised=noised,
        steps=row.get("steps"),
        reason=row.get("reason"),
        seed=row.get("seed"),
        reference=row.get("reference"),
        generated=_ranges(row.get("generated"), len(text), where),
    )
    if sample.generated is None and sample.prompt:
        try:
            sample.ranges()
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    return sample


def _check_text(text: str | None, what: str) -> None:
    """Refuse half of a surrogate pair: JSON can spell it, no tokenizer and no file can take it."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds half of a surrogate pair at character {error.start + 1}, which is no text: write the"
            " character itself or remove it"
        ) from None


def _short(value: Any) -> str:
    # A number of thousands of digits is refused by repr itself.
    return repr(value) if not isinstance(value, int) else "a larger one"


def _ranges(value: Any, length: int, where: str) -> list[tuple[int, int]] | None:
    if value is None:
        return None
    try:
        ranges = [(int(a), int(b)) for a, b in value]
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: 'generated' must be a list of [start, end] pairs") from None
    flat = [i for pair in ranges for i in pair]
    if flat != sorted(flat) or (flat and not 0 <= flat[0] <= flat[-1] <= length):
        raise DataError(
            f"{where}: 'generated' must be ascending ranges within the text's {length} characters"
        )
    return ranges


def to_row(sample: Sample) -> dict[str, Any]:
    """The JSON object of a sample; fields without a value are left out."""
    row = {f.name: getattr(sample, f.name) for f in fields(sample)}
    return {name: value for name, value in row.items() if value is not None}


def write_samples(path: str | Path, samples: Iterable[Sample | Mapping[str, Any]]) -> int:
    """Write a sample file; it appears under its name only when it is complete. Returns the number of samples."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    count = 0
    try:
        with part.open("w", encoding="utf-8") as file:
            for sample in samples:
                row = to_row(sample) if isinstance(sample, Sample) else dict(sample)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return count
