"""What :mod:`ddlm.study` measures on a model: traced sequences, quality at early exits, the loss over t, its data.

S sequences, n steps, T positions, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddlm.analysis.record import QUANTITIES, Array
from ddlm.analysis.trajectories import Trajectories
from ddlm.config import config_to_dict, read_config
from ddlm.data.shards import INDEX, TokenShards
from ddlm.data.tokenizer import Tokenizer
from ddlm.evaluation.intervals import t_quantile
from ddlm.lm import DiffusionLM
from ddlm.sampling.text import generated_ranges
from ddlm.types import ConfigError

REPLAYED = 6  # sequences whose entropies are kept token by token, for the slider of the report
LEVELS, WINDOWS = 24, 64  # of the loss curve: noise levels, held-out windows
COUNTED = 5_000_000  # tokens of the training text that are counted for the frequency bands
PROMPTS, CONTINUATIONS = 4, 2
_SEED = 20230518  # of held-out masks and noise, as in validation


def trace_sequences(
    lm: DiffusionLM,
    template: str | None = None,
    *,
    sequences: int,
    steps: int,
    noise_scale: float = 1.0,
    seed: int = 0,
    slots: int = 32,
    on_sequence: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Record sequences without early exit; arrays and header of a ``trajectories`` record.

    Each trajectory is condensed as soon as it has ended, so memory holds the trajectories of the sequences at work, and
    of the rest their tokens and means.

    Raises:
        ConfigError: for a template that does not fit the model.
    """
    text = template if template is not None else f"{{{lm.length}}}"
    lm.request(text)  # refuses what is longer than the model, before anything is sampled
    parts: dict[str, list[Array]] = {}
    places: dict[str, _Mean] = {}
    used: set[int] = set()
    texts: list[str] = []
    # no refinement, which is in no trajectory: the texts are those of its last step
    for generated in lm.iterate(
        [text],
        sequences,
        steps=steps,
        noise_scale=noise_scale,
        seed=seed,
        slots=slots,
        trace=True,
        refine=0,
    ):
        (trace,) = generated.traces
        parts.setdefault("tokens", []).append(
            trace.tokens.numpy().astype(
                np.uint16 if lm.config.model.vocab_size <= 2**16 else np.int32
            )
        )
        parts.setdefault("generated", []).append(trace.generated.numpy())
        for q in QUANTITIES:
            if getattr(trace, q) is None:
                continue
            mean, deviation = trace.mean(q)
            parts.setdefault(f"mean_{q}", []).append(mean.numpy())
            parts.setdefault(f"std_{q}", []).append(deviation.numpy())
            places.setdefault(q, _Mean()).add(getattr(trace, q).numpy())
        for q in ("sequence_score_cosine", "sequence_x_cosine"):
            parts.setdefault(q, []).append(getattr(trace, q).numpy())
        if len(texts) < REPLAYED:
            parts.setdefault("replay_entropy", []).append(trace.entropy.numpy().astype(np.float16))
            used |= set(trace.tokens.unique().tolist())
        texts.append(generated.text)
        used |= set(trace.tokens[-1].tolist())
        on_sequence(len(texts))
    arrays = {name: np.stack(values) for name, values in parts.items()}
    arrays["times"] = trace.times.numpy()
    for q, mean_of in places.items():
        arrays[f"position_{q}"] = mean_of.value()
    known = sorted(used)
    header = {
        "steps": steps,
        "noise_scale": float(noise_scale),
        "sequences": len(texts),
        "template": text,
        "solver": lm.config.sample.solver,
        "grid": lm.config.sample.grid,
        "temperature": lm.config.sample.temperature,
        "t_min": lm.process.t_min,
        "t_max": lm.process.t_max,
        "embedding_width": lm.config.model.embedding_width,
        "exact_cosines": trace.exact,
        "texts": texts,
        "pieces": dict(zip(map(str, known), lm.tokenizer.pieces(known), strict=True)),
        "config": config_to_dict(lm.config),
    }
    return arrays, header


class _Mean:
    """Mean of arrays that come one after the other, over what is finite in them; none of them is kept."""

    def __init__(self) -> None:
        self._total: Any = 0.0
        self._count: Any = 0

    def add(self, values: Array) -> None:
        known = np.isfinite(values)
        self._total = self._total + np.where(known, values, 0).astype(np.float64)
        self._count = self._count + known

    def value(self) -> Array:
        """float32; NaN where nothing was measured."""
        mean = self._total / np.maximum(self._count, 1)
        return np.where(self._count > 0, mean, np.nan).astype(np.float32)


