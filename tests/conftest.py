"""What every test shares: one thread, no network, a reason for every skip."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from pathlib import Path

# Before torch is imported: more threads than cores make small models many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

# A suite in the background of a shell is started with Ctrl-C ignored, and so would be what the tests start.
if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, and skip tests marked ``gpu`` where there is no CUDA device.

    Workers take whole files in this order (``--dist loadfile --no-loadscope-reorder``): what comes last is short, so
    that none waits long for another.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path], item.path))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none was found"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real corpora beside the checkout; tests that need them skip where they are absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("real data is absent: ../shared/data is not there")
    return path


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of random draws."""
    return torch.Generator().manual_seed(0)
