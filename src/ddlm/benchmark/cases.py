"""The cases of ``ddlm benchmark sample``: every candidate at every length and batch, and what each of them costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ddlm.benchmark.timing import peak_memory, reset_peak_memory, time_step_products, turns
from ddlm.config import ModelConfig
from ddlm.diffusion.process import NoiseProcess
from ddlm.network.inference import InferenceDenoiser
from ddlm.sampling import Engine, Request, Result, halting, make_request
from ddlm.sampling.graphs import EAGER

TIMED_STEPS = 50  # every step without early exit costs the same: more of them tell nothing new
WARM_STEPS = EAGER + 2  # the last one is that of every later step
_PRODUCTS = "products"  # takes its turn among the candidates: the bound is of the same minutes


@dataclass(frozen=True)
class Timing:
    """One measurement of a case.

    Attributes:
        seconds: Of the whole batch with all steps it makes.
        steps: Steps a sequence makes, the mean of the batch; tokens, for an autoregressive model.
        measured: Steps that were timed; where they are fewer, ``seconds`` are multiplied out.
    """

    seconds: float
    steps: float
    measured: int


@dataclass(frozen=True)
class Candidate:
    """What takes part.

    Attributes:
        measure: Generates, for a length and a batch; None where that would take too long.
        weights: Bytes of its network, which lie in memory while others are measured.
        network: Which network that is: candidates may share one.
    """

    measure: Callable[[int, int], Timing | None]
    weights: int
    network: str


def diffusion(
    denoiser: InferenceDenoiser,
    process: NoiseProcess,
    steps: int,
    budget: float,
    patience: int | None = None,
    **options: bool,
) -> Candidate:
    """DDLM with so many steps, to the last one or with the paper's early exit.

    Without early exit every step costs the same: at most :data:`TIMED_STEPS` of them are timed, fewer where they would
    take longer than ``budget`` seconds, and multiplied out. With it nothing can be multiplied out, since only the last
    step tells when a sequence leaves: batches that are still at work after the budget are left out, and so are longer
    and larger ones. ``options`` are the engine's; what its first steps make once is made before the clock starts.
    """
    halt = None if patience is None else halting.Patience(patience)
    allowed = min(steps, TIMED_STEPS) if halt is None else steps
    too_long: set[tuple[int, int]] = set()

    def measure(length: int, batch: int) -> Timing | None:
        if any(length >= n and batch >= b for n, b in too_long):
            return None
        engine = filled(denoiser, process, batch, length, steps, halt, **options)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        start = time.perf_counter()
        made = 0
        ended: list[Result] = []
        while engine.busy and made < allowed:
            if made >= 3 and time.perf_counter() - start >= budget:
                break
            ended += engine.step()
            made += 1
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        seconds = time.perf_counter() - start
        if halt is None:
            return Timing(seconds * steps / made, steps, made)
        if engine.busy:
            too_long.add((length, batch))
            return None
        return Timing(seconds, statistics.mean(r.steps for r in ended), made)

    return Candidate(measure, _bytes_of(denoiser), "ddlm")


def autoregressive(
    name: str,
    model: ModelConfig,
    longest: int,
    dtype: torch.dtype,
    device: torch.device,
    budget: float,
) -> Candidate:
    """transformers' ``generate`` with its KV cache, sampling ``length`` tokens after one from the whole vocabulary."""
    from ddlm.evaluation.autoregressive import Architecture, untrained

    torch.manual_seed(0)
    endless = {"bos_token_id": 0, "eos_token_id": None}  # every sequence takes its whole length
    architecture: Architecture = "gpt-neox" if name == "gpt_neox" else "gpt2"
    network = untrained(architecture, asdict(model), longest + 1, **endless)
    network = network.to(device, dtype).eval()
    too_long: set[tuple[int, int]] = set()
    warm: set[tuple[int, int]] = set()

    def generate(length: int, batch: int) -> None:
        prompt = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        with torch.no_grad():
            made = network.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=length,
                max_new_tokens=length,
                do_sample=True,
                top_k=0,  # left out it is 50, a filter paid on every token that DDLM does not pay
                use_cache=True,
                pad_token_id=0,
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        assert made.shape == (batch, length + 1)

    def measure(length: int, batch: int) -> Timing | None:
        if any(length >= n and batch >= b for n, b in too_long):
            return None
        if device.type == "cuda" and (length, batch) not in warm:
            # attention of Hopper's cuDNN is planned anew for every length of the cache: some 50 ms a token, once
            generate(length, batch)
            warm.add((length, batch))
        start = time.perf_counter()
        generate(length, batch)
        seconds = time.perf_counter() - start
        if 2 * seconds > budget:  # the next length takes at least twice as long
            too_long.add((length * 2, batch))
        return Timing(seconds, length, length)

    weights = sum(p.nbytes for p in (*network.parameters(), *network.buffers()))
    return Candidate(measure, weights, name)


