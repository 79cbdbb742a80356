"""``ddlm benchmark sample``: seconds a sequence beside GPT-NeoX and GPT-2 (DDLM, section 4.3 and Figure 3, right).

All candidates run in one process, in the same precision, and take turns round by round in alternating order; medians
are reported, since a shared machine's speed drifts within a run. Without early exit every solver step costs the same:
some are timed and multiplied out (``measured_steps`` says how many). Cases of the peers and of early exit that would
take longer than their budget are left out (null): nothing is extrapolated over lengths.

Early exit is the paper's criterion, no switch of a token for n_p = 25 of 200 steps. Of 50 steps it is 6, the same share
of the way from noise to text: steps of a coarser grid are longer, and 25 of them would be half of all. When untrained
weights settle says nothing, so early exit takes part with a trained model only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ddlm.benchmark.cases import (
    Candidate,
    autoregressive,
    diffusion,
    filled,
    full_request,
    measure_cases,
    new_engine,
    warm_up,
)
from ddlm.benchmark.timing import (
    peak_memory,
    step_products,
    time_step_products,
    timed,
    turns,
    write_profile,
)
from ddlm.config import Config, ModelConfig
from ddlm.device import AnyPrecision, product_dtype, resolve_precision
from ddlm.diffusion.process import NoiseProcess
from ddlm.network.denoiser import DDLM
from ddlm.network.inference import InferenceDenoiser
from ddlm.sampling import halting
from ddlm.training.flops import attention_flops

LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
BATCHES = (1, 8, 64)
STEPS = (50, 200)
PEERS = ("gpt_neox", "gpt2")
QUEUE, SLOTS = 512, 64
EXIT_STEPS = 200
PATIENCE = 25, 200  # n_p, and the steps that the paper has it for


def benchmark_sample(
    model: str | None = None,
    *,
    config: Config | None = None,
    rounds: int = 3,
    peers: bool = True,
    out: Path | None = None,
    profile: Path | None = None,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = BATCHES,
    queue: int = QUEUE,
    slots: int = SLOTS,
    exit_steps: int = EXIT_STEPS,
    budget: float = 60.0,
    precision: AnyPrecision = "auto",
    compile: bool = False,
    graphs: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure generation and write a record.

    Args:
        model: Trained model to sample from, or None for random weights of ``config`` (speed needs no training; how
            early sequences exit does).
        config: Sizes, when no model is named.
        rounds: Measurements of each case.
        peers: Measure transformers' GPT-NeoX and GPT-2 of the same size, with a KV cache.
        out: Record to write (JSON).
        profile: Folder for a profile of one step.
        lengths: Sequence lengths in tokens.
        batches: Sequences at once.
        queue: Requests of the early-exit measurement.
        slots: Slots of the early-exit measurement.
        exit_steps: Steps allowed in the early-exit measurement.
        budget: Longest measurement of one case, in seconds.
        precision: ``auto``, ``bf16`` or ``fp32``, of every candidate; auto: bf16 where the device has it.
        compile: Compile DDLM's step, anew for every length and batch (each takes a minute or so, which is not counted).
        graphs: Launch DDLM's step as one on a CUDA device (:mod:`ddlm.sampling.graphs`).
        say: Receives lines of progress.

    Returns:
        ``cases`` (one entry for each candidate, length and batch, see :func:`ddlm.benchmark.cases.measure_cases`),
        ``crossover`` (for each peer and step count at batch 1: lengths at which DDLM is faster), ``step``
        (milliseconds of a step at batch 16 and L = 64, its matrix products alone, their ratio), ``early_exit``
        (wall-clock and steps saved over a queue, medians over the rounds), ``peak_memory_bytes`` by candidate (the
        largest of its cases, and as ``ddlm`` that of the process over the queue, before there is any peer).
    """
    from ddlm.record import make_record, write_record

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(precision, device)
    dtype = product_dtype(precision, device)
    network, config = _network(model, config)
    denoiser, process = InferenceDenoiser(network, dtype, device), network.process
    del network  # the denoiser has a copy: memory is counted without the original
    how: dict[str, Any] = {"compile": compile, "graphs": graphs and device.type == "cuda"}
    results: dict[str, Any] = {"precision": precision, "trained": model is not None} | how
    results["step"] = step_cost(
        denoiser, process, config.model, dtype, rounds=max(rounds, 5), **how
    )
    say(
        f"one step at batch 16, 64 tokens: {results['step']['ratio']:.2f} times its matrix products"
    )
    if profile is not None:
        engine = filled(denoiser, process, 16, 64, **how)
        write_profile(profile, engine.step, device)
    results["early_exit"] = early_exit(
        denoiser,
        process,
        config.model,
        model is not None,
        queue,
        slots,
        say,
        exit_steps,
        rounds,
        **how,
    )
    results["peak_memory_bytes"] = {"ddlm": peak_memory(device)}
    candidates: dict[str, Candidate] = {}
    for steps in STEPS:
        candidates[f"ddlm {steps}"] = diffusion(denoiser, process, steps, budget, **how)
        if model is not None:
            settled = patience(steps)
            candidates[f"ddlm {steps} patience {settled}"] = diffusion(
                denoiser, process, steps, budget, settled, **how
            )
    if peers:
        for name in PEERS:
            candidates[name] = autoregressive(
                name, config.model, max(lengths), dtype, device, budget
            )
    results["cases"] = measure_cases(
        candidates, config.model, lengths, batches, rounds, device, dtype, say
    )
    for name in candidates:
        peaks = [c["peak_memory_bytes"] for c in results["cases"] if c["candidate"] == name]
        results["peak_memory_bytes"][name] = max((p for p in peaks if p is not None), default=None)
    results["crossover"] = crossover(results["cases"])
    if out is not None:
        settings = {
            "model": model,
            "sizes": config.model,
            "rounds": rounds,
            "budget": budget,
            "queue": queue,
            "exit_steps": exit_steps,
        } | how
        write_record(out, make_record("benchmark-sample", settings, results, seed=0))
    return results


