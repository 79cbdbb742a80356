"""HEAD where a page may be read, and null where a field may be left out."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest

from ddlm.lm import DiffusionLM
from ddlm.serve.schema import Completion, Generate
from serve.running import Running, running

PAGES = [
    "/",
    "/docs",
    "/healthz",
    "/readyz",
    "/metrics",
    "/v1/models",
    "/openapi.json",
    "/static/app.js",
]


def optional(kind: Any) -> list[str]:
    return sorted(name for name, field in kind.model_fields.items() if not field.is_required())


@pytest.mark.parametrize("path", PAGES)
def test_what_may_be_read_answers_head(served: Running, path: str) -> None:
    host, port = served.url[7:].split(":")
    with socket.create_connection((host, int(port))) as line:
        line.sendall(b"HEAD %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % path.encode())
        answer = b"".join(iter(lambda: line.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert body == b""
    wanted = httpx.get(served.url + path).headers["content-type"]
    assert f"content-type: {wanted}".encode() in head.lower()


def test_head_opens_nothing_that_get_does_not(lm: DiffusionLM) -> None:
    key = "k" * 20
    with running(lm, keys=(key,), origins=("http://a.example",)) as here:
        assert httpx.head(f"{here.url}/v1/models").status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.head(f"{here.url}/v1/models", headers=headers).status_code == 200
        assert httpx.head(f"{here.url}/v1/generate", headers=headers).status_code == 405
        assert httpx.head(f"{here.url}/nowhere").status_code == 404
        asks = {"origin": "http://a.example", "access-control-request-method": "HEAD"}
        assert httpx.options(f"{here.url}/v1/models", headers=asks).status_code == 200


def test_the_description_has_no_operation_twice(served: Running) -> None:
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert all("head" not in methods for methods in paths.values())


@pytest.mark.parametrize("field", optional(Generate))
def test_null_in_a_generation_is_as_left_out(served: Running, field: str) -> None:
    body = {"template": "a {6}", "steps": 6, "seed": 3}
    body.pop(field, None)
    ask = lambda more: httpx.post(f"{served.url}/v1/generate", json=body | more, timeout=60)  # noqa: E731
    left_out, null = ask({}), ask({field: None})
    assert (left_out.status_code, null.status_code) == (200, 200), null.text
    if field != "seed":  # without one each request draws its own
        assert null.json()["results"][0]["ids"] == left_out.json()["results"][0]["ids"]


@pytest.mark.parametrize("field", optional(Completion))
def test_null_in_a_completion_is_as_left_out(served: Running, field: str) -> None:
    body = {"prompt": "the", "max_tokens": 4, "steps": 6, "seed": 3}
    body.pop(field, None)
    ask = lambda more: httpx.post(f"{served.url}/v1/completions", json=body | more, timeout=60)  # noqa: E731
    left_out, null = ask({}), ask({field: None})
    assert (left_out.status_code, null.status_code) == (200, 200), null.text
    if field != "seed":
        assert null.json()["choices"][0]["text"] == left_out.json()["choices"][0]["text"]


def test_the_description_says_so(served: Running) -> None:
    schemas = httpx.get(f"{served.url}/openapi.json").json()["components"]["schemas"]
    for kind in (Generate, Completion):
        fields = schemas[kind.__name__]["properties"]
        may = sorted(n for n, f in fields.items() if {"type": "null"} in f.get("anyOf", ()))
        assert may == optional(kind)
    top_k = schemas["Generate"]["properties"]["top_k"]
    assert top_k["anyOf"][0]["type"] == "integer"
    assert top_k["default"] == 0


def test_null_is_no_template_and_no_field_of_another_name(served: Running) -> None:
    for body in ({"template": None}, {"template": "{3}", "file": None}):
        answer = httpx.post(f"{served.url}/v1/generate", json=body)
        assert answer.status_code == 422, answer.text