def measure_cases(
    candidates: Mapping[str, Candidate],
    model: ModelConfig,
    lengths: Sequence[int],
    batches: Sequence[int],
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Every candidate at every length and batch, in turns; medians over the rounds.

    Returns:
        One entry for each candidate and case: ``seconds_per_sequence``, ``tokens_per_second``, ``spread`` (fastest
        and slowest round), ``measured_steps``, ``mean_steps`` that a sequence makes (tokens, for an autoregressive
        model), ``products_seconds_per_sequence`` (DDLM: the matrix products of these steps alone, the lower bound) and
        ``peak_memory_bytes`` (most bytes held meanwhile, less the weights of the other networks; null where the system
        cannot tell). All null in a case that was left out.
    """
    resident = {c.network: c.weights for c in candidates.values()}
    cases = []
    for batch in batches:
        for length in lengths:
            timings: dict[str, list[Timing]] = {name: [] for name in candidates}
            peaks: dict[str, list[int]] = {name: [] for name in candidates}
            bare = []
            for order in turns([*candidates, _PRODUCTS], rounds):
                for name in order:
                    if name == _PRODUCTS:
                        bare.append(time_step_products(model, batch, length, device, dtype))
                        continue
                    own = candidates[name]
                    others = sum(resident.values()) - resident[own.network]
                    watched = reset_peak_memory(device)
                    if (found := own.measure(length, batch)) is not None:
                        timings[name].append(found)
                        peaks[name] += [peak_memory(device) - others] if watched else []
            cases += [
                _case(name, length, batch, timings[name], peaks[name], statistics.median(bare))
                for name in candidates
            ]
            say(f"batch {batch}, {length} tokens: {_shown(timings, batch)} a sequence")
    return cases


def _case(
    name: str, length: int, batch: int, timings: Sequence[Timing], peaks: Sequence[int], bare: float
) -> dict[str, Any]:
    case: dict[str, Any] = {"candidate": name, "length": length, "batch": batch}
    fields = ("seconds_per_sequence", "tokens_per_second", "spread", "measured_steps", "mean_steps")
    case |= dict.fromkeys((*fields, "products_seconds_per_sequence", "peak_memory_bytes"))
    if not timings:
        return case
    seconds = [t.seconds / batch for t in timings]
    each = statistics.median(seconds)
    case |= {
        "seconds_per_sequence": each,
        "tokens_per_second": length / each,
        "spread": [min(seconds), max(seconds)],
        "measured_steps": timings[-1].measured,
        "mean_steps": timings[-1].steps,  # of the same seeds in every round
        "peak_memory_bytes": max(peaks, default=None),
    }
    if name.startswith("ddlm"):
        case["products_seconds_per_sequence"] = bare * timings[-1].steps / batch
    return case


def _shown(timings: Mapping[str, Sequence[Timing]], batch: int) -> str:
    parts = []
    for name, found in timings.items():
        if found:
            seconds = statistics.median(t.seconds for t in found) / batch
            steps = f" ({found[-1].steps:.0f} steps made)" if "patience" in name else ""
            parts.append(f"{name} {seconds:.3f} s{steps}")
    return ", ".join(parts)


def full_request(
    process: NoiseProcess,
    length: int,
    steps: int,
    halt: halting.Criterion | None = None,
    seed: int = 0,
) -> Request:
    """A sequence written from nothing."""
    full = torch.ones(length, dtype=torch.bool)
    return make_request(
        torch.zeros(length).long(), full, process, steps=steps, halt=halt, seed=seed
    )


def filled(
    denoiser: InferenceDenoiser,
    process: NoiseProcess,
    batch: int,
    length: int,
    steps: int = 50,
    halt: halting.Criterion | None = None,
    **options: bool,
) -> Engine:
    """An engine, warmed up, with so many sequences waiting to be written from nothing; ``options`` are the engine's."""
    engine = new_engine(denoiser, process, batch, length, **options)
    requests = [full_request(process, length, steps, halt, seed=i) for i in range(batch)]
    if engine.device.type != "cpu" or options.get("compile"):
        warm_up(engine, requests)
    for request in requests:
        engine.submit(request)
    return engine


def new_engine(
    denoiser: InferenceDenoiser, process: NoiseProcess, slots: int, length: int, **options: bool
) -> Engine:
    """An engine as fast as it can be: rows follow the sequences at work, on a GPU too."""
    return Engine(denoiser, process, slots=slots, length=length, exact=False, **options)


def warm_up(engine: Engine, requests: Sequence[Request]) -> None:
    """Let an engine make what it makes once (kernels, compiled code, graphs) with the first steps of some requests."""
    keys = [engine.submit(request) for request in requests]
    for _ in range(WARM_STEPS):
        engine.step()
    for key in keys:
        engine.cancel(key)
    while engine.busy:
        engine.step()


def _bytes_of(denoiser: InferenceDenoiser) -> int:
    """Bytes of its weights, the table and the head that it keeps ready included."""
    network = denoiser.model
    stored = sum(p.nbytes for p in (*network.parameters(), *network.buffers()))
    head = network.head_weight().numel() * denoiser.dtype.itemsize
    return stored + denoiser.embeddings().nbytes + head
