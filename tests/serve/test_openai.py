"""Where OpenAI's client and its documentation say exactly what an answer looks like."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import APIStatusError, NotFoundError, OpenAI

from ddlm.lm import DiffusionLM
from serve.running import Running, running


@pytest.fixture
def client(served: Running) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


def complete(client: OpenAI, **options: Any) -> Any:
    common = {"model": "small", "prompt": "the", "max_tokens": 4, "seed": 3}
    return client.completions.create(**common | {"extra_body": {"steps": 5}} | options)


def test_a_model_is_described_as_in_the_list(client: OpenAI, served: Running) -> None:
    assert client.models.retrieve("small") == client.models.list().data[0]
    listed = httpx.get(f"{served.url}/v1/models").json()
    assert httpx.get(f"{served.url}/v1/models/").json() == listed
    assert "/v1/models/{model}" in httpx.get(f"{served.url}/openapi.json").json()["paths"]


@pytest.mark.parametrize("name", ["other", "someone/other", "small/", "ü"])
def test_another_model_is_refused_as_by_completions(client: OpenAI, name: str) -> None:
    with pytest.raises(NotFoundError) as alone:
        client.models.retrieve(name)
    with pytest.raises(NotFoundError) as asked:
        complete(client, model=name)
    assert alone.value.body == asked.value.body
    assert alone.value.code == "model_not_found"


def test_a_model_needs_a_key_where_the_list_does(lm: DiffusionLM) -> None:
    with running(lm, keys=("k" * 20,)) as here:
        url = f"{here.url}/v1/models/small"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"authorization": f"Bearer {'k' * 20}"}).status_code == 200
        assert 'route="/v1/models/{model:path}"' in here.server.metrics.text().decode()


@pytest.mark.parametrize("halt", ["none", "patience:2:freeze"])
def test_usage_is_null_in_every_chunk_but_the_last(client: OpenAI, halt: str) -> None:
    options = {"stream": True, "n": 2, "extra_body": {"steps": 30, "halt": halt}}
    told = list(complete(client, stream_options={"include_usage": True}, **options))
    assert len(told) >= 3
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in told[:-1])
    assert (told[-1].choices, told[-1].usage.completion_tokens) == ([], 8)
    for quiet in (None, {"include_usage": False}, {"include_obfuscation": False}):
        told = list(complete(client, stream_options=quiet, **options))
        assert not any("usage" in chunk.model_fields_set for chunk in told)


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ({"stream_options": {"include_usage": True}}, 400, "stream_options is for streams only"),
        ({"stream": True, "stream_options": {"include_usage": "no"}}, 422, "valid boolean"),
        ({"stream": True, "stream_options": {"usage": True}}, 422, "'include_usage'"),
        ({"echo": "no"}, 422, "valid boolean"),
        ({"temperature": 0}, 422, "greater than or equal to 0.001"),
        ({"logprobs": 0}, 400, "logprobs is not supported"),
        ({"n": 2, "best_of": 3}, 400, "best_of is not supported"),
        ({"max_tokens": 0}, 422, "greater than or equal to 1"),
        ({"prompt": [[3], "a"]}, 422, "valid integer"),
        ({"stop": list("abcde")}, 422, "at most 4 items"),
    ],
)
def test_what_is_not_done_is_said(
    client: OpenAI, options: dict[str, Any], status: int, said: str
) -> None:
    with pytest.raises(APIStatusError) as refusal:
        complete(client, **options)
    error = refusal.value
    assert error.status_code == status
    assert isinstance(error.body, dict)
    assert said in error.body["message"]
    assert str(error.param).partition(".")[0] == list(options)[-1]


def test_a_path_that_is_not_here_says_where_to_look(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="there is no such path: /docs lists"):
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": "a"}])
