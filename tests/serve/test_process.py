"""``ddlm serve`` as people start it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from ddlm.cli import main
from ddlm.device import can_compile


@contextmanager
def started(folder: Path, *options: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "ddlm", "serve", "--model", str(folder), "--port", "0"]
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | env,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+?:\d+", line)
        assert found, line + process.stdout.read()
        yield process, found[0].replace("0.0.0.0", "127.0.0.1")
    finally:
        process.kill()
        process.wait()


def test_sigterm_finishes_what_is_at_hand(folder: Path) -> None:
    with started(folder, "--steps", "100000") as (process, url):
        wait_until_ready(url)
        answers: list[httpx.Response] = []
        body = {"template": "{20}", "steps": 400}
        ask = lambda: answers.append(  # noqa: E731
            httpx.post(f"{url}/v1/generate", json=body, timeout=60)
        )
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        while httpx.get(f"{url}/metrics").text.count("ddlm_slots_busy 3.0") == 0:
            pass
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert [a.status_code for a in answers] == [200, 200, 200]
        assert process.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")


def test_sigterm_does_not_wait_for_ever_and_says_so(folder: Path) -> None:
    options = ("--steps", "100000", "--drain", "1", "--slots", "1")
    with started(folder, *options) as (process, url):
        wait_until_ready(url)
        body = {"template": "{20}", "steps": 100_000}
        answers: list[httpx.Response] = []

        def ask(more: dict[str, object]) -> None:
            answers.append(httpx.post(f"{url}/v1/generate", json=body | more, timeout=60))

        # one at work, one in the queue, one that streams
        asked: list[dict[str, object]] = [{}, {}, {"stream": True}]
        threads = [threading.Thread(target=ask, args=(more,)) for more in asked]
        for thread in threads:
            thread.start()
        busy = ("ddlm_slots_busy 1.0", "ddlm_queue 2.0")
        while not all(gauge in httpx.get(f"{url}/metrics").text for gauge in busy):
            pass
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(20) == 0
        assert sorted(answer.status_code for answer in answers) == [200, 503, 503]
        for answer in answers:
            if answer.status_code == 503:
                assert answer.json()["error"]["code"] == "draining"
            else:
                assert "event: error" in answer.text
                assert '"code":"draining"' in answer.text
        assert process.stdout is not None
        assert "Traceback" not in process.stdout.read()


@pytest.mark.slow  # the compiler is at work for seconds
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")
def test_sigterm_does_not_wait_for_the_compiler(folder: Path) -> None:
    with started(folder, "--compile", "--drain", "1") as (process, url):
        answers: list[httpx.Response] = []
        body = {"template": "{20}"}
        ask = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/generate", json=body, timeout=60))
        )
        ask.start()
        while "ddlm_queue 1.0" not in httpx.get(f"{url}/metrics").text:
            pass
        assert httpx.get(f"{url}/readyz").status_code == 503
        process.send_signal(signal.SIGTERM)
        ask.join()
        assert answers[0].json()["error"]["code"] == "draining"
        assert process.wait(20) == 0


def test_keys_from_the_environment_and_a_warning_without(folder: Path) -> None:
    key = "a-key-of-some-length"
    with started(folder, DDLM_API_KEYS=f"{key}, another-key-of-length") as (_, url):
        wait_until_ready(url)
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
    with started(folder, "--host", "0.0.0.0") as (process, url):
        assert process.stdout is not None
        assert "warning: anyone who reaches this address" in process.stdout.readline()


def test_cors_for_the_origins_named(folder: Path) -> None:
    with started(folder, "--cors", "https://a.example") as (_, url):
        wait_until_ready(url)
        sent = {"origin": "https://a.example", "access-control-request-method": "POST"}
        answer = httpx.options(f"{url}/v1/generate", headers=sent)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        other = httpx.options(f"{url}/v1/generate", headers=sent | {"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def wait_until_ready(url: str) -> None:
    for _ in range(400):
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
    raise AssertionError("the server does not come up")


def test_mistakes_take_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "short").write_text("abc\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, said in (
            (["--port", port], "choose another --port"),
            (["--host", "no.such.host.invalid"], "cannot listen on"),
            (["--api_keys", str(tmp_path / "empty")], "holds no key"),
            (["--api_keys", str(tmp_path / "short")], "fewer than 16 characters"),
            (["--api_keys", str(tmp_path / "none")], "cannot be read"),
            (["--queue", "0"], "must be above 0"),
            (["--slots", "0"], "at least 1"),
        ):
            assert main(["serve", "--model", str(folder), *options]) == 2
            error = capsys.readouterr().err
            assert said in error
            assert error.count("\n") == 1
    for unfilled in ("", " , "):  # as -e DDLM_API_KEYS=$MISSING leaves it
        monkeypatch.setenv("DDLM_API_KEYS", unfilled)
        assert main(["serve", "--model", str(folder), "--host", "no.such.host.invalid"]) == 2
        error = capsys.readouterr().err
        assert "DDLM_API_KEYS is set and holds no key" in error
        assert error.count("\n") == 1


def test_help_says_what_is_safe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for said in ("What is safe to expose", "TLS", "--api_keys", "Not safe"):
        assert said in text