def quality_rows(
    lm: DiffusionLM, drawn: Trajectories, patience: Sequence[int], judge: Any
) -> list[dict[str, Any]]:
    """One row without early exit and one for each patience: an exit at step k gives the tokens of look k.

    Everything is measured on the generated part; the judge reads what a template gives before it. ``nll`` is in nats
    per judge token over all texts together; ``nll_error`` its standard error over texts, ``nll_half_width`` half of the
    95% interval.
    """
    from ddlm.evaluation.diversity import distinct, repetition_rate, table
    from ddlm.evaluation.protocol import decode as decode_documents

    decode = partial(decode_documents, lm.tokenizer)
    n = len(drawn.steps)
    rows = []
    for n_p in (None, *(p for p in patience if p < n)):
        exits = drawn.exit_steps("fixed", n) if n_p is None else drawn.exit_steps("patience", n_p)
        tokens = drawn.tokens_at(exits).astype(np.int64)
        ids = table([list(t[g]) for t, g in zip(tokens, drawn.generated, strict=True)])
        row: dict[str, Any] = {
            "steps": n,
            "patience": n_p,
            "performed": float(exits.mean()),
            "performed_std": float(exits.std()),
            "agreement": float(drawn.agreement(exits).mean()),
            "distinct_1": float(distinct(ids, 1, np.arange(len(ids))).mean()),
            "repetition": float(repetition_rate(ids).mean()),
        }
        if judge is not None:
            texts, ranges = [], []
            for ids, noised in zip(tokens.tolist(), drawn.generated.tolist(), strict=True):
                text = decode(ids)
                written = generated_ranges(ids, noised, text, decode)
                if any(
                    b > a for a, b in written
                ):  # blank ones too: what early exit leaves is judged
                    texts.append(text)
                    ranges.append(written)
            scores = judge.score(texts, ranges)
            row |= nll_of([s.nll for s in scores], [s.tokens for s in scores])
            row["texts_judged"] = len(texts)
        rows.append(row)
    return rows


