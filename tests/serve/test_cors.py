"""Pages of other sites that may use the API can read its refusals too."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest

from ddlm.lm import DiffusionLM
from serve.running import Running, running

KEY = "k" * 20
PAGE = {"origin": "https://a.example"}
KNOWN = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}


@pytest.fixture(scope="module")
def here(lm: DiffusionLM) -> Iterator[Running]:
    options = {"queue": 1, "share": 1, "receive": 0.3, "steps": 100_000}
    with running(lm, keys=(KEY,), origins=(PAGE["origin"],), **options) as found:
        yield found


def refused(here: Running, content: bytes, **headers: str) -> httpx.Response:
    url = f"{here.url}/v1/generate"
    return httpx.post(url, content=content, headers=PAGE | headers, timeout=20)


def test_a_page_can_read_why_it_is_refused(here: Running) -> None:
    answers = {
        401: refused(here, b"{}", **KNOWN | {"authorization": "Bearer other"}),
        413: refused(here, b" " * 100_000, **KNOWN),
        415: refused(here, b"{}", **KNOWN | {"content-type": "text/plain"}),
        422: refused(here, b"{}", **KNOWN),
    }
    long = {"template": "{20}", "steps": 100_000, "halt": "none", "stream": True}
    with httpx.stream("POST", f"{here.url}/v1/generate", json=long, headers=KNOWN, timeout=20):
        answers[429] = refused(here, b"{}", **KNOWN)
    here.until(lambda: here.worker.held == 0)
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE["origin"]
        assert "origin" in answer.headers["vary"].lower()
        assert answer.headers["access-control-expose-headers"].lower() == "retry-after"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert int(answers[429].headers["retry-after"]) >= 1


def test_a_page_can_read_that_its_body_is_too_slow(here: Running) -> None:
    host, port = here.url[7:].split(":")
    sent = PAGE | KNOWN | {"host": "x", "content-length": "50"}
    with socket.create_connection((host, int(port)), timeout=10) as line:
        head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        line.sendall(f"POST /v1/generate HTTP/1.1\r\n{head}\r\n{{".encode())
        answer = line.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 408")
    assert f"access-control-allow-origin: {PAGE['origin']}\r\n" in answer


def test_other_pages_learn_nothing(here: Running) -> None:
    answer = refused(here, b"{}", **KNOWN | {"origin": "https://b.example"})
    assert answer.status_code == 422
    assert "access-control-allow-origin" not in answer.headers


def test_a_preflight_needs_no_key_and_is_counted(here: Running) -> None:
    asked = PAGE | {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    answer = httpx.options(f"{here.url}/v1/generate", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE["origin"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    counts = httpx.get(f"{here.url}/metrics", headers=KNOWN).text
    assert 'ddlm_requests_total{route="/v1/generate",status="200"}' in counts
    assert httpx.options(f"{here.url}/v1/models").status_code == 405, "no preflight, no method"
