"""Seconds of the training loss on a GPU: Triton kernels, compiled chunks, plain chunks, and its products alone.

All of them form the loss and the gradients in hidden states, head and bias of N positions from the same products in
the same precision, take turns, and medians are reported.

    python benchmarks/loss_kernels.py --out benchmarks/loss-kernels.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ddlm.benchmark.timing import timed, turns
from ddlm.diffusion import head, posterior
from ddlm.diffusion.head import chunks
from ddlm.record import make_record, write_record


def compiled(chunk: int) -> Callable[..., object]:
    """The chunked form with everything between its products compiled."""

    @torch.compile(dynamic=False)
    def between(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        wide = logits.float()
        log_z = wide.logsumexp(-1, keepdim=True)
        losses = (log_z - wide.gather(-1, targets[:, None])).squeeze(-1)
        hot = torch.arange(wide.shape[1], device=wide.device) == targets[:, None]
        grad = weights[:, None] * ((wide - log_z).exp() - hot.float())
        return losses, grad.to(logits.dtype)

    def run(
        hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor
    ) -> object:
        low, low_bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        grad_bias = torch.zeros_like(bias)
        losses = torch.empty_like(weights)
        for rows in chunks(len(hidden), chunk):
            logits = torch.addmm(low_bias, hidden[rows], low.mT)
            losses[rows], grad = between(logits, targets[rows], weights[rows])
            torch.mm(grad, low, out=grad_hidden[rows])
            grad_weight += grad.mT @ hidden[rows]
            grad_bias += grad.sum(0, dtype=torch.float32)
        return losses, grad_hidden, grad_weight, grad_bias

    return run


def products_alone(chunk: int) -> Callable[..., object]:
    """The three products of every chunk and nothing else."""

    def run(
        hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor
    ) -> object:
        low = weight.to(hidden.dtype)
        for rows in chunks(len(hidden), chunk):
            logits = hidden[rows] @ low.mT
            grads = logits @ low, logits.mT @ hidden[rows]
        return grads

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=32768)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, required=True, help="record to write (JSON)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("a CUDA device is needed and none was found")
    device = torch.device("cuda")
    torch.manual_seed(0)
    n, v, h = options.positions, options.vocabulary, options.width
    given = (
        torch.randn(n, h, device=device).bfloat16(),
        torch.randn(v, h, device=device) * 0.02,
        torch.zeros(v, device=device),
        torch.randint(v, (n,), device=device),
        torch.full((n,), 1 / n, device=device),
    )
    kernels = head.fused_rows(given[0])
    chunk = head.DEVICE_CHUNK
    with_compiler, products = compiled(chunk), products_alone(chunk)
    candidates: dict[str, Callable[[], object]] = {
        "triton": lambda: kernels.cross_entropy(*given, chunk, True),
        "compiled chunks": lambda: with_compiler(*given),
        "plain chunks": lambda: posterior._cross_entropy(*given, chunk, True),
        "plain chunks of 256": lambda: posterior._cross_entropy(*given, 256, True),
        "products alone": lambda: products(*given),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        for _ in range(3):
            timed(run, device)
    for order in turns(list(candidates), options.rounds):
        for name in order:
            seconds[name].append(timed(candidates[name], device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    results = {
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "over_products": {n: value / medians["products alone"] for n, value in medians.items()},
        "triton_over_compiled": medians["triton"] / medians["compiled chunks"],
    }
    for name, value in medians.items():
        print(f"{name:20} {1e3 * value:8.2f} ms  {value / medians['products alone']:.2f}")
    settings = {"positions": n, "width": h, "vocabulary": v, "chunk": chunk, "precision": "bf16"}
    write_record(options.out, make_record("loss-kernels", settings, results, seed=0))


if __name__ == "__main__":
    main()
