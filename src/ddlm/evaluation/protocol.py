"""The paper's evaluation protocol (DDLM, section 3.2): prompts, tasks, continuations, sanity rows and curves.

Axes: N prompts, T positions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddlm.data.tokenizer import Tokenizer
from ddlm.evaluation import diversity
from ddlm.evaluation.generators import Generator, Settings
from ddlm.evaluation.judges import Judge
from ddlm.evaluation.mauve import Featurizer
from ddlm.evaluation.measure import Progress, Row, Units, measure_row
from ddlm.evaluation.origin import distinct, elsewhere, read_origin, write_origin
from ddlm.evaluation.samples import Sample, read_samples, write_samples
from ddlm.evaluation.windows import Windows as Windows
from ddlm.evaluation.windows import held_out as held_out
from ddlm.types import DataError


@dataclass(frozen=True)
class Protocol:
    """What is drawn and measured.

    Attributes:
        prompts: Held-out windows that prompts are cut from.
        continuations: Samples for each prompt, each with its own seed; the replicates of the intervals.
        length: Tokens of a sample.
        settings: How to sample.
        tasks: Of ``unconditional``, ``prefix``, ``infill``.
        noise_scales: Curve of quality against diversity over the initial noise (diffusion only).
        temperatures: The same over the temperature.
        curve_prompts: Samples of each seed at each point of a curve.
        sanity: Whether to print the sanity rows.
        seed: Seed of the whole protocol.
    """

    prompts: int = 5000
    continuations: int = 5
    length: int = 64
    settings: Settings = field(default_factory=Settings)
    tasks: tuple[str, ...] = ("unconditional", "prefix", "infill")
    noise_scales: tuple[float, ...] = (0.5, 0.8, 0.9, 1.0, 1.1, 1.2)
    temperatures: tuple[float, ...] = (0.7, 0.85, 1.0, 1.15)
    curve_prompts: int = 50
    sanity: bool = True
    seed: int = 0


PROTOCOLS = {
    "paper": Protocol(),
    "quick": Protocol(prompts=100, continuations=3, curve_prompts=20, noise_scales=(0.8, 1.0, 1.2)),
}


REAL = "real text"
"""Name of the rows of real text."""

SAME = "this is the reference: compared with itself it is 1"
"""Why such a row has no MAUVE."""


@dataclass(frozen=True)
class Report:
    """What a protocol found: the rows of the table and the points of the curves."""

    rows: list[Row]
    curves: list[Row]
    facts: dict[str, Any]


def run(
    protocol: Protocol,
    generator: Generator,
    tokenizer: Tokenizer,
    windows: Windows,
    folder: Path,
    *,
    name: str = "model",
    judge: Judge | None = None,
    features: Featurizer | None = None,
    progress: Progress | None = None,
) -> Report:
    """Draw every sample that is not there yet, and measure.

    Sample files lie in ``folder`` under names that tell model, prompts and settings apart, so an interrupted run
    goes on where it stopped and another model never meets them.

    Raises:
        DataError: if the judge was trained on the held-out text, or a sample cannot be measured.
    """
    if judge is not None:
        judge.check_held_out(windows.hashes, f"the held-out text {windows.source}")
    real = [decode(tokenizer, row) for row in windows.tokens.tolist()]
    common: dict[str, Any] = {
        "units": Units("own tokens"),
        "judge": judge,
        "features": features,
        "references": real,
        "progress": progress,
    }
    rows = []
    origins: list[dict[str, Any]] = []
    tasks = [t for t in protocol.tasks if t != "infill" or generator.fills]
    for task in tasks:
        samples = draw(
            protocol,
            task,
            generator,
            tokenizer,
            windows,
            folder,
            protocol.settings,
            progress,
            origins,
        )
        rows.append(measure_row(name, task_name(task, protocol.length), samples, **common))
    if protocol.sanity:
        rows += sanity_rows(protocol, tasks, windows, tokenizer, **common)
    common["features"] = None
    curves = []
    small = replace(protocol, prompts=min(protocol.curve_prompts, len(windows.tokens)))
    for label, settings in curve_settings(protocol, generator):
        samples = draw(
            small,
            "unconditional",
            generator,
            tokenizer,
            windows,
            folder,
            settings,
            progress,
            origins,
        )
        curves.append(measure_row(label, "unconditional", samples, **common))
    drawn = distinct(origins)
    facts = {
        "prompts": len(windows.tokens),
        "prompts_wanted": protocol.prompts,
        "further_real_windows": len(windows.more),
        "documents": len(windows.hashes),
        "held_out": windows.source,
        "model": generator.fingerprint,
        "drawn": drawn,
        "judge": None if judge is None else judge.describe(),
        "features": None if features is None else features.describe(),
        "notes": [*unlike_rows(rows), *elsewhere(drawn)],
    }
    return Report(rows, curves, facts)


def task_name(task: str, length: int) -> str:
    """``prefix-32`` for windows of 64 tokens: the name tells how many tokens are given."""
    return task if task == "unconditional" else f"{task}-{length // 2}"


def is_noised(task: str, length: int) -> torch.Tensor:
    """What is written: everything, the second half, or the middle half ``(T,)``.

    Raises:
        DataError: for an unknown task.
    """
    mask = torch.ones(length, dtype=torch.bool)
    if task == "prefix":
        mask[: length // 2] = False
    elif task == "infill":
        mask[: length // 4] = False
        mask[length - length // 4 :] = False
    elif task != "unconditional":
        raise DataError(f"task {task} is unknown: unconditional, prefix or infill")
    return mask


def draw(
    protocol: Protocol,
    task: str,
    generator: Generator,
    tokenizer: Tokenizer,
    windows: Windows,
    folder: Path,
    settings: Settings,
    progress: Progress | None = None,
    origins: list[dict[str, Any]] | None = None,
) -> list[Sample]:
    """All samples of a task: one file a seed, kept and read again when it is there.

    ``origins`` gets where each file comes from (:mod:`ddlm.evaluation.origin`).

    Raises:
        OSError: when a file cannot be written.
    """
    tokens = torch.from_numpy(windows.tokens[: protocol.prompts])
    noised = is_noised(task, protocol.length).expand(len(tokens), -1)
    key = hashlib.sha256(
        json.dumps(
            [generator.fingerprint, task, settings.departures(), protocol.seed, tokens.tolist()]
        ).encode()
    ).hexdigest()[:12]
    out: list[Sample] = []
    for k in range(protocol.continuations):
        file = folder / f"{task_name(task, protocol.length)}-{key}-seed{k}.jsonl"
        if file.is_file():
            out += read_samples(file)
            if origins is not None:
                origins.append(read_origin(file))
            continue
        seeds = [sample_seed(protocol.seed, k, task, i) for i in range(len(tokens))]
        made = []
        for i, written in enumerate(generator.write(tokens, noised, seeds, settings)):
            reference = tokens[i].tolist() if task != "unconditional" else None
            made.append(make_sample(tokenizer, written.tokens, noised[i].tolist(), reference))
            made[-1] = replace(made[-1], seed=k, steps=written.steps, reason=written.reason)
            if progress is not None:
                progress(f"{task} seed {k}", i + 1, len(tokens))
        write_origin(file)
        write_samples(file, made)
        if origins is not None:
            origins.append(read_origin(file))
        out += made
    return out


def sample_seed(seed: int, replicate: int, task: str, index: int) -> int:
    """Seed of one sample: a hash, so that no two share noise by accident."""
    digest = hashlib.blake2b(f"{seed}/{replicate}/{task}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of ids; the end of a document becomes an empty line, so that two documents do not run together."""
    pieces: list[list[int]] = [[]]
    for i in ids:
        if i == tokenizer.end_id:
            pieces.append([])
        else:
            pieces[-1].append(i)
    return "\n\n".join(tokenizer.decode(p) for p in pieces)


