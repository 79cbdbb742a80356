"""Seconds of a model's own samplings: those that its rows on the page of results were written with.

``ddlm benchmark sample`` compares step counts and peers. This measures what a reader of the page would wait for: each
sampling, rounds of refinement among it, over a queue, to its last step and with the paper's early exit, in turns with
the autoregressive peer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ddlm.benchmark.cases import autoregressive
from ddlm.benchmark.sample import patience
from ddlm.benchmark.timing import turns
from ddlm.checkpoint import load_model
from ddlm.device import AnyPrecision, product_dtype, resolve_precision
from ddlm.network.inference import InferenceDenoiser
from ddlm.sampling import Engine, halting, make_request
from ddlm.types import ConfigError

PEER = "gpt_neox"


def measure_speed(
    model: str | Path,
    samplings: Sequence[Mapping[str, Any]],
    *,
    queue: int = 32,
    slots: int = 16,
    rounds: int = 3,
    precision: AnyPrecision = "auto",
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time a trained model's samplings and write a record.

    Args:
        model: Trained model.
        samplings: What :func:`ddlm.sampling.make_request` takes, ``halt`` left out: ``steps``, ``solver``,
            ``temperature``, ``noise_scale``, ``refine``.
        queue: Sequences of a measurement, of the model's length.
        slots: Sequences at once, of the peer too.
        rounds: Measurements of each; medians are reported.
        precision: Of every candidate; auto: bf16 where the device has it.
        out: Record to write (JSON).
        say: Receives lines of progress.

    Returns:
        ``samplings``: for each its settings, ``plain`` and ``patience`` (``seconds`` and ``mean_steps`` of a sequence,
        ``all_seconds``), and ``patience_steps``, the paper's 25 of 200 as the same share of the steps. ``peer``: the
        same of GPT-NeoX of the model's sizes with a key-value cache, ``name``, ``seconds``, ``all_seconds``.

    Raises:
        ConfigError: when there is no sampling to measure.
    """
    from ddlm.record import make_record, write_record

    if not samplings:
        raise ConfigError(f"no sampling of {model} to measure: name at least one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(precision, device)
    dtype = product_dtype(precision, device)
    loaded = load_model(model)
    sizes, process = loaded.config.model, loaded.model.process
    denoiser = InferenceDenoiser(loaded.model, dtype, device)
    tokens, full = torch.zeros(sizes.length).long(), torch.ones(sizes.length, dtype=torch.bool)
    peer = autoregressive(PEER, sizes, sizes.length, dtype, device, budget=float("inf"))

    engine = Engine(denoiser, process, slots=slots, length=sizes.length)

    def own(which: tuple[int, bool]) -> tuple[float, float]:
        settings, early = dict(samplings[which[0]]), which[1]
        halt = halting.Patience(patience(settings["steps"])) if early else None
        requests = [
            make_request(tokens, full, process, halt=halt, seed=i, **settings) for i in range(queue)
        ]
        start = time.perf_counter()
        made = statistics.mean(result.steps for result in engine.run(requests))
        return (time.perf_counter() - start) / queue, made

    found: dict[tuple[int, bool] | str, list[tuple[float, float]]] = {
        (i, early): [] for i in range(len(samplings)) for early in (False, True)
    }
    found[PEER] = []
    for order in turns(list(found), rounds):
        for which in order:
            if isinstance(which, str):
                timing = peer.measure(sizes.length, slots)
                assert timing is not None
                found[which].append((timing.seconds / slots, timing.steps))
            else:
                found[which].append(own(which))
            say(f"{_name(which, samplings)}: {found[which][-1][0]:.3f} s a sequence")
    results: dict[str, Any] = {
        "precision": precision,
        "length": sizes.length,
        "queue": queue,
        "slots": slots,
        "rounds": rounds,
        "samplings": [
            {
                "settings": dict(settings),
                "plain": _measured(found[i, False]),
                "patience": _measured(found[i, True]),
                "patience_steps": patience(settings["steps"]),
            }
            for i, settings in enumerate(samplings)
        ],
        "peer": {"name": PEER} | _measured(found[PEER]),
    }
    if out is not None:
        about = {"model": str(model), "sizes": asdict(sizes)}
        write_record(out, make_record("sampling-speed", about, results, seed=0))
    return results


def _measured(found: Sequence[tuple[float, float]]) -> dict[str, Any]:
    seconds = [s for s, _ in found]
    return {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "mean_steps": found[-1][1],  # of the same seeds in every round
    }


def _name(which: tuple[int, bool] | str, samplings: Sequence[Mapping[str, Any]]) -> str:
    if isinstance(which, str):
        return which
    settings = ", ".join(f"{key} {value}" for key, value in samplings[which[0]].items())
    return settings + (", early exit" if which[1] else "")
