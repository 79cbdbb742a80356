"""Which of several processes this is, as torchrun says it in the environment: one reader for all that share work."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ddlm.types import ConfigError

_MEETING = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what several processes need to find each other


@dataclass(frozen=True)
class Launch:
    """What was announced.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        local_rank: Number of this process among those of its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def read_launch() -> Launch:
    """From the environment; a process on its own where nothing is announced.

    Raises:
        ConfigError: for variables that are no numbers or contradict each other, and when several processes are
            announced and not how they find each other.
    """
    rank, size, local_rank = (
        _number(name, least, default)
        for name, least, default in (("RANK", 0, 0), ("WORLD_SIZE", 1, 1), ("LOCAL_RANK", 0, 0))
    )
    missing = [name for name in _MEETING if name not in os.environ]
    if size > 1 and missing and not _met():
        raise ConfigError(
            f"WORLD_SIZE={size} is set and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: start the "
            "processes with torchrun, or unset WORLD_SIZE"
        )
    if rank >= size:
        raise ConfigError(
            f"RANK={rank} is set and WORLD_SIZE={size}: start the processes with torchrun, or unset RANK"
        )
    return Launch(rank, size, local_rank)


def _number(name: str, least: int, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(
            f"{name}={text!r} is set, it must be a whole number of {least} or more: start the processes with "
            f"torchrun, or unset {name}"
        )
    return int(text)


def _met() -> bool:
    """Whether this process has joined the others by itself."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()
