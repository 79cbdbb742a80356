"""``ddlm benchmark sample``: seconds a sequence beside GPT-NeoX and GPT-2 (DDLM, section 4.3 and Figure 3, right).

All candidates run in one process, in the same precision, and take turns round by round in alternating order; medians
are reported, since a shared machine's speed drifts within a run. A case whose whole measurement would take longer
than its budget is timed over fewer solver steps and multiplied out (every step costs the same; ``measured_steps``
says so), and the peers' cases that would take longer are left out (null): nothing is extrapolated over lengths.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ddlm.benchmark.timing import (
    peak_memory,
    time_attention,
    time_products,
    timed,
    turns,
    write_profile,
)
from ddlm.config import Config, ModelConfig
from ddlm.device import AnyPrecision, product_dtype, resolve_precision
from ddlm.diffusion.process import NoiseProcess
from ddlm.network.denoiser import DDLM
from ddlm.network.inference import InferenceDenoiser
from ddlm.sampling import Engine, Request, halting, make_request
from ddlm.training.flops import Product, attention_flops, block_products

LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
BATCHES = (1, 8, 64)
STEPS = (50, 200)
PEERS = ("gpt_neox", "gpt2")
QUEUE, SLOTS = 512, 64
EXIT_STEPS = 200


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
        say: Receives lines of progress.

    Returns:
        ``cases`` (one entry for each candidate, length and batch: seconds_per_sequence, tokens_per_second,
        measured_steps), ``crossover`` (for each peer and step count at batch 1: lengths at which DDLM is faster),
        ``step`` (milliseconds of a step at batch 16 and L = 64, its matrix products alone, their ratio),
        ``early_exit`` (wall-clock and steps saved, medians over the rounds), ``peak_memory_bytes`` by candidate.
    """
    from ddlm.record import make_record, write_record

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(precision, device)
    dtype = product_dtype(precision, device)
    network, config = _network(model, config)
    denoiser, process = InferenceDenoiser(network, dtype, device), network.process
    results: dict[str, Any] = {"precision": precision, "trained": model is not None}
    results["step"] = step_cost(denoiser, process, config.model, dtype, rounds=max(rounds, 5))
    say(
        f"one step at batch 16, 64 tokens: {results['step']['ratio']:.2f} times its matrix products"
    )
    if profile is not None:
        engine = _filled(denoiser, process, 16, 64)
        write_profile(profile, engine.step, device)
    results["early_exit"] = early_exit(
        denoiser, process, config.model, model is not None, queue, slots, say, exit_steps, rounds
    )
    results["peak_memory_bytes"] = {"ddlm": peak_memory(device)}
    candidates: dict[str, Callable[[int, int], tuple[float, int] | None]] = {
        f"ddlm {steps}": _ddlm(denoiser, process, steps, budget) for steps in STEPS
    }
    if peers:
        for name in PEERS:
            candidates[name] = _peer(name, config.model, max(lengths), dtype, device, budget)
    results["cases"] = _cases(candidates, lengths, batches, rounds, say)
    results["peak_memory_bytes"]["all"] = peak_memory(device)
    results["crossover"] = crossover(results["cases"])
    if out is not None:
        settings = {
            "model": model,
            "sizes": config.model,
            "rounds": rounds,
            "budget": budget,
            "queue": queue,
            "exit_steps": exit_steps,
        }
        write_record(out, make_record("benchmark-sample", settings, results, seed=0))
    return results


