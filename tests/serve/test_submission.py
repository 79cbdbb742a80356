"""What is checked and counted before a text is queued."""

from __future__ import annotations

import httpx
import pytest

from ddlm.lm import DiffusionLM
from ddlm.sampling.template import parse
from ddlm.serve.jobs import Job, long_text
from serve.running import Running


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("halt", "message"),
    [
        (",".join(f"patience:{i}" for i in range(2, 7)), "at most 4 can be"),
        ("fixed:" + "9" * 40, "at most 1000000"),
        ("patience:5:min=" + "9" * 40, "at most 1000000"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_before_it_is_queued(
    served: Running, stream: bool, halt: str, message: str
) -> None:
    body = {"template": "{8}", "steps": 5, "halt": halt, "stream": stream}
    for route, more in (("generate", {}), ("completions", {"prompt": "a", "max_tokens": 3})):
        asked = {k: v for k, v in body.items() if k != "template" or route == "generate"} | more
        response = httpx.post(f"{served.url}/v1/{route}", json=asked, timeout=60)
        assert response.status_code == 400, response.text
        assert message in response.json()["error"]["message"]
    assert served.worker.held == 0
    alive = httpx.post(f"{served.url}/v1/generate", json={"template": "{8}", "steps": 2})
    assert alive.status_code == 200


def test_steps_allowed_count_the_windows_that_make_any(lm: DiffusionLM) -> None:
    """The last window is moved back to be a full one: here an earlier one has written all that is open in it."""
    given = "sea and the river in the morning and again in the evening"
    template = parse(f"the {{22}} {given}", lm.tokenizer)
    assert len(template) > lm.length
    text = long_text(0, template, 0, lm.length, 4)
    assert all(bool(text.open[a:b].any()) for a, b in text.stretches)
    job = Job("me", 0, text, lm.options(steps=7), 0.0, lambda _: None)
    (alone,) = lm.generate(template, steps=7, overlap=4)
    assert job.steps == alone.steps == 7


def test_every_seed_of_an_answer_can_be_asked_for_again(served: Running) -> None:
    last = 2**63 - 1
    body = {"template": "{2}", "steps": 2, "seed": last, "samples": 2}
    answer = httpx.post(f"{served.url}/v1/generate", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "seed"
    answer = httpx.post(f"{served.url}/v1/generate", json=body | {"samples": 1}, timeout=60)
    assert answer.json()["results"][0]["seed"] == last


@pytest.mark.parametrize(
    ("field", "value", "param", "message"),
    [
        ("prompt", 3, "prompt", "prompt: Input should be a valid string"),
        ("prompt", [1, "a"], "prompt.1", "prompt.1: Input should be a valid integer"),
        ("prompt", [-1], "prompt.0", "prompt.0: Input should be greater than or equal to 0"),
        ("prompt", [[1], ["x"]], "prompt.1.0", "prompt.1.0: Input should be a valid integer"),
        ("temperature", True, "temperature", "temperature: Input should be a valid number"),
        ("top_p", "1", "top_p", "top_p: Input should be a valid number"),
        ("stream", "yes", "stream", "stream: Input should be a valid boolean"),
        ("stop", ["a"] * 5, "stop", "stop: List should have at most 4 items"),
        ("a[b", 1, "a[b", "a[b: Extra inputs are not permitted"),
    ],
)
def test_a_body_that_does_not_fit_is_told_by_its_own_names(
    served: Running, field: str, value: object, param: str, message: str
) -> None:
    body = {"prompt": "a", "max_tokens": 2, field: value}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (422, param)
    assert error["message"].startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "the body is not JSON: "),
        ("", "the body must be a JSON object"),
        ("null", "the body must be a JSON object"),
    ],
)
def test_a_body_that_is_no_object(served: Running, content: str, message: str) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{served.url}/v1/generate", content=content, headers=headers, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (422, None)
    assert error["message"].startswith(message)
