"""``ddlm benchmark train``: tokens/s, model FLOP/s and their share of the machine's own rate, beside the peers.

Steps, matrix products and peers take turns, round by round, and medians are reported: a shared machine's speed drifts
severalfold within a run, and what is compared has to meet the same drift.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ddlm.benchmark.peers import peer_step
from ddlm.benchmark.step import OwnStep, Trainee, own_step
from ddlm.benchmark.timing import peak_memory, time_products, timed, write_profile
from ddlm.config import Config
from ddlm.device import missing_compiler, product_dtype
from ddlm.network.denoiser import DDLM
from ddlm.training.distributed import open_world
from ddlm.training.flops import Product, peer_flops, step_products

PEERS = ("bert eager", "bert compiled", "gpt2 eager", "gpt2 compiled")


def benchmark_train(
    config: Config,
    *,
    rounds: int = 5,
    peers: Sequence[str] = PEERS,
    profile: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure training steps on invented tokens.

    Args:
        config: What to train; ``train.batch``, ``train.precision`` and ``train.compile`` are taken as they are.
        rounds: Measurements of each thing.
        peers: Which peers run beside it, among :data:`PEERS`; compiled ones only where torch can compile.
        profile: Write a trace (Chrome's format) and the top operators into this folder.
        say: Receives lines of progress.

    Returns:
        ``tokens_per_second``, ``model_flops_per_second``, ``matmul_flops_per_second``, ``mfu`` (their ratio),
        ``seconds_per_step`` and ``spread`` (fastest and slowest round, in seconds a step; of each peer too),
        ``peak_memory_bytes`` of the process after its own steps and before the peers', ``loss_share`` (of a step's
        time), ``compiled``, ``peers`` and ``speedup_over_fastest_peer`` (model FLOP/s over the best peer's).
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    world = open_world(config)
    trainee = Trainee.create(config, world, say)
    step = own_step(trainee, config, world)
    missing = missing_compiler(world.device)
    if missing and any(name.endswith("compiled") for name in peers):
        say(f"compiled peers need a {missing}: they are left out")
        peers = [name for name in peers if not name.endswith("compiled")]
    say("warming up (compiling)" if trainee.compiled else "warming up")
    for _ in range(2):
        timed(step.run, world.device)
    memory = peak_memory(world.device)
    products = step_products(config, step.noised, step.conditioned)
    dtype = product_dtype(config.train.precision, world.device)
    candidates: dict[str, Callable[[], object]] = {"step": step.run}
    candidates["loss"] = _loss_only(trainee.state.model, step)
    flops = {"step": step.flops}
    for name in peers:
        kind, _, how = name.partition(" ")
        say(f"warming up {name}")
        candidates[name] = peer_step(kind, config, world.device, how == "compiled")
        flops[name] = peer_flops(config, kind)
        for _ in range(2):
            timed(candidates[name], world.device)
    seconds: dict[str, list[float]] = {name: [] for name in (*candidates, "products")}
    for i in range(rounds):
        for name, run in candidates.items():
            if world.device.type == "cuda":
                run()  # its memory is what another candidate had: taking it back is no part of a step
            seconds[name].append(timed(run, world.device))
        seconds["products"].append(time_products(products, world.device, dtype))
        say(f"round {i + 1} of {rounds}: {seconds['step'][-1]:.3f} s a step")
    if profile is not None:
        write_profile(profile, step.run, world.device)
    results = _results(config, seconds, flops, products, memory)
    return results | {"rounds": rounds, "compiled": trainee.compiled}


def _loss_only(model: DDLM, step: OwnStep) -> Callable[[], object]:
    """The loss of a step alone: from hidden states to the cross-entropy and back to their gradients.

    It is the network's own loss with the step's targets and weights, micro-batch by micro-batch: padding counts, and
    with ``likelihood_head`` rows are as wide as hidden state and embedding together.
    """
    trained = [model.head.weight, model.head.bias]
    if model.config.likelihood_head:
        trained.append(model.embedding)
    inputs = []
    for part in step.parts():
        batch = part.batch
        shape = (len(batch.index), model.head_weight().shape[1])  # (N, H) or (N, H + D)
        hidden = torch.randn(shape, device=batch.index.device).to(model.compute_dtype)
        inputs.append((hidden.requires_grad_(), batch.tokens.flatten()[batch.index], batch.weight))

    def run() -> None:
        for hidden, targets, weights in inputs:
            loss, _ = model.cross_entropy(hidden, targets, weights)
            torch.autograd.grad(loss, [hidden, *trained])

    return run


def _results(
    config: Config,
    seconds: dict[str, list[float]],
    flops: dict[str, int],
    products: Sequence[Product],
    memory: int,
) -> dict[str, Any]:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = config.train.batch * config.model.length
    rate = flops["step"] / median["step"]
    machine = sum(p.flops for p in products) / median["products"]
    # compared within each round, then the median of the ratios: both met the same moment of the machine
    mfu = statistics.median(
        (flops["step"] / own) / (sum(p.flops for p in products) / alone)
        for own, alone in zip(seconds["step"], seconds["products"], strict=True)
    )
    peers: dict[str, dict[str, Any]] = {
        name: {
            "tokens_per_second": tokens / median[name],
            "model_flops_per_second": flops[name] / median[name],
            "seconds_per_step": median[name],
            "spread": [min(seconds[name]), max(seconds[name])],
            "flops_per_token": flops[name] / tokens,
        }
        for name in flops
        if name != "step"
    }
    fastest = max(peers, key=lambda n: peers[n]["model_flops_per_second"], default=None)
    return {
        "tokens_per_second": tokens / median["step"],
        "model_flops_per_second": rate,
        "matmul_flops_per_second": machine,
        "mfu": mfu,
        "peak_memory_bytes": memory,
        "seconds_per_step": median["step"],
        "spread": [min(seconds["step"]), max(seconds["step"])],
        "flops_per_token": flops["step"] / tokens,
        "loss_share": median["loss"] / median["step"],
        "peers": peers,
        "fastest_peer": fastest,
        "speedup_over_fastest_peer": None
        if fastest is None
        else rate / peers[fastest]["model_flops_per_second"],
    }
