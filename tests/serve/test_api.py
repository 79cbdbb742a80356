from __future__ import annotations

import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from ddlm.lm import DiffusionLM
from serve.running import Running, running

TEMPLATES = ["The river {12} sea.", "{24}", "{5} and {7}.", "In the {3}", "{{x}} {9}"]


def events(response: httpx.Response) -> list[tuple[str, dict]]:
    found = []
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            found.append((name, json.loads(line[6:])))
    return found


# ---- answers


def test_many_at_once_equal_the_model_alone(served: Running, lm: DiffusionLM) -> None:
    wanted = [(TEMPLATES[i % 5], i, 10 + 7 * (i % 4)) for i in range(30)]

    def ask(request: tuple[str, int, int]) -> dict:
        template, seed, steps = request
        body = {"template": template, "seed": seed, "steps": steps, "halt": "patience:6"}
        return httpx.post(f"{served.url}/v1/generate", json=body, timeout=60).json()["results"][0]

    with ThreadPoolExecutor(15) as pool:
        answers = list(pool.map(ask, wanted))
    assert len({a["steps"] for a in answers}) > 1, "all ran for the same time: nothing was mixed"
    for (template, seed, steps), answer in zip(wanted, answers, strict=True):
        alone = lm.generate(template, seed=seed, steps=steps, halt="patience:6")[0]
        assert answer["ids"] == alone.tokens
        assert (answer["text"], answer["steps"], answer["reason"], answer["seed"]) == (
            alone.text, alone.steps, alone.reason, seed,
        )  # fmt: skip
        assert "".join(answer["tokens"]) == answer["text"]


def test_options_reach_the_sampler(served: Running, lm: DiffusionLM) -> None:
    options = {
        "steps": 12, "solver": "sde", "grid": "karras", "noise_scale": 0.8, "temperature": 0.7,
        "top_k": 5, "guidance": 1.5, "refine": 3, "seed": 3,
    }  # fmt: skip
    body = {"template": "a {10}", "samples": 3} | options
    got = httpx.post(f"{served.url}/v1/generate", json=body, timeout=60).json()["results"]
    alone = lm.generate("a {10}", samples=3, **options)
    assert [r["ids"] for r in got] == [g.tokens for g in alone]
    assert {(r["steps"], r["allowed"]) for r in got} == {(15, 15)}


def test_rounds_of_refinement_count_as_steps(served: Running) -> None:
    body = {"template": "a {3}", "steps": 1900, "refine": 200}
    answer = httpx.post(f"{served.url}/v1/generate", json=body, timeout=60)
    assert answer.status_code == 400
    assert "2100 steps (rounds of refinement among them) were asked for" in answer.text


def test_a_text_longer_than_the_model(served: Running, lm: DiffusionLM) -> None:
    body = {"template": "the {40} sea {20}", "steps": 8, "seed": 1, "overlap": 10}
    got = httpx.post(f"{served.url}/v1/generate", json=body, timeout=60).json()["results"][0]
    alone = lm.generate("the {40} sea {20}", steps=8, seed=1, overlap=10)[0]
    assert got["ids"] == alone.tokens
    assert got["steps"] == alone.steps == got["allowed"]