def make_sample(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    noised: Sequence[bool],
    reference: Sequence[int] | None,
) -> Sample:
    """A sample with the character ranges that were generated; one contiguous stretch is written or everything."""
    text = decode(tokenizer, ids)
    start = noised.index(True)
    stop = len(noised) - noised[::-1].index(True)
    given = reference is not None and (start > 0 or stop < len(ids))
    real = decode(tokenizer, reference) if given and reference is not None else None
    whole = [text] if real is None else [text, real]
    # A character may be cut where the generated part begins or ends: then it counts as generated. So does what a given
    # piece reads as beside a generated one only, as WordPiece's "##ing" does behind a word.
    before = decode(tokenizer, ids[:start]).rstrip("\ufffd")
    # SentencePiece drops the space that a text begins with: behind what was generated it is there, and was given.
    upto = decode(tokenizer, ids[:stop])
    after = (
        text[len(upto) :]
        if text.startswith(upto)
        else decode(tokenizer, ids[stop:]).lstrip("\ufffd")
    )
    low = _shared([before, *whole])
    high = len(text) - _shared([t[::-1] for t in (after, *whole)])
    return Sample(
        text=text,
        tokens=list(ids),
        prompt=None,
        is_noised=list(noised),
        reference=real,
        generated=[(min(low, high), max(low, high))],
    )


