"""The device a user names, tried out before anything is loaded onto it."""

from __future__ import annotations

import torch

from ddlm.types import ConfigError


def find_device(name: str | None = None) -> torch.device:
    """A device that can be computed on.

    Args:
        name: ``cpu``, ``cuda`` or ``cuda:N``; None takes a GPU where there is one.

    Raises:
        ConfigError: for a name that torch does not know, and for a device that this machine or this build of torch
            does not have.
    """
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device '{name}' is unknown: choose cpu, cuda or cuda:N") from None
    try:
        # a device has a name long before anything can be put there
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"device '{name}' cannot be used ({reason[:200]}): choose "
            + ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        ) from None
    return device
