"""What comes in wrong gets a clear 4xx, and the server goes on."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from ddlm.lm import DiffusionLM
from serve.running import Running, running

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def small(lm: DiffusionLM) -> Iterator[Running]:
    with running(lm, tokens=48, steps=60, samples=2, queue=16, share=16) as here:
        yield here


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/completions", "/v1/models", "/readyz"])
def test_no_request_of_the_schema_breaks_it(small: Running, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    operation = schema[path]["POST" if path.endswith(("generate", "completions")) else "GET"]
    statuses: Counter[int] = Counter()

    @given(case=operation.as_strategy())
    @settings(
        max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    def ask(case: schemathesis.Case) -> None:
        answer = case.call(timeout=30)
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, answer.text

    ask()
    assert statuses


BODIES = {
    "not JSON": (b"{", 422),
    "empty": (b"", 422),
    "a list": (b"[]", 422),
    "null": (b"null", 422),
    "no template": (b"{}", 422),
    "unknown field": (b'{"template":"{3}","file":"/etc/passwd"}', 422),
    "unknown field, surrogate": (b'{"template":"{3}","\\ud800":1}', 422),
    "surrogate": (b'{"template":"\\ud800 {3}"}', 422),
    "surrogate in halt": (b'{"template":"{3}","halt":"\\udfff:3"}', 422),
    "NaN": (b'{"template":"{3}","guidance":NaN}', 422),
    "infinite": (b'{"template":"{3}","temperature":1e999}', 422),
    "huge integer": (b'{"template":"{3}","seed":' + b"9" * 5000 + b"}", 400),
    "seed too large": (b'{"template":"{3}","seed":9223372036854775808}', 422),
    "boolean for a number": (b'{"template":"{3}","steps":true}', 422),
    "no gap": (b'{"template":"hello"}', 400),
    "unbalanced": (b'{"template":"a { b"}', 400),
    "empty template": (b'{"template":""}', 400),
    "too long": (b'{"template":"{1000}"}', 400),
    "a million tokens, often": (json.dumps({"template": "{1000000}" * 7000}).encode(), 400),
    "long text": (json.dumps({"template": "{3}" + "ab " * 9000}).encode(), 400),
    "too many digits": (json.dumps({"template": "{" + "9" * 5000 + "}"}).encode(), 400),
    "too many steps": (b'{"template":"{3}","steps":1000000000}', 400),
    "too many samples": (b'{"template":"{3}","samples":1000000000}', 400),
    "unknown halt": (b'{"template":"{3}","halt":"tomorrow"}', 400),
    "too many halts": (b'{"template":"{3}","halt":"fixed:3,fixed:4,fixed:5,fixed:6,fixed:7"}', 400),
    "overlap too large": (b'{"template":"{3}","overlap":32}', 400),
    "no such grid": (b'{"template":"{3}","grid":"warp"}', 400),
    "deeply nested": (b'{"template":' + b"[" * 30000 + b"]" * 30000 + b"}", 400),
    "deep objects": (b'{"a":' * 5000 + b"1" + b"}" * 5000, 400),
    "invalid UTF-8": (b'{"template":"\xff\xfe {3}"}', 400),
    "oversized": (b'{"template":"' + b"a" * 100_000 + b'{3}"}', 413),
}


@pytest.mark.parametrize("name", BODIES)
def test_malformed_bodies(small: Running, name: str) -> None:
    body, status = BODIES[name]
    answer = httpx.post(f"{small.url}/v1/generate", content=body, headers=JSON, timeout=20)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 300
    assert error["type"] == "invalid_request_error"


def test_a_body_of_undeclared_size(small: Running) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 1000

    answer = httpx.post(f"{small.url}/v1/generate", content=pieces(), headers=JSON, timeout=20)
    assert answer.status_code == 413


def test_a_body_that_never_comes(lm: DiffusionLM) -> None:
    with running(lm, receive=0.3) as here:

        async def ask() -> bytes:
            host, port = here.url[7:].split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(
                b"POST /v1/generate HTTP/1.1\r\nhost: x\r\n"
                b"content-type: application/json\r\ncontent-length: 50\r\n\r\n{"
            )
            answer = await asyncio.wait_for(reader.readline(), 10)
            writer.close()
            return answer

        assert b"408" in asyncio.run(ask())


def test_a_flood(lm: DiffusionLM) -> None:
    """2,000 requests over 100 connections, with room for 20."""
    body = {"template": "{20}", "steps": 8, "seed": 1}
    message = json.dumps(body).encode()
    head = "POST /v1/generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    request = head.encode() + b"content-length: %d\r\n\r\n" % len(message) + message

    async def flood(host: str, port: str) -> list[tuple[bytes, dict[str, Any]]]:
        async def ask(count: int) -> list[tuple[bytes, dict[str, Any]]]:
            reader, writer = await asyncio.open_connection(host, int(port))
            found = []
            for _ in range(count):
                writer.write(request)
                top = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", top)
                assert length
                found.append((top, json.loads(await reader.readexactly(int(length[1])))))
            writer.close()
            return found

        return [
            one for part in await asyncio.gather(*(ask(20) for _ in range(100))) for one in part
        ]

    with running(lm, queue=20, share=20) as here:
        url = f"{here.url}/v1/generate"
        answers = asyncio.run(asyncio.wait_for(flood(*here.url[7:].split(":")), 60))
        statuses = Counter(int(top.split()[1]) for top, _ in answers)
        assert statuses.total() == 2000
        assert set(statuses) == {200, 429}
        alone = lm.generate("{20}", steps=8, seed=1)[0].tokens
        for top, answer in answers:
            if top.split()[1] == b"429":
                assert re.search(rb"\r\nretry-after: [1-9]\d*\r\n", top)
                assert answer["error"]["code"] == "queue_full"
                assert "try again later" in answer["error"]["message"]
            else:
                assert answer["results"][0]["ids"] == alone
        page = httpx.get(f"{here.url}/metrics").text
        assert f'route="/v1/generate",status="429"}} {statuses[429]}.0' in page
        here.until(lambda: here.worker.held == 0)
        again = httpx.post(url, json=body, timeout=20)
        assert again.json()["results"][0]["ids"] == alone


def test_a_flood_is_refused_before_anything_is_parsed(lm: DiffusionLM) -> None:
    with running(lm, queue=1, share=1) as here:
        url = f"{here.url}/v1/generate"
        long = {"template": "{20}", "steps": 2000, "halt": "none", "stream": True}
        with httpx.stream("POST", url, json=long, timeout=60):
            assert here.worker.held == 1
            assert httpx.post(url, content=b"{", headers=JSON).status_code == 429
            assert httpx.post(url, content=b"{").status_code == 415, "bodies are bounded as ever"
            assert httpx.post(f"{here.url}/v1/completions", json={}).headers["retry-after"]
            assert httpx.get(f"{here.url}/healthz").status_code == 200
        here.until(lambda: here.worker.held == 0)
        assert httpx.post(url, content=b"{", headers=JSON).status_code == 422


def test_who_sends_two_requests_at_once_and_leaves_is_noticed(lm: DiffusionLM) -> None:
    with running(lm, steps=100_000) as here:
        host, port = here.url[7:].split(":")
        body = b'{"template": "{20}", "steps": 100000}'
        head = "POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        asked = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        with socket.create_connection((host, int(port))) as line:
            line.sendall(2 * asked)
            here.until(lambda: here.worker.at_work == 1)
        here.until(lambda: here.worker.held == 0)
