"""What torch.compile leaves behind when it is killed, and what is said when it fails."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path


def cache_folder() -> Path | None:
    """Where torch.compile keeps what it has compiled; None where this torch does not tell."""
    try:
        # its place since 2.6, though not its own
        from torch._inductor.runtime.runtime_utils import cache_dir  # type: ignore[attr-defined]
    except ImportError:
        return None
    return Path(cache_dir())


def drop_unfinished_libraries(seconds: float = 60.0) -> None:
    """Remove empty libraries from torch.compile's cache.

    A process that is killed while the compiler links leaves one behind; torch (2.13) takes it for a finished one, and
    every later process that needs it fails.

    Args:
        seconds: Younger files are left alone: another process may be writing them.
    """
    folder = cache_folder()
    if folder is None:
        return
    for library in folder.glob("*/*.so"):
        with contextlib.suppress(OSError):  # removed by another process, or not ours
            facts = library.stat()
            if facts.st_size == 0 and time.time() - facts.st_mtime > seconds:
                library.unlink()


def why_it_failed(error: Exception) -> str | None:
    """A line for an error of torch.compile, None for any other."""
    errors = sys.modules.get("torch._dynamo.exc")  # not loaded: nothing was compiled
    if errors is None or not isinstance(error, errors.TorchDynamoException):
        return None
    lines = [line for line in map(str.strip, str(error).splitlines()) if line]
    # what the backend says of itself comes first, what went wrong in it after that
    reason = next((line for line in lines if "Error:" in line), lines[0] if lines else "no reason")
    return (
        f"torch.compile failed ({reason[:300]}): do without (--train.compile false, or no --compile), "
        f"or remove what it has compiled so far, {cache_folder() or 'its cache'}"
    )