@pytest.mark.parametrize("halt", ["patience:4", "patience:3:freeze", "none"])
def test_a_stream_tells_every_step(served: Running, lm: DiffusionLM, halt: str) -> None:
    body = {
        "template": "the {8} sea", "steps": 40, "seed": 2, "samples": 2, "halt": halt,
        "stream": True, "settled_after": 3,
    }  # fmt: skip
    with httpx.stream("POST", f"{served.url}/v1/generate", json=body, timeout=60) as response:
        told = events(response)
    names = [name for name, _ in told]
    assert (names[0], names[-1], names.count("done")) == ("start", "end", 2)
    start = told[0][1]
    assert [t is None for t in start["tokens"]] == [bool(n) for n in start["is_noised"]]
    alone = lm.generate("the {8} sea", samples=2, steps=40, seed=2, halt=halt)
    for sample, expected in enumerate(alone):
        mine = [(n, d) for n, d in told if d.get("sample") == sample]
        curve = [point for _, d in mine for point in d["curve"]]
        assert [p[0] for p in curve] == list(range(1, expected.steps + 1)), "a step is missing"
        assert all(0 <= p[1] <= 8 and p[2] >= 0 for p in curve)
        done = mine[-1][1]
        assert (done["text"], done["reason"], done["allowed"]) == (
            expected.text, expected.reason, 40,
        )  # fmt: skip
        for name, data in mine[:-1]:
            assert name == "step"
            assert len(data["tokens"]) == len(data["settled"]) == len(data["entropy"])
            given = [i for i, n in enumerate(start["is_noised"]) if not n]
            assert all(data["settled"][i] for i in given)


def test_frames_are_bounded_in_rate(lm: DiffusionLM) -> None:
    with running(lm, frames=0.5) as here:
        body = {"template": "{8}", "steps": 300, "seed": 2, "stream": True}
        with httpx.stream("POST", f"{here.url}/v1/generate", json=body, timeout=60) as response:
            told = events(response)
    frames = [d for n, d in told if n == "step"]
    seconds = next(d["seconds"] for n, d in told if n == "done")
    assert 1 <= len(frames) <= 1 + seconds * 0.5
    points = [p[0] for _, d in told for p in d.get("curve", [])]
    assert points == list(range(1, 301))


# ---- the official client


@pytest.fixture
def client(served: Running) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


