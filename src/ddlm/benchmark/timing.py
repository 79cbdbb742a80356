"""What both benchmarks measure with: seconds of a call, of matrix products, of attention; memory; profiles."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ddlm.allocator import return_freed_blocks
from ddlm.config import ModelConfig
from ddlm.training.flops import Product, block_products

Item = TypeVar("Item")
REPEATS = 20  # of a product on a GPU
MOST_TOKENS = 4096  # enough to keep a device busy


def turns(items: Sequence[Item], rounds: int) -> Iterator[Sequence[Item]]:
    """The order of each round, every other one in reverse: a machine that drifts steadily then favours nobody."""
    for i in range(rounds):
        yield items if i % 2 == 0 else items[::-1]


def time_products(products: Sequence[Product], device: torch.device, dtype: torch.dtype) -> float:
    """Seconds that the step's matrix products take by themselves, each shape measured once and multiplied."""
    total = 0.0
    for shape in {(p.m, p.k, p.n) for p in products}:
        m, k, n = shape
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(k, n, device=device).to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        torch.mm(a, b, out=out)
        count = sum(p.count for p in products if (p.m, p.k, p.n) == shape)
        total += count * _timed_often(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)  # type: ignore[misc]
    return total


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _timed_often(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a GPU of one among many, since alone it takes as long as the host waits for it."""
    if device.type == "cpu":
        return timed(run, device)

    def repeat() -> None:
        for _ in range(REPEATS):
            run()

    return timed(repeat, device) / REPEATS


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far (:func:`reset_peak_memory`): of the device, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (mark := _high_water_mark()) is not None:
        return mark
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> bool:
    """Let :func:`peak_memory` begin anew from what is held now; False where the system offers no way (not Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    return_freed_blocks()  # of whoever ran before: they are held by this process, not by what is measured next
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        return False
    return _high_water_mark() is not None


def _high_water_mark() -> int | None:
    """Peak resident bytes as Linux counts them: getrusage's cannot be reset, and begins with that of the parent."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None


def write_profile(folder: Path, step: Callable[[], object], device: torch.device) -> None:
    """Write a trace and the table of the top operators of one call into ``folder``."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    folder.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities) as trace:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    trace.export_chrome_trace(str(folder / "trace.json"))
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = trace.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=80)
    (folder / "operators.txt").write_text(table, encoding="utf-8")


def time_attention(
    model: ModelConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds of all layers' queries with keys and weights with values, as bare batched products."""
    shape = (batch * model.heads, length, model.width // model.heads)
    q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    weights = torch.bmm(q, k.mT)
    torch.bmm(weights, v)
    first = _timed_often(lambda: torch.bmm(q, k.mT), device)
    return model.layers * (first + _timed_often(lambda: torch.bmm(weights, v), device))


def step_products(model: ModelConfig, tokens: int) -> tuple[list[Product], Product]:
    """Linear maps of one sampling step, and the expected embedding, which is float32 whatever the precision."""
    head = model.width + (model.embedding_width if model.likelihood_head else 0)
    products = [*block_products(model, tokens), Product(tokens, head, model.vocab_size)]
    return products, Product(tokens, model.vocab_size, model.embedding_width)


def time_step_products(
    model: ModelConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds that the matrix products of one sampling step take by themselves, attention's included.

    Measured over at most :data:`MOST_TOKENS` (whole sequences) and multiplied out: the sampler's read-out goes through
    longer batches in parts too, and all logits of one would not fit.
    """
    rows = max(1, min(batch, MOST_TOKENS // length))
    products, expectation = step_products(model, rows * length)
    seconds = time_products(products, device, dtype)
    seconds += time_products([expectation], device, torch.float32)
    return (seconds + time_attention(model, rows, length, device, dtype)) * batch / rows
