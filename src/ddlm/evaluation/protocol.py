"""The paper's evaluation protocol (DDLM, section 3.2): prompts, tasks, continuations, sanity rows and curves.

Axes: N prompts, T positions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddlm.data.shards import TokenShards
from ddlm.data.sources import document_hash, documents
from ddlm.data.tokenizer import Tokenizer
from ddlm.evaluation.generators import Generator, Settings
from ddlm.evaluation.judges import Judge
from ddlm.evaluation.mauve import Featurizer
from ddlm.evaluation.measure import Progress, Row, Units, measure_row
from ddlm.evaluation.samples import Sample, read_samples, write_samples
from ddlm.types import DataError, local

Ids = npt.NDArray[np.int64]

_AT_ONCE = 256  # documents of raw text that are tokenised together


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
"""Name of the row of real text."""


@dataclass(frozen=True)
class Windows:
    """Held-out text.

    Attributes:
        tokens: Windows that prompts and references come from ``(N, T)``.
        more: Further windows, for the row of real text ``(M, T)``.
        hashes: Hashes of all documents they come from.
        source: Where they come from.
    """

    tokens: Ids
    more: Ids
    hashes: list[int]
    source: str


@dataclass(frozen=True)
class Report:
    """What a protocol found: the rows of the table and the points of the curves."""

    rows: list[Row]
    curves: list[Row]
    facts: dict[str, Any]


def held_out(source: str | Path, tokenizer: Tokenizer, length: int, count: int) -> Windows:
    """Cut held-out windows, each within one document: first one of every document, then a second one, and so on.

    Args:
        source: A folder of prepared data (its held-out split) or files of raw text.
        tokenizer: The model's.
        length: Tokens T of a window.
        count: Windows wanted for prompts; as many again are taken for the row of real text where there are.

    Raises:
        DataError: if there are fewer than two windows, or the data was prepared with another tokenizer.
    """
    # Where so many documents have a window, one of each is all that is taken: the rest is never read.
    found = list(islice(_long_enough(source, tokenizer, length), 2 * count))
    windows: list[Ids] = []
    used: set[int] = set()
    turn = 0
    while len(windows) < 2 * count:
        before = len(windows)
        for h, ids in found:
            if len(ids) >= (turn + 1) * length and len(windows) < 2 * count:
                windows.append(ids[turn * length : (turn + 1) * length])
                used.add(h)
        turn += 1
        if len(windows) == before:
            break
    if len(windows) < 2:
        raise DataError(
            f"the held-out text of {source} has {len(windows)} windows of {length} tokens: give more text"
        )
    first = min(count, len(windows))
    stacked = np.stack(windows)
    return Windows(stacked[:first], stacked[first:], sorted(used), str(source))


def _long_enough(
    source: str | Path, tokenizer: Tokenizer, length: int
) -> Iterator[tuple[int, Ids]]:
    """Hash and ids of each held-out document of at least ``length`` tokens, in their order."""
    folder = local(source)
    if (folder / "index.json").is_file() or (folder / "prepare.json").is_file():
        shards = TokenShards(source)
        if shards.tokenizer_hash != tokenizer.hash:
            raise DataError(
                f"{source} was prepared with another tokenizer than the model's: give raw text or prepare it with the"
                " model folder as tokenizer"
            )
        hashes, ends = shards.document_hashes("val"), shards.document_ends("val").astype(np.int64)
        lengths = np.diff(ends, prepend=0) - 1  # without the end token
        for i in np.flatnonzero(lengths >= length):
            stop = int(ends[i]) - 1
            yield int(hashes[i]), shards.read("val", stop - int(lengths[i]), stop)
        return
    texts = (d.text for d in documents(str(source)))
    while some := list(islice(texts, _AT_ONCE)):
        for text, row in zip(some, tokenizer.encode_batch(some), strict=True):
            if len(row) >= length:
                yield document_hash(text), np.asarray(row, np.int64)


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
    for task in protocol.tasks:
        if task == "infill" and not generator.fills:
            continue
        samples = draw(
            protocol, task, generator, tokenizer, windows, folder, protocol.settings, progress
        )
        rows.append(measure_row(name, task_name(task, protocol.length), samples, **common))
    if protocol.sanity:
        for label, samples in sanity_sets(windows, tokenizer, protocol.seed):
            why = no_mauve(windows, label)
            rows.append(measure_row(label, "unconditional", samples, no_mauve=why, **common))
    common["features"] = None
    curves = []
    small = replace(protocol, prompts=min(protocol.curve_prompts, len(windows.tokens)))
    for label, settings in curve_settings(protocol, generator):
        samples = draw(
            small, "unconditional", generator, tokenizer, windows, folder, settings, progress
        )
        curves.append(measure_row(label, "unconditional", samples, **common))
    facts = {
        "prompts": len(windows.tokens),
        "prompts_wanted": protocol.prompts,
        "further_real_windows": len(windows.more),
        "documents": len(windows.hashes),
        "held_out": windows.source,
        "model": generator.fingerprint,
        "judge": None if judge is None else judge.describe(),
        "features": None if features is None else features.describe(),
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
) -> list[Sample]:
    """All samples of a task: one file a seed, kept and read again when it is there.

    Raises:
        OSError: when a file cannot be written.
    """
    tokens = torch.from_numpy(windows.tokens[: protocol.prompts])
    noised = is_noised(task, protocol.length).expand(len(tokens), -1)
    key = hashlib.sha256(
        json.dumps(
            [generator.fingerprint, task, asdict(settings), protocol.seed, tokens.tolist()]
        ).encode()
    ).hexdigest()[:12]
    out: list[Sample] = []
    for k in range(protocol.continuations):
        file = folder / f"{task_name(task, protocol.length)}-{key}-seed{k}.jsonl"
        if file.is_file():
            out += read_samples(file)
            continue
        seeds = [sample_seed(protocol.seed, k, task, i) for i in range(len(tokens))]
        made = []
        for i, written in enumerate(generator.write(tokens, noised, seeds, settings)):
            reference = tokens[i].tolist() if task != "unconditional" else None
            made.append(make_sample(tokenizer, written.tokens, noised[i].tolist(), reference))
            made[-1] = replace(made[-1], seed=k, steps=written.steps, reason=written.reason)
            if progress is not None:
                progress(f"{task} seed {k}", i + 1, len(tokens))
        write_samples(file, made)
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
    after = decode(tokenizer, ids[stop:]).lstrip("\ufffd")
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
