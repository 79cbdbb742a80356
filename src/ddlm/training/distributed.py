"""Several processes under torchrun: who has which rows, gradients summed by DDP or FSDP2, and a little agreement.

A process's rows of the global batch are contiguous: rank r of n has rows r * B / n up to (r + 1) * B / n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddlm.config import Config
from ddlm.device import AnyPrecision, has_bf16
from ddlm.diffusion.objective import NoisedBatch, denoising_loss
from ddlm.launch import read_launch
from ddlm.network.denoiser import DDLM
from ddlm.training.sharded import check_can_shard
from ddlm.types import ConfigError


@dataclass(frozen=True)
class World:
    """This process among all processes of the run.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        device: Where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    def rows(self, batch: int) -> range:
        """Rows of the global batch that belong to this process."""
        share = batch // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def gather(self, local: Tensor) -> Tensor:
        """Concatenate ``local (b,)`` of all processes in rank order, ``(size * b,)``."""
        if self.size == 1:
            return local
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    def agree(self, *numbers: float) -> list[float]:
        """The largest of each number over all processes; a tiny exchange between hosts, no device is waited for."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def from_main(self, tensor: Tensor) -> Tensor:
        """The first process's ``tensor`` (on the host) in all of them; the others' is overwritten."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def barrier(self) -> None:
        """Wait for all processes."""
        self.agree(0.0)

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def open_world(config: Config) -> World:
    """Join the process group that torchrun announced in the environment, or stand alone.

    Raises:
        ConfigError: when the announcement is incomplete, the batch cannot be shared evenly, CUDA is asked for and
            absent, or bf16 is not supported.
    """
    launch = read_launch()
    check_share(config, launch.size)
    train = config.train
    has_cuda = torch.cuda.is_available()
    if train.device == "cuda" and not has_cuda:
        raise ConfigError("train.device=cuda was asked for and no CUDA device was found: use cpu")
    device = torch.device("cuda" if has_cuda and train.device != "cpu" else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", launch.local_rank)
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ConfigError(
                f"{torch.cuda.device_count()} GPUs were found and process {device.index + 1} of this machine needs one "
                "of its own: start fewer with --nproc-per-node"
            )
        torch.cuda.set_device(device)
    check_precision(train.precision, device)
    if launch.size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return World(launch.rank, launch.size, device)


def check_precision(precision: AnyPrecision, device: torch.device) -> None:
    """Refuse bf16 on a GPU that has not got it; a CPU emulates it, slowly.

    Raises:
        ConfigError: when it is asked for by name.
    """
    if precision == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise ConfigError(f"bf16 is not supported by {device}: set train.precision=auto")


def check_share(config: Config, size: int) -> None:
    """Make sure that ``size`` processes can share the batch evenly, in whole micro-batches.

    Raises:
        ConfigError: when they cannot.
    """
    train = config.train
    if train.batch < 1 or train.batch % size:
        raise ConfigError(
            f"train.batch={train.batch} cannot be shared evenly by {size} processes: "
            f"take a multiple of {size}"
        )
    share = train.batch // size
    if train.micro_batch is not None and (train.micro_batch < 1 or share % train.micro_batch):
        raise ConfigError(
            f"train.micro_batch={train.micro_batch} does not divide the {share} sequences of each process: "
            f"take a divisor of {share}"
        )
    each, fraction = train.micro_batch or share, train.self_condition
    conditioned = config.model.self_conditioning and fraction > 0
    if size > 1 and train.strategy == "fsdp" and conditioned and each * fraction < 1:
        # a pass without a self-conditioned sequence gathers each block once less, and the processes must do alike
        raise ConfigError(
            f"train.strategy=fsdp needs a self-conditioned sequence in every pass: train.micro_batch (or the share of"
            f" each process, {share}) must be at least {math.ceil(1 / fraction)}"
        )


class Objective(nn.Module):
    """The training loss as a module, so that DDP and FSDP2 see one forward pass per step.

    Args:
        denoiser: The network; its parameters are the objective's parameters.
    """

    def __init__(self, denoiser: DDLM) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, batch: NoisedBatch, self_condition: int) -> tuple[Tensor, Tensor]:
        """Loss and mean cross-entropy of each sequence; see :func:`ddlm.diffusion.objective.denoising_loss`."""
        result = denoising_loss(self.denoiser, self.denoiser.process, batch, self_condition)
        return result.loss, result.per_sequence


def shard(model: DDLM, mesh: Any) -> None:
    """Shard parameters, gradients and optimiser state over the processes of ``mesh`` (FSDP2), one unit per block.

    Call it before the optimiser is made: parameters become sharded tensors.
    """
    from torch.distributed.fsdp import fully_shard

    for block in model.transformer.blocks:
        fully_shard(block, mesh=mesh)


def wrap(model: DDLM, config: Config, world: World) -> nn.Module:
    """The objective of ``model``, wrapped for the world's way of sharing the work."""
    objective = Objective(model)
    if world.size == 1:
        return objective
    if config.train.strategy == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        check_can_shard()
        # its own choice is the machine's accelerator, also where train.device is the CPU
        mesh = init_device_mesh(world.device.type, (world.size,))
        shard(model, mesh)
        fully_shard(objective, mesh=mesh, reshard_after_forward=True)
        return objective
    ids = [world.device.index] if world.device.type == "cuda" else None
    ddp: Any = nn.parallel.DistributedDataParallel
    wrapped: nn.Module = ddp(objective, device_ids=ids, gradient_as_bucket_view=True)
    return wrapped


def accumulates(wrapped: Any, last: bool) -> None:
    """Exchange gradients only in the backward pass of the last micro-batch of a step."""
    if hasattr(wrapped, "set_requires_gradient_sync"):  # FSDP2
        wrapped.set_requires_gradient_sync(last)
    elif isinstance(wrapped, nn.parallel.DistributedDataParallel):
        wrapped.require_backward_grad_sync = last
