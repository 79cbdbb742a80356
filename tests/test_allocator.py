"""Freed memory is kept: the pages of a tensor are not mapped anew for the next one."""

import os
import platform
import subprocess
import sys

import pytest

from ddlm import allocator

COUNT = """
import resource, sys, threading
import numpy as np
from ddlm.allocator import keep_freed_blocks

print(keep_freed_blocks() if sys.argv[1] == "keep" else None)
def use():
    for _ in range(10):
        # several alive at once, of several sizes: glibc raises its own threshold for one size alone
        blocks = [np.ones((n, 1024, 256)) for n in (1, 2, 4, 20)]
def measure():
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if sys.argv[2:] == ["thread"]:
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
else:
    measure()
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def run(*mode: str, **extra: str) -> tuple[str, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", COUNT, *mode]
    done = subprocess.run(command, env=clean | extra, capture_output=True, text=True, check=True)
    said, faults = done.stdout.split()
    return said, int(faults)


@glibc
@pytest.mark.parametrize("where", [(), ("thread",)])
def test_kept_blocks_are_not_mapped_again(where: tuple[str, ...]) -> None:
    _, without = run("leave", *where)
    said, kept = run("keep", *where)
    assert said == "True"
    assert kept < without / 20, (kept, without)


@glibc
@pytest.mark.parametrize(
    "name, value",
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("MALLOC_MMAP_THRESHOLD_", "131072"),
        ("MALLOC_ARENA_MAX", "8"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072"),
    ],
)
def test_the_environment_has_the_last_word(name: str, value: str) -> None:
    said, _ = run("keep", **{name: value})
    assert said == "False"


def test_an_older_glibc_gets_what_it_takes_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        """Refuses a threshold above half of a heap."""

        def __init__(self, most: int) -> None:
            self.most, self.taken = most, {}

        def mallopt(self, number: int, value: int) -> int:
            if number == -3 and value > self.most:
                return 0
            self.taken[number] = value
            return 1

    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for most, kept, taken in ((32 << 20, True, {-3: 32 << 20, -1: 1 << 30, -8: 1}), (0, False, {})):
        library = Old(most)
        monkeypatch.setattr(allocator, "_glibc", lambda found=library: found)
        assert allocator.keep_freed_blocks() is kept
        assert library.taken == taken
