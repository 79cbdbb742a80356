"""What callers pass, made into what the engine works on, or one line that says why it cannot be.

T positions.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ddlm.types import ConfigError

_BITS = 128  # far above what any setting takes; Python refuses to write out numbers of thousands of digits


def whole(name: str, value: Any) -> int:
    """``value`` as an int: whole numbers of any library, never a rounded one and no truth value.

    Raises:
        ConfigError: naming what is no whole number, or one of more than 128 bits.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ConfigError(f"{shown(name, value)} was given, it must be a whole number") from None
    if number.bit_length() > _BITS:
        raise ConfigError(
            f"{name} was given as a number of {number.bit_length()} bits, at most {_BITS} can be"
        )
    return number


def wholes(name: str, values: Iterable[Any]) -> list[int]:
    """Each of ``values`` as :func:`whole` takes it; ``name`` is of one of them.

    Raises:
        ConfigError: for what holds no whole numbers.
    """
    try:
        items = list(values)
    except TypeError:
        raise ConfigError(
            f"{shown(f'{name}s', values)} was given, it must hold whole numbers, as a list does"
        ) from None
    return [whole(name, value) for value in items]


def number(name: str, value: Any) -> float:
    """``value`` as a float: a number of any library, never a text or a truth value.

    Raises:
        ConfigError: naming what is no number.
    """
    try:
        if not isinstance(value, str | bytes | bool):
            return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        raise ConfigError(f"{name} was given as a number beyond any float: lower it") from None
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ConfigError(f"{shown(name, value)} was given, it must be a number")


def sequence(tokens: Any, is_noised: Any) -> tuple[Tensor, Tensor]:
    """A sequence in tensors of its own on the CPU, so that the caller may go on writing into what was given.

    Args:
        tokens: Ids ``(T,)``, a tensor, an array or a list; anything where ``is_noised``.
        is_noised: True, or 1, where a token is to be generated, False or 0 elsewhere, ``(T,)``.

    Returns:
        Tokens ``(T,)`` int64, 0 where one is to be generated, and where that is, ``(T,)`` bool.

    Raises:
        ConfigError: for shapes that differ, no position, given tokens that are not whole, or what is neither
            True nor False.
    """
    try:
        ids, noised = (torch.as_tensor(x, device="cpu") for x in (tokens, is_noised))
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"{shown('tokens', tokens)} and {shown('is_noised', is_noised)} were given, "
            "both must be tensors, arrays or lists of T numbers"
        ) from None
    if ids.dim() != 1 or ids.shape != noised.shape or len(ids) == 0:
        raise ConfigError(
            f"tokens {tuple(ids.shape)} and is_noised {tuple(noised.shape)} were given, "
            "both must be (T,) with T >= 1"
        )
    where = noised.to(torch.bool, copy=True)
    if noised.dtype != torch.bool and bool((odd := noised != where).any()):
        raise ConfigError(
            f"is_noised holds {noised[odd][0].item()}, it must be True (1) where a token is to be generated and "
            "False (0) elsewhere"
        )
    given = ids.to(torch.int64)
    if ids.is_floating_point() and bool((odd := (given != ids) & ~where).any()):
        raise ConfigError(f"tokens hold {ids[odd][0].item()}, each must be a whole number")
    return given.masked_fill(where, 0), where


def shown(name: str, value: Any) -> str:
    """``name=value`` on one line, shortened."""
    return f"{name}={' '.join(reprlib.repr(value).split())}"