def nll_of(nats: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    """Mean nats per token and its standard error over texts (of a ratio of means)."""
    if not tokens:
        return {"nll": None, "nll_error": None, "nll_half_width": None, "nll_tokens": 0}
    a, b = np.asarray(nats), np.asarray(tokens, dtype=float)
    mean = a.sum() / b.sum()
    spread = (a - mean * b).std(ddof=1) / b.mean() / math.sqrt(len(b)) if len(b) > 1 else None
    return {
        "nll": float(mean),
        "nll_error": None if spread is None else float(spread),
        "nll_half_width": None if spread is None else float(t_quantile(len(b) - 1) * spread),
        "nll_tokens": int(b.sum()),
    }


def recording_cost(
    lm: DiffusionLM, sequences: int = 16, steps: int = 24, rounds: int = 3
) -> dict[str, Any]:
    """Seconds of sampling with and without a trace, in alternating order, and the ratio of the medians.

    On a CPU the seconds are those the process was at work, which other programs of the machine hardly change.
    """
    clock = time.process_time if lm.device.type == "cpu" else time.perf_counter
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(rounds + 1):
        for traced in (False, True) if turn % 2 else (True, False):
            begin = clock()
            # no refinement: its rounds are in no trace and would only thin the cost out
            lm.generate(
                f"{{{lm.length}}}", sequences, steps=steps, trace=traced, slots=sequences, refine=0
            )
            if turn:  # the first round warms up
                seconds[traced].append(clock() - begin)
    ratio = statistics.median(seconds[True]) / statistics.median(seconds[False])
    return {
        "plain_seconds": seconds[False],
        "traced_seconds": seconds[True],
        "cost": ratio - 1,
        "sequences": sequences,
        "steps": steps,
        "device": str(lm.device),
    }


def find_text(folder: Path, data: str | None) -> tuple[TokenShards | None, Collection[str], str]:
    """The prepared text that a model is measured on, which of :data:`BESIDE` it allows, and why not the others.

    Args:
        folder: Of the model.
        data: Shards that were asked for; None: those the model was trained on, where they are, else no text.

    Raises:
        ConfigError: when what was asked for is missing, damaged or of another tokenizer.
    """
    without = "no loss curve, frequency bands and continuations; name prepared shards with --data"
    config = read_config(folder / "config.yaml")
    path = config.data.path if data is None else data
    if data is None and not (Path(path) / INDEX).is_file():
        return None, (), f"the text the model was trained on is not at hand: {without}"
    mine = Tokenizer.load(folder).to_bytes()
    try:
        shards = TokenShards(path)
        if shards.tokenizer.to_bytes() != mine:
            raise ConfigError(
                f"{path} was prepared with another tokenizer than the model's: prepare the text with the model's"
            )
    except ConfigError as error:
        if data is not None:
            raise
        # nobody asked for it: a relative path may lead to whatever lies there on this machine
        return None, (), f"the text where the model's was cannot be used ({error}): {without}"
    held_out, length = shards.tokens("val"), config.model.length
    if held_out < length:
        why = (
            f"the text has {held_out} held-out tokens, fewer than one sequence of {length}: no loss curve and no "
            "continuations; hold out more documents (val_fraction)"
        )
        return shards, [kind for kind in BESIDE if kind not in HELD_OUT], why
    return shards, BESIDE, ""


@torch.no_grad()
def _schedule(lm: DiffusionLM, shards: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    """Held-out cross-entropy over t, and the learned time warp beside it."""
    from ddlm.data.loader import validation_batches
    from ddlm.diffusion.objective import NoisedBatch, denoising_loss
    from ddlm.training.draws import draw_noise, draw_step

    (tokens,) = validation_batches(shards, length=lm.length, batch_size=WINDOWS, limit=WINDOWS)
    rows, length = tokens.shape
    draw = draw_step(_SEED, 0, rows, length, lm.config.mask)
    noise = draw_noise(_SEED, 0, range(rows), length, lm.config.model.embedding_width)
    times = np.linspace(lm.process.t_min, lm.process.t_max, LEVELS)
    losses = []
    for t in times:
        batch = NoisedBatch.make(tokens, draw.is_noised, torch.full((rows,), float(t)), noise)
        loss = denoising_loss(lm.model, lm.process, batch.to(lm.model.embedding.device))
        losses.append(loss.per_sequence.float().cpu().numpy())
    arrays = {"times": times, "cross_entropy": np.stack(losses)}
    if lm.time_warp is not None:
        t = torch.linspace(lm.process.t_min, lm.process.t_max, 400, dtype=torch.float64)
        arrays["warp_times"] = t.numpy()
        arrays["warp_fit"] = lm.time_warp.unnormalized_cdf(t).numpy()
        arrays["warp_cdf"] = lm.time_warp.cdf(t).numpy()
        arrays["warp_density"] = lm.time_warp.density(t).numpy()
    return {"windows": rows}, arrays


def _frequency(lm: DiffusionLM, shards: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    """How often each token occurs in the training text."""
    count = min(COUNTED, shards.tokens("train"))
    # the model may have more outputs than the tokenizer has entries
    size = lm.config.model.vocab_size
    counts = np.bincount(shards.read("train", 0, count), minlength=size)
    return {"tokens": int(count)}, {"counts": counts.astype(np.int64)}


def _samples(lm: DiffusionLM, shards: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    """Continuations of held-out text (Table 4)."""
    from ddlm.data.loader import validation_batches
    from ddlm.sampling.template import from_tokens

    half = lm.length // 2
    (windows,) = validation_batches(shards, length=lm.length, batch_size=PROMPTS, limit=PROMPTS)
    templates = [from_tokens(w[:half].tolist(), lm.length - half) for w in windows]
    rows = [
        {
            "tokens": g.tokens,
            "pieces": lm.tokenizer.pieces(g.tokens),
            "is_noised": g.is_noised,
            "steps": g.steps,
            "seed": g.seed,
        }
        for g in lm.iterate(templates, CONTINUATIONS)
    ]
    return {"rows": rows, "steps": lm.config.sample.steps}, {}


BESIDE = {"schedule": _schedule, "frequency": _frequency, "samples": _samples}
"""What is recorded from prepared text, by the kind of its record."""
HELD_OUT = ("schedule", "samples")
"""Those of them that need a window of held-out text."""
