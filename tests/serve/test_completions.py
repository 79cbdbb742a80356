"""Prompts, stop texts and counts of completions, where templates and streams make them easy to get wrong."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from ddlm.lm import DiffusionLM
from ddlm.sampling.template import from_tokens
from serve.running import Running, running


def ask(here: Running, **options: Any) -> httpx.Response:
    body = {"max_tokens": 8, "steps": 10, "seed": 3} | options
    return httpx.post(f"{here.url}/v1/completions", json=body, timeout=30)


def complete(here: Running, **options: Any) -> dict[str, Any]:
    answer = ask(here, **options)
    assert answer.status_code == 200, answer.text
    return answer.json()


def choice(here: Running, **options: Any) -> tuple[str, str]:
    """Text and reason of the only completion."""
    first = complete(here, **options)["choices"][0]
    return first["text"], first["finish_reason"]


def pieces(here: Running, **options: Any) -> list[dict[str, Any]]:
    lines = ask(here, stream=True, **options).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def streamed(here: Running, **options: Any) -> tuple[str, str]:
    """The same, of a stream."""
    told = [piece["choices"][0] for piece in pieces(here, **options)]
    return "".join(one["text"] for one in told), told[-1]["finish_reason"]


@pytest.mark.parametrize("prompt", ["the old ", "the old\n ", "the {old} ", " ", ""])
def test_a_prompt_is_kept_to_its_last_space(served: Running, lm: DiffusionLM, prompt: str) -> None:
    ids = lm.tokenizer.encode(prompt)
    alone = lm.generate(from_tokens(ids, 8), steps=10, seed=3)[0]
    told = complete(served, prompt=prompt, echo=True)
    assert told["choices"][0]["text"] == alone.text
    assert alone.text.startswith(prompt)
    assert told["usage"]["prompt_tokens"] == len(ids)
    text = complete(served, prompt=prompt)["choices"][0]["text"]
    assert prompt + text == alone.text


def test_the_space_before_a_suffix_stays_too(served: Running, lm: DiffusionLM) -> None:
    told = complete(served, prompt="the old ", suffix="  sea ")
    given = len(lm.tokenizer.encode("the old ")) + len(lm.tokenizer.encode("  sea "))
    assert told["usage"]["prompt_tokens"] == given


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_is_not_looked_for_in_the_prompt(served: Running, stream: bool) -> None:
    prompt = "First line.\nSecond"
    whole = complete(served, prompt=prompt)["choices"][0]["text"]
    own = next(c for c in whole[1:] if c not in prompt)
    for stop in ("\n", [".", "First"], [own, "line"]):
        cuts = [whole.find(s) for s in stop if s in whole]
        wanted = (whole[: min(cuts)], "stop") if cuts else (whole, "length")
        options = {"prompt": prompt, "echo": True, "stop": stop}
        told = streamed(served, **options) if stream else choice(served, **options)
        assert told == (prompt + wanted[0], wanted[1])


def test_a_stream_counts_each_prompt_once_in_whatever_order_its_texts_end(
    served: Running, lm: DiffusionLM
) -> None:
    prompts = ["the", "the old sailor saw the river"]
    templates = [from_tokens(lm.tokenizer.encode(p), 1) for p in prompts]
    options = {"steps": 30, "halt": "patience:2"}
    for seed in range(20):
        steps = [g.steps for g in lm.generate(templates, samples=2, seed=seed, **options)]
        ended = sorted(range(4), key=lambda i: (steps[i], i))
        if ended[0] // 2 == ended[2] // 2:
            break
    else:
        raise AssertionError("no seed mixes the texts of the prompts")
    body = {"prompt": prompts, "n": 2, "max_tokens": 1, "seed": seed} | options
    whole = complete(served, **body)["usage"]
    assert whole["prompt_tokens"] == sum(len(lm.tokenizer.encode(p)) for p in prompts)
    assert pieces(served, **body, stream_options={"include_usage": True})[-1]["usage"] == whole


def test_more_texts_than_one_client_may_hold_are_refused_for_good(lm: DiffusionLM) -> None:
    with running(lm, queue=8, share=4, samples=8) as here:
        sample = {"max_tokens": 4, "steps": 2}
        for body, said in (
            ({"prompt": "the", "n": 5}, "5 texts were asked for"),
            ({"prompt": ["the"] * 5}, "5 prompts were given"),
        ):
            answer = httpx.post(f"{here.url}/v1/completions", json=body | sample, timeout=20)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "too_many_samples")
            assert said in error["message"]
            assert (
                "at most 4 texts" in error["message"] or "at most 4 a request" in error["message"]
            )
        model = httpx.get(f"{here.url}/v1/models").json()["data"][0]
        assert model["limits"]["samples"] == 4
        assert len(complete(here, prompt="the", n=4)["choices"]) == 4
