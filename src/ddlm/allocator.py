"""What the C library does with freed memory: glibc gives large blocks back to the system at once, here it keeps them.

torch asks for the memory of every CPU tensor anew. A block that went back has to be mapped and zeroed again, page by
page, the next time a step needs it: a tenth of the processor time of sampling with a small network.
"""

from __future__ import annotations

import ctypes
import os
import sys

_KEPT = 1 << 30
"""Bytes: larger blocks go back, and so does what is free at the end of the heap beyond that."""
_MMAP_THRESHOLD, _OLD_LIMIT = -3, 32 << 20
"""M_MMAP_THRESHOLD of malloc.h, and the largest value that older versions of glibc take."""
_POLICY = {-1: _KEPT, -8: 1}
"""M_TRIM_THRESHOLD and M_ARENA_MAX: one heap for all threads, since those of threads consist of pieces of 64 MiB, each
of which goes back when it is empty."""


def keep_freed_blocks() -> bool:
    """Let this process keep freed blocks of up to a gibibyte for its next tensors.

    The most memory that is held does not grow by it, but is held until the process ends. A policy of the whole process,
    to be chosen before it has threads: the command line asks for it, a program that imports ddlm may.

    Returns:
        Whether it is so now; False where the C library is not glibc, or the environment sets its thresholds.
    """
    named = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX"
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    chosen = "glibc.malloc" in tunables or any(x in os.environ for x in named)
    library = None if chosen else _glibc()
    if library is None:
        return False
    # first, for it may be refused: a trim threshold alone would only end that glibc adapts its own
    if not any(library.mallopt(_MMAP_THRESHOLD, size) == 1 for size in (_KEPT, _OLD_LIMIT)):
        return False
    return all(library.mallopt(number, value) == 1 for number, value in _POLICY.items())


def return_freed_blocks() -> bool:
    """Give all whole pages of freed blocks back to the system now, kept or not.

    Returns:
        Whether that could be asked for; False where the C library is not glibc.
    """
    library = _glibc()
    if library is None:
        return False
    library.malloc_trim(0)
    return True


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
    except OSError:
        return None
    # musl has a mallopt, too, that does nothing
    return library if hasattr(library, "gnu_get_libc_version") else None