def patience(steps: int) -> int:
    """The paper's patience, 25 of 200 steps, for another number of them: the same share of the way."""
    return max(1, round(PATIENCE[0] * steps / PATIENCE[1]))


def step_cost(
    denoiser: InferenceDenoiser,
    process: NoiseProcess,
    model: ModelConfig,
    dtype: torch.dtype,
    batch: int = 16,
    length: int = 64,
    rounds: int = 5,
    **options: Any,
) -> dict[str, float]:
    """Milliseconds of one engine step, of its matrix products alone (attention's included), and their ratio."""
    device = denoiser.embeddings().device
    tokens = batch * length
    engine = filled(denoiser, process, batch, length, steps=rounds + 3, **options)
    for _ in range(2):
        engine.step()
    own, alone, ratios = [], [], []
    for _ in range(rounds):
        own.append(timed(engine.step, device))
        alone.append(time_step_products(model, batch, length, device, dtype))
        ratios.append(own[-1] / alone[-1])
    products, expectation = step_products(model, tokens)
    flops = sum(p.flops for p in (*products, expectation))
    flops += attention_flops(model.width, model.layers, length, tokens)
    return {
        "batch": batch,
        "length": length,
        "milliseconds": 1e3 * statistics.median(own),
        "products_milliseconds": 1e3 * statistics.median(alone),
        "ratio": statistics.median(ratios),
        "flops": flops,
    }


def early_exit(
    denoiser: InferenceDenoiser,
    process: NoiseProcess,
    model: ModelConfig,
    trained: bool,
    queue: int = QUEUE,
    slots: int = SLOTS,
    say: Callable[[str], None] = print,
    steps: int = EXIT_STEPS,
    rounds: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """What early exit saves in seconds against what it saves in steps, over a queue.

    ``spread``: exits at steps drawn evenly from 30% to 100% (any model shows what the engine makes of them);
    ``patience``: the paper's criterion, n_p = 25, on a trained model; ``plain half``: half the steps, none saved.
    All go through one engine, which has made what it makes once for each number of rows before any clock starts.
    """
    exits = torch.randint(
        max(1, int(0.3 * steps)), steps + 1, (queue,), generator=torch.Generator().manual_seed(0)
    )
    kinds: dict[str, tuple[int, Callable[[int], halting.Criterion | None]]] = {
        "plain": (steps, lambda i: None),
        "spread": (steps, lambda i: halting.Fixed(int(exits[i]))),
    }
    if trained:
        kinds["patience"] = (steps, lambda i: halting.Patience(25))
        kinds["plain half"] = (max(1, steps // 2), lambda i: None)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    made: dict[str, float] = {}
    engine = new_engine(denoiser, process, slots, model.length, **options)
    if engine.device.type != "cpu" or options.get("compile"):
        for rows in engine.sizes or (slots,):
            warm_up(
                engine, [full_request(process, model.length, steps, seed=i) for i in range(rows)]
            )
    for order in turns(list(kinds), rounds):
        for name in order:
            allowed, halt = kinds[name]
            requests = [
                full_request(process, model.length, allowed, halt(i), seed=i) for i in range(queue)
            ]
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
            start = time.perf_counter()
            made[name] = statistics.mean(result.steps for result in engine.run(requests))
            seconds[name].append(time.perf_counter() - start)
            say(f"early exit, {name}: {seconds[name][-1]:.1f} s, {made[name]:.0f} steps")
    measured: dict[str, Any] = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "all_seconds": seconds[name],
            "mean_steps": made[name],
        }
        for name in kinds
    }
    for name in set(measured) & {"spread", "patience"}:
        pairs = zip(seconds[name], seconds["plain"], strict=True)
        time_saved = statistics.median(1 - own / full for own, full in pairs)  # round by round
        steps_saved = 1 - made[name] / made["plain"]
        measured[name] |= {
            "time_saved": time_saved,
            "steps_saved": steps_saved,
            "efficiency": time_saved / steps_saved if steps_saved > 0 else None,
        }
    return {
        "queue": queue,
        "slots": slots,
        "steps": steps,
        "length": model.length,
        "rounds": rounds,
    } | measured


def crossover(cases: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """Lengths at which DDLM is faster than each peer at batch 1: ``{"ddlm 50": {"gpt_neox": [64, 128]}}``."""
    seconds = {
        (c["candidate"], c["length"]): c["seconds_per_sequence"]
        for c in cases
        if c["batch"] == 1 and c["seconds_per_sequence"] is not None
    }
    lengths = sorted({length for _, length in seconds})
    names = {name for name, _ in seconds}
    return {
        own: {
            peer: [
                n
                for n in lengths
                if {(own, n), (peer, n)} <= seconds.keys() and seconds[own, n] < seconds[peer, n]
            ]
            for peer in sorted(names)
            if not peer.startswith("ddlm")
        }
        for own in sorted(names)
        if own.startswith("ddlm")
    }


def _network(model: str | None, config: Config | None) -> tuple[DDLM, Config]:
    if model is not None:
        from ddlm.checkpoint import load_model

        loaded = load_model(model)
        return loaded.model, loaded.config
    from ddlm.config import load_config

    config = config or load_config("base")
    torch.manual_seed(0)
    return DDLM(
        config.model, NoiseProcess(config.process.t_min, config.process.t_max)
    ).eval(), config
