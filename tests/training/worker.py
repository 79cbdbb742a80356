"""One of several processes of a distributed test: python worker.py MODE STRATEGY OUT."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from ddlm.training.distributed import accumulates, open_world, wrap
from ddlm.training.draws import draw_noise, draw_step, micro_batches
from ddlm.training.loop import train
from ddlm.training.sharded import whole
from ddlm.training.state import TrainState
from training.runs import B, Counting, T, small_config


def gradients(strategy: str, out: Path) -> None:
    """Loss and gradients of one global batch, in two micro-batches a process, written by the first process."""
    config = small_config(strategy=strategy, micro_batch=4)
    world = open_world(config)
    state = TrainState.create(config, world.device)
    torch.manual_seed(1)
    for parameter in state.model.parameters():  # away from the zero initialisation
        parameter.data += 0.02 * torch.randn(parameter.shape)
    objective = wrap(state.model, config, world)
    rows = world.rows(B)
    parts = list(
        micro_batches(
            config,
            Counting(B, world.rank, world.size).batch(0),
            draw_step(0, 0, B, T, config.mask),
            draw_noise(0, 0, rows, T, config.model.embedding_width),
            state.times,
            rows.start,
        )
    )
    total = torch.zeros(1)
    for i, part in enumerate(parts):
        accumulates(objective, last=i == len(parts) - 1)
        loss = objective(part.batch, part.self_condition)[0]
        (loss * world.size).backward()
        total += loss.detach()
    result = {"loss": world.gather(total).sum()}
    result |= {n: whole(p.grad).clone() for n, p in state.model.named_parameters()}
    if world.is_main:
        torch.save(result, out)
    world.close()


def training(strategy: str, out: Path, steps: int) -> None:
    """A short run with checkpoints and evaluation."""
    config = small_config(strategy=strategy, steps=steps, checkpoint_every=4, eval_every=4)
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    train(config, out, source=Counting(B, rank, size), held_out=Counting(8), quiet=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def exploding(strategy: str, out: Path) -> None:
    """Two updates, the second with a gradient that is not finite."""
    from ddlm.training import step as step_module

    real, calls = step_module.clipped_step, []

    def step(optimizer: Any, largest_norm: float) -> torch.Tensor:
        calls.append(1)
        grad = optimizer.param_groups[0]["params"][0].grad
        if len(calls) == 2:
            (grad.to_local() if hasattr(grad, "to_local") else grad)[0] = float("inf")
        return real(optimizer, largest_norm)

    step_module.clipped_step = step
    config = small_config(strategy=strategy, steps=2, log_every=1)
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    train(config, out, source=Counting(B, rank, size), quiet=True)
    torch.distributed.destroy_process_group()


def spectral(strategy: str, out: Path) -> None:
    """One tiny update from embeddings that are counted in the shards beside the run, and from matching attention."""
    config = small_config(
        strategy=strategy, steps=1, lr=1e-9, embeddings="spectral", attention="matching"
    )
    config.data.path = str(out.parent / "data")
    config.model.vocab_size = 300
    train(config, out, quiet=True)


if __name__ == "__main__":
    mode, how, target = sys.argv[1:4]
    if mode == "gradients":
        gradients(how, Path(target))
    elif mode == "exploding":
        exploding(how, Path(target))
    elif mode == "spectral":
        spectral(how, Path(target))
    else:
        training(how, Path(target), int(sys.argv[4]))
