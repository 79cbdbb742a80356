"""Bodies that Python's own JSON parser reads otherwise than the checks before it, or says too little of."""

from __future__ import annotations

import json
import sys

import httpx
import pytest

from ddlm.serve.guard import check_json
from ddlm.serve.limits import RefusedError
from serve.running import Running

JSON = {"content-type": "application/json"}
BODY = '{"prompt": "the", "max_tokens": 2}'


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_json_is_taken_in_utf_8_only(served: Running, encoding: str) -> None:
    body = BODY.encode(encoding)
    assert json.loads(body) == json.loads(BODY), "the parser alone would take it"
    answer = httpx.post(f"{served.url}/v1/completions", content=body, headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_utf8")
    assert "is NUL" in error["message"]


def test_no_encoding_hides_the_nesting() -> None:
    # one byte of the character is that of a quotation mark: read byte by byte, all behind it is within quotes
    body = ('{"\N{RATIO}":' + "[" * 40 + "]" * 40 + "}").encode("utf-16-le")
    assert json.loads(body)
    with pytest.raises(RefusedError) as refusal:
        check_json(body, depth=16)
    assert refusal.value.code == "invalid_utf8"


def test_an_escaped_nul_is_a_character_like_others(served: Running) -> None:
    body = BODY.replace("the", "a\\u0000b").encode()
    answer = httpx.post(f"{served.url}/v1/completions", content=body, headers=JSON, timeout=30)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("sign", ["", "-"])
def test_a_number_of_too_many_digits_is_named(served: Running, sign: str) -> None:
    most = sys.get_int_max_str_digits()
    body = f'{{"prompt": "the", "seed": {sign}{"9" * (most + 1)}}}'.encode()
    answer = httpx.post(f"{served.url}/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert f"more than {most} digits" in answer.json()["error"]["message"]


def test_a_message_is_one_line_whatever_was_asked(served: Running) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", json={"model": "a\nb\r\nc", "prompt": ""})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].startswith("the model 'a b c' is not here")