def test_openai_lists_the_model(client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["small"]


def test_openai_completes_and_fills_in(client: OpenAI, lm: DiffusionLM) -> None:
    got = client.completions.create(
        model="small", prompt="the old", suffix=" sea", max_tokens=6, n=2, seed=5,
        extra_body={"steps": 15},
    )  # fmt: skip
    alone = lm.generate("the old{6} sea", samples=2, seed=5, steps=15)
    expected = [g.text[g.generated[0][0] : g.generated[0][1]] for g in alone]
    assert [c.text for c in got.choices] == expected
    assert [c.finish_reason for c in got.choices] == ["length"] * 2
    given = len(lm.tokenizer.encode("the old")) + len(lm.tokenizer.encode(" sea"))
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (given, 12)
    echoed = client.completions.create(
        model="small", prompt="the {old}", max_tokens=4, seed=5, echo=True
    )
    assert echoed.choices[0].text.startswith("the {old}")


def test_openai_prompts_in_every_form(client: OpenAI, lm: DiffusionLM) -> None:
    ids = lm.tokenizer.encode("the sea")
    common = {"model": "small", "max_tokens": 4, "seed": 1, "extra_body": {"steps": 5}}
    as_text = client.completions.create(prompt="the sea", **common).choices[0].text
    assert client.completions.create(prompt=ids, **common).choices[0].text == as_text
    both = client.completions.create(prompt=[ids, ids[:2]], n=2, **common).choices
    assert [c.index for c in both] == [0, 1, 2, 3]
    assert both[0].text == as_text


def test_openai_stops(client: OpenAI) -> None:
    common = {"model": "small", "prompt": "the", "max_tokens": 12, "seed": 3}
    whole = client.completions.create(**common).choices[0].text
    stop = whole[len(whole) // 2]
    cut = client.completions.create(stop=[stop], **common).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize(
    ("halt", "refine"), [("none", 0), ("patience:2:freeze", 0), ("patience:2:freeze", 5)]
)
def test_openai_streams(client: OpenAI, halt: str, refine: int) -> None:
    common = {
        "model": "small", "prompt": "the", "max_tokens": 10, "seed": 3, "n": 2,
        "extra_body": {"steps": 60, "halt": halt, "refine": refine},
    }  # fmt: skip
    whole = client.completions.create(**common)
    texts, reasons, usage = ["", ""], {}, None
    for chunk in client.completions.create(
        stream=True, stream_options={"include_usage": True}, **common
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [c.text for c in whole.choices]
    assert reasons == {0: "length", 1: "length"}
    assert usage == whole.usage


def test_openai_errors(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="'other' is not here"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(BadRequestError, match="top_p is not supported"):
        client.completions.create(model="small", prompt="a", top_p=0.5)
    for prompt, count, field in (("a", 500, "max_tokens"), ("a " * 96, 4, "prompt")):
        with pytest.raises(BadRequestError, match="takes at most 96") as refused:
            client.completions.create(model="small", prompt=prompt, max_tokens=count)
        assert refused.value.param == field


# ---- the rest of the interface


def test_the_other_routes(served: Running) -> None:
    get = lambda path: httpx.get(served.url + path)  # noqa: E731
    assert get("/healthz").json() == {"status": "ok"}
    assert get("/readyz").json() == {"status": "ready"}
    assert "ddlm_texts_total" in get("/metrics").text
    assert "/v1/generate" in get("/openapi.json").json()["paths"]
    for path in ("/", "/docs", "/static/app.js"):
        page = get(path)
        assert page.status_code == 200
        assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in page.text
        assert "default-src 'self'" in page.headers["content-security-policy"]
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/nowhere"):
        assert get(path).status_code == 404


def test_no_other_site_may_use_it(served: Running) -> None:
    sent = {"origin": "https://elsewhere.example"}
    answer = httpx.get(f"{served.url}/v1/models", headers=sent)
    assert "access-control-allow-origin" not in answer.headers
    plain = httpx.post(
        f"{served.url}/v1/generate", content=b'{"template":"{3}"}',
        headers=sent | {"content-type": "text/plain"},
    )  # fmt: skip
    assert plain.status_code == 415, "a form of another site could send it without asking"


def test_keys(lm: DiffusionLM) -> None:
    good, other = "k" * 20, "o" * 20
    with running(lm, keys=(good, other)) as here:
        ask = lambda **headers: httpx.get(f"{here.url}/v1/models", headers=headers)  # noqa: E731
        for bad in ({}, {"authorization": good}, {"authorization": f"Bearer {good[:-1]}"}):
            answer = ask(**bad)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert ask(authorization=f"Bearer {good}").status_code == 200
        assert ask(authorization=f"bearer {other}").status_code == 200
        assert httpx.get(f"{here.url}/metrics").status_code == 401
        assert httpx.get(f"{here.url}/").status_code == 200


def test_log_lines_hold_no_prompt(served: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        body = {"template": "secretword {4}", "steps": 3}
        httpx.post(f"{served.url}/v1/generate?q=secretword", json=body, timeout=60)
        httpx.post(f"{served.url}/secretword", json=body)
        httpx.post(f"{served.url}/v1/generate", json={"template": "secretword {x}"})
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("ddlm", "uvicorn"))]
    assert sum("POST" in line for line in ours) == 3
    assert not [line for line in ours if "secretword" in line]


# ---- load, leaving, ending


def test_a_full_queue_says_when_to_come_again(lm: DiffusionLM) -> None:
    with running(lm, slots=2, queue=6, share=6) as here:
        ask = lambda _: httpx.post(  # noqa: E731
            f"{here.url}/v1/generate", json={"template": "{20}", "steps": 300}, timeout=60
        )
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(ask, range(24)))
        kinds = {a.status_code for a in answers}
        assert kinds == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert ask(0).status_code == 200, "it goes on"
        assert here.worker.held == 0


def test_one_client_does_not_hold_up_another(lm: DiffusionLM) -> None:
    with running(lm, slots=1, keys=("a" * 16, "b" * 16)) as here:
        done = []

        def ask(key: str) -> None:
            body = {"template": "{20}", "steps": 150}
            headers = {"authorization": f"Bearer {key * 16}"}
            answer = httpx.post(f"{here.url}/v1/generate", json=body, headers=headers, timeout=60)
            assert answer.status_code == 200
            done.append(key)

        threads = [threading.Thread(target=ask, args=("a",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        here.until(lambda: here.worker.waiting == 7)
        ask("b")
        assert done.count("a") <= 3, "it waited for a turn of its own, not for all"
        for thread in threads:
            thread.join()


def leave_after(here: Running, body: dict, read: int) -> None:
    """Send a request over a bare socket and hang up."""
    host, port = here.url[7:].split(":")
    data = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as line:
        line.sendall(
            b"POST /v1/generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(data), data)
        )
        here.until(lambda: here.worker.at_work > 0)
        if read:
            line.recv(read)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_slot(lm: DiffusionLM, stream: bool) -> None:
    with running(lm, slots=1, steps=100_000) as here:
        body = {"template": "{20}", "steps": 100_000, "stream": stream}
        leave_after(here, body, read=200 if stream else 0)
        here.until(lambda: here.worker.at_work == 0, seconds=5)
        answer = httpx.post(f"{here.url}/v1/generate", json={"template": "{4}"}, timeout=20)
        assert answer.status_code == 200
        assert here.worker.held == 0


def test_a_cancelled_text_leaves_within_one_step(lm: DiffusionLM) -> None:
    """At the worker: the step after the cancellation runs with the next text in the slot."""
    with running(lm, slots=1, steps=100_000) as here:
        worker = here.worker
        seen = []
        step = worker.engine.step

        def watched_step():
            results = step()
            seen.append(sorted(worker._running))
            return results

        worker.engine.step = watched_step
        cancelled_at = []
        cancel = worker.cancel

        def watched_cancel(*asked):
            cancel(*asked)
            cancelled_at.append(len(seen))

        worker.cancel = watched_cancel
        body = {"template": "{20}", "steps": 100_000}
        leave_after(here, body, read=0)
        here.until(lambda: bool(cancelled_at))
        here.until(lambda: worker.at_work == 0, seconds=5)
        assert len(seen) - cancelled_at[0] <= 1


def test_a_slow_reader_costs_no_memory_and_holds_up_nobody(lm: DiffusionLM) -> None:
    with running(lm, frames=1000, send=1.0) as here:
        host, port = here.url[7:].split(":")
        body = {"template": "{90}", "steps": 600, "stream": True, "samples": 8}
        data = json.dumps(body).encode()
        line = socket.socket()
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect((host, int(port)))
        line.sendall(
            b"POST /v1/generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(data), data)
        )
        here.until(lambda: here.worker.at_work == 8)
        quick = httpx.post(
            f"{here.url}/v1/generate", json={"template": "{4}", "steps": 5}, timeout=30
        )
        assert quick.status_code == 200
        here.until(lambda: here.worker.at_work == 0, seconds=30)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            here.until(lambda: not here.web.server_state.connections)
        line.close()


def test_the_deadline(lm: DiffusionLM) -> None:
    with running(lm, deadline=0.3, steps=100_000) as here:
        body = {"template": "{20}", "steps": 100_000}
        answer = httpx.post(f"{here.url}/v1/generate", json=body, timeout=20)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
        with httpx.stream(
            "POST", f"{here.url}/v1/generate", json=body | {"stream": True}, timeout=20
        ) as response:
            told = events(response)
        assert [n for n, _ in told][-2:] == ["error", "end"]
        here.until(lambda: here.worker.at_work == 0)


def test_a_fault_of_the_engine_does_not_end_the_server(lm: DiffusionLM) -> None:
    with running(lm) as here:

        def fault():
            raise RuntimeError("out of memory")

        here.worker.engine.step = fault
        ask = {"template": "{4}", "steps": 3}
        broken = httpx.post(f"{here.url}/v1/generate", json=ask, timeout=20)
        assert (broken.status_code, broken.json()["error"]["code"]) == (500, "engine")
        assert httpx.post(f"{here.url}/v1/generate", json=ask, timeout=20).status_code == 200
