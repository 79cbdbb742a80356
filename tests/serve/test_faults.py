"""Faults of the engine: whoever waits is answered, and the server goes on or says that it cannot."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from ddlm.lm import DiffusionLM
from serve.running import Running, running

ASK = {"template": "{4}", "steps": 3, "halt": "none"}


def post(here: Running, **options: Any) -> httpx.Response:
    return httpx.post(f"{here.url}/v1/generate", json=ASK | options, timeout=10)


def fault(*_: Any, **__: Any) -> Any:
    raise RuntimeError("an illegal memory access was encountered")


def is_a_fault(answer: httpx.Response) -> bool:
    return (answer.status_code, answer.json()["error"]["code"]) == (500, "engine")


def test_who_waits_is_answered_when_no_fresh_engine_can_be_had(
    lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(lm, slots=1, steps=100_000) as here, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(post, here, steps=100_000) for _ in range(4)]
        here.until(lambda: (here.worker.at_work, here.worker.waiting) == (1, 3))
        assert httpx.get(f"{here.url}/healthz").status_code == 200
        monkeypatch.setattr(lm, "engine", fault)
        here.worker.engine.step = fault
        assert all(is_a_fault(one.result()) for one in asked)
        assert here.worker.held == 0
        for path in ("/healthz", "/readyz"):
            assert httpx.get(here.url + path).status_code == 503
        later = post(here)
        assert later.status_code == 503
        assert "restart the server" in later.json()["error"]["message"]


def test_a_text_that_cannot_be_begun_is_told(lm: DiffusionLM) -> None:
    with running(lm) as here:
        submit, here.worker.engine.submit = here.worker.engine.submit, fault
        assert is_a_fault(post(here, samples=3))
        here.until(lambda: here.worker.held == 0)
        here.worker.engine.submit = submit
        assert post(here).status_code == 200


def test_a_text_that_cannot_be_finished_is_told(
    lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(lm) as here:
        with monkeypatch.context() as broken:
            broken.setattr(lm, "text", fault)
            assert is_a_fault(post(here))
        assert here.worker.held == 0
        assert post(here).status_code == 200
