"""A step may take minutes while it is compiled: who waits is told in time, and the server still goes down."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from ddlm.lm import DiffusionLM
from ddlm.serve import worker as of_worker
from serve.running import Running, running

ASK = {"template": "{4}", "steps": 3, "halt": "none"}


def post(here: Running, **options: Any) -> httpx.Response:
    return httpx.post(f"{here.url}/v1/generate", json=ASK | options, timeout=20)


@contextmanager
def held(engine: Any) -> Iterator[threading.Event]:
    """The engine's steps wait inside the block; the event says that one has begun."""
    begun, goes_on, step = threading.Event(), threading.Event(), engine.step

    def slow() -> Any:
        begun.set()
        goes_on.wait(20)
        return step()

    engine.step = slow
    try:
        yield begun
    finally:
        engine.step = step
        goes_on.set()


def test_the_deadline_does_not_wait_for_a_step(lm: DiffusionLM) -> None:
    with running(lm, deadline=0.5) as here, held(here.worker.engine):
        began = time.monotonic()
        answer = post(here, samples=2)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
        told = post(here, stream=True).text
        assert told.count("event: error") == 1
        assert told.rstrip().endswith("event: end\ndata: {}")
        assert time.monotonic() - began < 10
        assert here.worker.at_work == 2  # nothing can be taken out of a step
    here.until(lambda: here.worker.held == 0)


def test_going_down_does_not_wait_for_a_step(
    lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(of_worker, "_LAST_STEP", 0.2)
    with running(lm, drain=0.5) as here, held(here.worker.engine) as begun:
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(post, here), pool.submit(post, here, stream=True)]
            assert begun.wait(10)
            here.until(lambda: here.worker.held == 2)
            here.web.handle_exit(signal.SIGTERM, None)
            answers = [one.result() for one in asked]
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "draining")
        assert '"code":"draining"' in answers[1].text
        here.until(lambda: "it is left behind" in caplog.text)


def test_ready_once_the_step_is_prepared_for_every_number_of_rows(
    lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, together, make = threading.Event(), [], lm.engine

    def compiled(**options: Any) -> Any:
        engine = make(**options)
        engine.sizes, step = (4, 1), engine.step

        def slow() -> Any:
            together.append(len(engine._queue) + len(engine._working()))
            goes_on.wait(20)
            return step()

        engine.step = slow
        return engine

    monkeypatch.setattr(lm, "engine", compiled)
    with running(lm, slots=4) as here, ThreadPoolExecutor(1) as pool:
        here.until(lambda: bool(together))
        assert httpx.get(f"{here.url}/readyz").status_code == 503
        assert httpx.get(f"{here.url}/healthz").status_code == 200
        early = pool.submit(post, here)  # it is taken, and waits
        here.until(lambda: here.worker.waiting == 1)
        goes_on.set()
        assert early.result().status_code == 200
        assert httpx.get(f"{here.url}/readyz").status_code == 200
    # two steps of each number of rows, for short texts and for long ones; then the three of the text
    assert together == [4, 4, 4, 4, 1, 1, 1, 1, 1, 1, 1]