def step_cost(
    denoiser: InferenceDenoiser,
    process: NoiseProcess,
    model: ModelConfig,
    dtype: torch.dtype,
    batch: int = 16,
    length: int = 64,
    rounds: int = 5,
) -> dict[str, float]:
    """Milliseconds of one engine step, of its matrix products alone (attention's included), and their ratio."""
    device = denoiser.embeddings().device
    tokens = batch * length
    products = block_products(model, tokens)
    head = model.width + (model.embedding_width if model.likelihood_head else 0)
    products += [Product(tokens, head, model.vocab_size)]
    expectation = [
        Product(tokens, model.vocab_size, model.embedding_width)
    ]  # in float32 whatever the precision
    engine = _filled(denoiser, process, batch, length, steps=rounds + 3)
    for _ in range(2):
        engine.step()
    own, alone, ratios = [], [], []
    for _ in range(rounds):
        own.append(timed(engine.step, device))
        bare = time_products(products, device, dtype) + time_products(
            expectation, device, torch.float32
        )
        alone.append(bare + time_attention(model, batch, length, device, dtype))
        ratios.append(own[-1] / alone[-1])
    flops = sum(p.flops for p in products + expectation)
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
) -> dict[str, Any]:
    """What early exit saves in seconds against what it saves in steps, over a queue.

    ``spread``: exits at steps drawn evenly from 30% to 100% (any model shows what the engine makes of them);
    ``patience``: the paper's criterion, n_p = 25, on a trained model; ``plain half``: half the steps, none saved.
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
    for order in turns(list(kinds), rounds):
        for name in order:
            allowed, halt = kinds[name]
            requests = [
                _request(process, model.length, allowed, halt(i), seed=i) for i in range(queue)
            ]
            engine = Engine(denoiser, process, slots=slots, length=model.length)
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
                n for n in lengths if (peer, n) in seconds and seconds[own, n] < seconds[peer, n]
            ]
            for peer in sorted(names)
            if not peer.startswith("ddlm")
        }
        for own in sorted(names)
        if own.startswith("ddlm")
    }


def _cases(
    candidates: dict[str, Callable[[int, int], tuple[float, int] | None]],
    lengths: Sequence[int],
    batches: Sequence[int],
    rounds: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    cases = []
    for batch in batches:
        for length in lengths:
            times: dict[str, list[float]] = {name: [] for name in candidates}
            counted: dict[str, int] = {}
            for order in turns(list(candidates), rounds):
                for name in order:
                    found = candidates[name](length, batch)
                    if found is not None:
                        times[name].append(found[0])
                        counted[name] = found[1]
            for name, seconds in times.items():
                each = statistics.median(seconds) / batch if seconds else None
                cases.append(
                    {
                        "candidate": name,
                        "length": length,
                        "batch": batch,
                        "seconds_per_sequence": each,
                        "tokens_per_second": None if each is None else length / each,
                        "spread": [min(seconds) / batch, max(seconds) / batch] if seconds else None,
                        "measured_steps": counted.get(name),
                    }
                )
            shown = ", ".join(
                f"{n} {statistics.median(t) / batch:.3f} s" for n, t in times.items() if t
            )
            say(f"batch {batch}, {length} tokens: {shown} a sequence")
    return cases


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


def _request(
    process: NoiseProcess,
    length: int,
    steps: int,
    halt: halting.Criterion | None = None,
    seed: int = 0,
) -> Request:
    full = torch.ones(length, dtype=torch.bool)
    return make_request(
        torch.zeros(length).long(), full, process, steps=steps, halt=halt, seed=seed
    )


def _filled(
    denoiser: InferenceDenoiser, process: NoiseProcess, batch: int, length: int, steps: int = 50
) -> Engine:
    engine = Engine(denoiser, process, slots=batch, length=length)
    for seed in range(batch):
        engine.submit(_request(process, length, steps, seed=seed))
    return engine


def _ddlm(
    denoiser: InferenceDenoiser, process: NoiseProcess, steps: int, budget: float
) -> Callable[[int, int], tuple[float, int]]:
    def run(length: int, batch: int) -> tuple[float, int]:
        engine = _filled(denoiser, process, batch, length, steps)
        start = time.perf_counter()
        made = 0
        while engine.busy and (made < 3 or time.perf_counter() - start < budget):
            engine.step()
            made += 1
        return (time.perf_counter() - start) * steps / made, made

    return run


def _peer(
    name: str,
    model: ModelConfig,
    longest: int,
    dtype: torch.dtype,
    device: torch.device,
    budget: float,
) -> Callable[[int, int], tuple[float, int] | None]:
    """transformers' ``generate`` with its KV cache, sampling ``length`` tokens after one."""
    from ddlm.evaluation.autoregressive import Architecture, untrained

    torch.manual_seed(0)
    endless = {"bos_token_id": 0, "eos_token_id": None}  # every sequence takes its whole length
    architecture: Architecture = "gpt-neox" if name == "gpt_neox" else "gpt2"
    network = untrained(architecture, asdict(model), longest + 1, **endless)
    network = network.to(device, dtype).eval()
    too_long: set[tuple[int, int]] = set()

    def run(length: int, batch: int) -> tuple[float, int] | None:
        if any(length >= n and batch >= b for n, b in too_long):
            return None
        start = time.perf_counter()
        prompt = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        with torch.no_grad():
            made = network.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=length,
                max_new_tokens=length,
                do_sample=True,
                use_cache=True,
                pad_token_id=0,
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        assert made.shape == (batch, length + 1)
        seconds = time.perf_counter() - start
        if 2 * seconds > budget:  # the next length takes at least twice as long
            too_long.add((length * 2, batch))
        return seconds, length

    return run
