"""The device a user names, tried out before anything is loaded onto it, and the precision that suits it."""

from __future__ import annotations

import os
import platform
import shutil
from typing import Literal

import torch

from ddlm.types import ConfigError

Precision = Literal["bf16", "fp32"]
AnyPrecision = Literal["auto", "bf16", "fp32"]


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


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products: torch emulates what it has not, many times slower.

    A CPU needs AVX-512 BF16 or AMX, an ARM one BF16. Without them torch 2.13 reached 1 GFLOP/s in bfloat16 where it
    reached 50 in float32 (one core of an AMD EPYC with AVX2).
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return False
        # torch.cuda.is_bf16_supported asks the current device, which need not be this one
        return bool(torch.version.hip) or torch.cuda.get_device_properties(device).major >= 8
    if device.type != "cpu":
        return False
    # torch tells it by these names only (2.6 to 2.13)
    x86 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, name, bool)() for name in x86):
        return True
    if (
        platform.machine().lower() not in ("aarch64", "arm64")
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolve_precision(precision: AnyPrecision, device: torch.device | str) -> Precision:
    """The precision of matrix products: as it was named, or for ``auto`` bf16 where the device computes in it.

    Args:
        precision: ``auto``, ``bf16`` or ``fp32``.
        device: Where the products are computed.

    Raises:
        ConfigError: for another word.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise ConfigError(f"precision '{precision}' is unknown: choose auto, bf16 or fp32")
    if precision != "auto":
        return precision
    return "bf16" if has_bf16(torch.device(device)) else "fp32"


def product_dtype(precision: AnyPrecision, device: torch.device | str) -> torch.dtype:
    """The dtype of :func:`resolve_precision`."""
    return torch.bfloat16 if resolve_precision(precision, device) == "bf16" else torch.float32


def slow_precision(precision: AnyPrecision, device: torch.device) -> str | None:
    """A warning when bf16 is asked for by name and this CPU only emulates it, or None."""
    if precision != "bf16" or device.type != "cpu" or has_bf16(device):
        return None
    return (
        "this CPU has no bfloat16 instructions, torch emulates them many times slower than float32: take precision auto"
        " or fp32"
    )


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has the compiler that it needs, see :func:`missing_compiler`."""
    return missing_compiler(device) is None


def missing_compiler(device: torch.device) -> str | None:
    """The compiler that torch.compile needs and that is not there, in words, or None.

    On a CPU it calls a C++ compiler, on a CUDA device a C compiler, through Triton.
    """
    language, variable, names = {
        "cpu": ("C++", "CXX", ("g++",)),
        "cuda": ("C", "CC", ("gcc", "clang")),
    }.get(device.type, ("", "", ()))
    named = os.environ.get(variable)
    if not names or any(shutil.which(name) for name in ((named,) if named else names)):
        return None
    return f"{language} compiler ({', '.join(names)}, or what {variable} names)"