def _shared(texts: Sequence[str]) -> int:
    """Characters that all of the texts begin with."""
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    return sum(1 for _ in alike)


def sanity_rows(
    protocol: Protocol,
    tasks: Sequence[str],
    windows: Windows,
    tokenizer: Tokenizer,
    **measured: Any,
) -> list[Row]:
    """Rows of real text and of the sanity sets.

    Whole windows of all of them; of real text also what stands where each of the tasks writes, counted in groups of as
    many texts as a prompt has continuations. The latter are the references themselves: AR-NLL is ``nll_reference``.

    Args:
        protocol: Seed and number of continuations.
        tasks: Those that were drawn.
        windows: Held-out text.
        tokenizer: The model's.
        **measured: For :func:`ddlm.evaluation.measure.measure_row`.
    """
    rows = [
        measure_row(label, "unconditional", samples, no_mauve=no_mauve(windows, label), **measured)
        for label, samples in sanity_sets(windows, tokenizer, protocol.seed)
    ]
    count, length = windows.tokens.shape
    real = [
        measure_row(
            REAL,
            task_name(task, length),
            real_continuations(task, windows, tokenizer),
            groups=diversity.consecutive(count, protocol.continuations),
            no_mauve=SAME,
            **measured,
        )
        for task in dict.fromkeys(tasks)
        if task != "unconditional"
    ]
    return [rows[0], *real, *rows[1:]]


def real_continuations(task: str, windows: Windows, tokenizer: Tokenizer) -> list[Sample]:
    """The references of a task as if they had been written after their own prompts."""
    mask = is_noised(task, windows.tokens.shape[1]).tolist()
    texts = (make_sample(tokenizer, ids, mask, ids) for ids in windows.tokens.tolist())
    return [replace(text, reference=None) for text in texts]  # it would be scored twice


def unlike_rows(rows: Sequence[Row]) -> list[str]:
    """A line that says how much of a text the rows of each task count, where that differs."""
    counted: dict[int, dict[str, None]] = {}
    for row in rows:
        each = round(row.facts["generated_units"] / row.facts["samples"])
        counted.setdefault(each, {})[row.task] = None
    if len(counted) < 2:
        return []
    parts = [f"{', '.join(tasks)} {each}" for each, tasks in counted.items()]
    real = any(row.name == REAL for row in rows)
    beside = (
        " Real text has a row of each; the other sanity rows are whole windows." if real else ""
    )
    return [
        f"Tokens of a text that count: {'; '.join(parts)}. All measures but MAUVE compare within one task only.{beside}"
    ]


def sanity_sets(
    windows: Windows, tokenizer: Tokenizer, seed: int
) -> Iterable[tuple[str, list[Sample]]]:
    """Text whose scores are known to be good or bad, so that a gamed metric shows.

    Real text (other windows than the references where there are enough), the same with its tokens shuffled within
    each window, tokens drawn from the unigram distribution, and one window repeated.
    """
    rng = np.random.default_rng(seed)
    real = windows.tokens if _has_no_more(windows) else windows.more
    real = real[: len(windows.tokens)]
    flat = windows.tokens.ravel()
    sets = {
        REAL: real,
        "shuffled text": rng.permuted(real, axis=1),
        "unigram draws": rng.choice(flat, size=real.shape),
        "one line repeated": np.broadcast_to(real[0], real.shape),
    }
    every = [True] * real.shape[1]
    for label, ids in sets.items():
        yield label, [make_sample(tokenizer, row, every, None) for row in ids.tolist()]


def _has_no_more(windows: Windows) -> bool:
    return len(windows.more) < len(windows.tokens)  # fewer would not compare with the model's rows


def no_mauve(windows: Windows, label: str) -> str | None:
    """Why MAUVE of a sanity row would say nothing: a text compared with itself has 1 by construction."""
    if label == REAL and _has_no_more(windows):
        return "there is no further real text, and the reference compared with itself is 1"
    return None


def curve_settings(protocol: Protocol, generator: Generator) -> Iterable[tuple[str, Settings]]:
    """The points of the curves: name and settings."""
    if generator.diffusion:
        for value in protocol.noise_scales:
            yield f"noise scale {value:g}", replace(protocol.settings, noise_scale=value)
    for value in protocol.temperatures:
        yield f"temperature {value:g}", replace(protocol.settings, temperature=value)
