"""How many rows and positions an engine computes at least, so that a sequence gets the same bits in any company.

S slots, T positions.
"""

from __future__ import annotations

import math

import torch

_VECTOR = 16  # float32 numbers of the widest vector register
_BLOCK, _UNDIVIDED = 512, 192  # positions that attention on the CPU sums over at once
_SAFE_ROWS = 16  # rows of a matrix product per thread from which the CPU's kernels give each row the same bits


def least_rows(length: int, device: torch.device) -> int:
    """Sequences from which a matrix product over (S, T) rows gives each row the same bits for any S (CPU)."""
    if device.type != "cpu":
        return 1
    return math.ceil(_SAFE_ROWS * torch.get_num_threads() / length)


def safe_length(length: int, device: torch.device, most: int | None = None) -> int:
    """Positions of an engine for sequences of up to ``length`` tokens, so that any such engine gives the same bits.

    On the CPU a multiple of 16: the kernels of attention treat what does not fill a vector register differently, so a
    sequence of 13 tokens would get other bits padded to 13 than padded to 24; from 16 to 192 it gets the same. Beyond
    that they sum over blocks of 512 positions, and over one of more than 192 and less than 384 in two halves, whose
    border moves with its size: such lengths are left out (measured).

    Args:
        length: Longest sequence of the engine.
        device: Of the engine.
        most: Longest sequence of all engines (the model's length). If it is one of the lengths left out, it stays what
            it is, and any sequence that would notice is padded to it.
    """
    if device.type != "cpu" or length < 1:  # an engine refuses the latter
        return length
    rounded = math.ceil(length / _VECTOR) * _VECTOR
    whole = 0 if most is None else math.ceil(most / _VECTOR) * _VECTOR
    if _is_halved(whole):
        in_first_half = length <= whole // _BLOCK * _BLOCK + _UNDIVIDED // 2
        return rounded if in_first_half and not _is_halved(rounded) else max(rounded, whole)
    return rounded // _BLOCK * _BLOCK + 2 * _UNDIVIDED if _is_halved(rounded) else rounded


def _is_halved(length: int) -> bool:
    return _UNDIVIDED < length % _BLOCK < 2 * _UNDIVIDED
