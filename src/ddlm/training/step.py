"""One update of the weights, in one process or many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ddlm.config import Config
from ddlm.training.distributed import World, accumulates
from ddlm.training.draws import MicroBatch
from ddlm.training.optim import clipped_step, learning_rate
from ddlm.training.state import StepOutcome, TrainState


def train_step(
    state: TrainState,
    objective: nn.Module,
    parts: Sequence[MicroBatch],
    config: Config,
    world: World,
) -> StepOutcome:
    """One update of the weights from the micro-batches of this process's share of the batch.

    Every noised position of the global batch weighs the same, whatever process and micro-batch it is in: the losses of
    all parts add up to the mean over the global batch.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config.train, state.step, state.seconds)
    state.optimizer.zero_grad(set_to_none=True)
    losses, rows, times, cross_entropy = [], [], [], []
    for i, part in enumerate(parts):
        accumulates(objective, last=i == len(parts) - 1)
        loss, per_sequence = objective(part.batch, part.self_condition)
        (loss * world.size).backward()  # DDP and FSDP average over processes; the sum is meant
        losses.append(loss.detach())
        rows.append(part.rows)
        times.append(part.batch.t)
        cross_entropy.append(per_sequence)
    grad_norm = clipped_step(state.optimizer, config.train.clip)
    if state.ema is not None:
        state.ema.update(state.model.parameters(), state.step)
    # back to the order of the global batch
    order = torch.cat(rows).argsort().to(world.device, non_blocking=True)
    outcome = StepOutcome(
        loss=world.gather(torch.stack(losses).sum()[None]).sum(),
        grad_norm=grad_norm,
        t=world.gather(torch.cat(times)[order]),
        cross_entropy=world.gather(torch.cat(cross_entropy)[order]),
    )
    if state.warp is not None and state.warp_optimizer is not None:
        # on the host, where times are drawn: with a warp a step waits for the device
        ce = outcome.cross_entropy.cpu()
        if bool(ce.isfinite().all()):
            state.warp_optimizer.zero_grad()
            state.warp.loss(outcome.t.cpu(), ce).backward()
            state.warp_optimizer.step()
    state.step += 1
    return outcome
