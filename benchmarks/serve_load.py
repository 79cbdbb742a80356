"""The load a server must bear: many clients, every answer equal to the same request alone, memory flat, floods refused.

    python benchmarks/serve_load.py --model DIR --out runs/serve-load.json

starts ``ddlm serve`` as users do and sends requests of mixed templates. Its parts, each of which ``--parts`` can run
alone:

- ``throughput``: latency and throughput of REQUESTS requests by CLIENTS concurrent clients, against ``ddlm generate``
  writing the same texts (the two alternate, ROUNDS times each; the medians are compared), and that every answer, bit
  for bit, is the one that the same request gets alone from :meth:`DiffusionLM.generate`;
- ``memory``: of the server over MEMORY requests, sampled after each hundredth of them;
- ``disconnects``: clients that leave in the middle of long texts give their slots back;
- ``slow``: streams that nobody reads delay nobody else and are whole when they are read at last;
- ``flood``: FLOOD requests over CONNECTIONS connections: what finds no room is answered 429 with Retry-After, and the
  server answers others meanwhile and afterwards.

Exit status 1 when an answer is lost or differs, or when a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from http_client import Answer, Connection, ask_all

from ddlm.lm import DiffusionLM, load
from ddlm.record import make_record, write_record

PARTS = ("throughput", "memory", "disconnects", "slow", "flood")
TEMPLATES = (
    "{64}",
    "The river {40} the sea.",
    "Once upon a time {48}",
    "In the morning {16} but when the evening came {16}",
)
HALT = "patience:12"
THROUGHPUT, FLAT = 0.85, 0.05  # at least, of `ddlm generate`; at most, growth of memory
TOLD = ("ids", "text", "steps", "reason", "seed")  # what of an answer is compared

Body = dict[str, Any]


class Served:
    """A server at work: where it is, and what it takes."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    def memory(self) -> float:
        """Resident memory in MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"VmRSS:\s+(\d+)", text)
        assert found is not None
        return int(found[1]) / 1024

    def loop_seconds(self) -> float:
        """Processor seconds of its main thread so far: everything but the engine."""
        pid = self.process.pid
        text = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text(encoding="utf-8")
        return int(text.split()[0]) / 1e9

    async def at_hand(self) -> int:
        """Texts in slots and in the queue."""
        async with Connection(self.url) as connection:
            page = (await connection.ask("/metrics")).body.decode()
        found = re.findall(r"^ddlm_(?:slots_busy|queue) (\S+)", page, re.MULTILINE)
        return int(sum(map(float, found)))


@contextmanager
def server(args: argparse.Namespace) -> Iterator[Served]:
    """``ddlm serve`` for a while; it must end with status 0."""
    command = [sys.executable, "-m", "ddlm", "serve", "--model", args.model, "--port", "0"]
    command += ["--slots", str(args.slots), "--quiet", "--deadline", "600", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        here = Served(process, process.stdout.readline().split("/ serves")[0])
        asyncio.run(ask_all(here.url, bodies(args, args.clients, 2), args.clients, must))  # warm
        yield here
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        assert status == 0, f"the server ended with status {status}"
    finally:
        process.kill()
        process.wait()


def bodies(args: argparse.Namespace, count: int, steps: int | None = None) -> list[Body]:
    """Requests; each one's seed makes it unlike all others."""
    return [
        {
            "template": TEMPLATES[i % len(TEMPLATES)],
            "seed": args.seed + i,
            "steps": args.steps if steps is None else min(steps, args.steps),
            "halt": HALT,
        }
        for i in range(count)
    ]


def must(_: int, answer: Answer) -> None:
    """Nothing but a text will do."""
    assert answer.status == 200, answer.body


def told(answer: Answer) -> tuple[Any, ...]:
    """What of an answer is compared."""
    row = answer.json()["results"][0]
    return tuple(row[name] for name in TOLD)


def alone(lm: DiffusionLM, body: Body) -> tuple[Any, ...]:
    """The same request, by itself."""
    one = lm.generate(body["template"], **{k: body[k] for k in ("seed", "steps", "halt")})[0]
    return one.tokens, one.text, one.steps, one.reason, one.seed


def by_command(args: argparse.Namespace, asked: list[Body]) -> tuple[list[Body], float]:
    """Texts of ``ddlm generate`` and its seconds of work, start of the process and loading not counted."""
    rows, seconds = _timed(args, asked)
    return rows, seconds - _timed(args, [asked[0] | {"steps": 1}])[1]


def _timed(args: argparse.Namespace, asked: list[Body]) -> tuple[list[Body], float]:
    with tempfile.TemporaryDirectory() as place:
        prompts, out = Path(place) / "prompts.jsonl", Path(place) / "out.jsonl"
        lines = [json.dumps({"template": body["template"]}) for body in asked]
        prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "ddlm", "generate", "--model", args.model]
        command += ["--prompts", str(prompts), "--steps", str(asked[0]["steps"])]
        command += ["--seed", str(asked[0]["seed"]), "--halt", HALT]
        command += ["--slots", str(args.slots), "--device", "cpu", "--out", str(out)]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - began
        lines = out.read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if "tokens" in row], seconds


def throughput(args: argparse.Namespace, here: Served, lm: DiffusionLM) -> tuple[Body, bool]:
    """Latency, throughput, and every answer against the same request alone."""
    asked = bodies(args, args.requests)
    served: list[float] = []
    written: list[float] = []
    latencies: list[float] = []
    answers: list[Answer | None] = [None] * len(asked)
    rows: list[Body] = []

    def keep(i: int, answer: Answer) -> None:
        must(i, answer)
        answers[i] = answer
        latencies.append(answer.seconds)

    spent = 0.0
    for number in range(args.rounds):
        before = here.loop_seconds()
        served.append(asyncio.run(ask_all(here.url, asked, args.clients, keep)))
        spent += here.loop_seconds() - before
        rows, seconds = by_command(args, asked)
        written.append(seconds)
        print(
            f"round {number + 1}: served {served[-1]:.1f} s, generate {seconds:.1f} s", flush=True
        )
    got = [None if answer is None else told(answer) for answer in answers]
    differing = sum(one != alone(lm, body) for body, one in zip(asked, got, strict=True))
    unlike = sum(
        one is None or (one[0], one[-1]) != (row["tokens"], row["seed"])
        for one, row in zip(got, rows, strict=True)
    )
    ratio = statistics.median(written) / statistics.median(served)
    ordered = sorted(latencies)
    found = {
        "requests": args.requests,
        "lost_or_different": differing,
        "unlike_ddlm_generate": unlike,
        "steps_made": dict(sorted(Counter(str(one[2]) for one in got if one).items())),
        "seconds_served": served,
        "seconds_generate": written,
        "throughput_of_generate": ratio,
        "requests_per_second": args.requests / statistics.median(served),
        "loop_cpu_ms_a_request": 1000 * spent / (args.rounds * args.requests),
        "latency_seconds": {
            f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99)
        },
    }
    return found, not (differing or unlike) and ratio >= THROUGHPUT


def memory(args: argparse.Namespace, here: Served, _: DiffusionLM) -> tuple[Body, bool]:
    """Resident memory while many requests pass."""
    sizes: list[float] = []
    every, passed = max(1, args.memory // 100), 0

    def note(i: int, answer: Answer) -> None:
        nonlocal passed
        must(i, answer)
        passed += 1
        if passed % every == 0:
            sizes.append(here.memory())

    asyncio.run(ask_all(here.url, bodies(args, args.memory, 3), args.clients, note))
    first = sizes[len(sizes) // 4]
    growth = (max(sizes[-5:]) - first) / first
    found = {
        "requests": passed,
        "mib": [round(size, 1) for size in sizes],
        "growth_after_first_quarter": growth,
    }
    return found, growth <= FLAT


def disconnects(args: argparse.Namespace, here: Served, lm: DiffusionLM) -> tuple[Body, bool]:
    """Clients that leave in the middle."""
    body = bodies(args, 1)[0]
    long = {"template": "{64}", "steps": 1000, "halt": "none"}

    async def leave() -> float:
        async with asyncio.timeout(120):
            those = [await Connection(here.url).__aenter__() for _ in range(args.clients)]
            for one in those:
                one.send("/v1/generate", long)
            while await here.at_hand() < args.clients:
                await asyncio.sleep(0.05)
            for one in those:
                one.writer.close()
            began = time.perf_counter()
            while await here.at_hand():
                await asyncio.sleep(0.05)
            return time.perf_counter() - began

    seconds = asyncio.run(leave())
    return {"left": args.clients, "seconds_until_free": seconds}, _answers(here, lm, body)


def slow(args: argparse.Namespace, here: Served, lm: DiffusionLM) -> tuple[Body, bool]:
    """Streams that are not read while others are answered."""
    asked = bodies(args, args.clients)
    streamed = {"template": "{64}", "steps": 100, "halt": "none", "stream": True}
    others: dict[int, Answer] = {}

    async def hold() -> int:
        readers = [await Connection(here.url).__aenter__() for _ in range(8)]
        for reader in readers:
            reader.writer.transport.pause_reading()  # type: ignore[attr-defined]
            reader.send("/v1/generate", streamed)
        await ask_all(here.url, asked, len(asked), others.__setitem__)
        whole = 0
        for reader in readers:
            reader.writer.transport.resume_reading()  # type: ignore[attr-defined]
            story = b""
            async with asyncio.timeout(300):
                while b"event: end" not in story and (piece := await reader.reader.read(65536)):
                    story += piece
            whole += story.count(b"event: done") == story.count(b"event: end") == 1
            reader.writer.close()
        return whole

    whole = asyncio.run(hold())
    different = sum(told(others[i]) != alone(lm, body) for i, body in enumerate(asked))
    seconds = max(answer.seconds for answer in others.values())
    found = {"readers": 8, "whole": whole, "others_different": different, "others_slowest": seconds}
    return found, whole == 8 and not different


def flood(args: argparse.Namespace, here: Served, lm: DiffusionLM) -> tuple[Body, bool]:
    """Far more than there is room for."""
    statuses: Counter[int] = Counter()
    unclear: list[str] = []
    health: list[float] = []
    refused: list[float] = []
    many = ({"template": "{16}", "steps": 5, "seed": args.seed} for _ in range(args.flood))

    def note(_: int, answer: Answer) -> None:
        statuses[answer.status] += 1
        if answer.status == 429:
            refused.append(answer.seconds)
            if (
                answer.json()["error"]["code"] != "queue_full"
                or "retry-after" not in answer.headers
            ):
                unclear.append(answer.body.decode())

    async def pour() -> float:
        async def watch() -> None:
            async with Connection(here.url) as connection:
                while True:
                    health.append((await connection.ask("/healthz")).seconds)
                    await asyncio.sleep(0.2)

        watching = asyncio.ensure_future(watch())
        try:
            return await ask_all(here.url, many, args.connections, note)
        finally:
            watching.cancel()

    before = here.loop_seconds()
    seconds = asyncio.run(pour())
    spent = here.loop_seconds() - before
    found = {
        "requests": args.flood,
        "connections": args.connections,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "unclear": unclear[:3],
        "seconds": seconds,
        "loop_cpu_ms_a_request": 1000 * spent / args.flood,
        "refusal_seconds_median": statistics.median(refused) if refused else None,
        "health_seconds_slowest": max(health),
        "answers_afterwards": _answers(here, lm, bodies(args, 1)[0]),
    }
    # fewer connections than the share of one client: nothing is refused, all are written
    right = set(statuses) <= {200, 429} and bool(refused) and statuses.total() == args.flood
    return found, right and not unclear and found["answers_afterwards"]


def _answers(here: Served, lm: DiffusionLM, body: Body) -> bool:
    """Whether the server still answers, and as it should."""

    async def ask() -> Answer:
        async with Connection(here.url) as connection:
            return await connection.ask("/v1/generate", body)

    answer = asyncio.run(ask())
    return answer.status == 200 and told(answer) == alone(lm, body)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="model folder, run folder or hub id")
    parser.add_argument("--out", type=Path, required=True, help="record to write")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--memory", type=int, default=2000, help="requests of the memory run")
    parser.add_argument("--flood", type=int, default=10_000, help="requests of the flood")
    parser.add_argument("--connections", type=int, default=1000, help="connections of the flood")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first request")
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection is an open file
    lm = load(args.model, device="cpu")
    results: Body = {}
    missed = []
    for name in args.parts:
        began = time.perf_counter()
        try:
            with server(args) as here:
                found, is_met = globals()[name](args, here, lm)
        except (AssertionError, OSError, EOFError) as error:  # the other parts are worth having
            found, is_met = {"error": repr(error)}, False
        results[name] = found | {"bar_met": is_met, "part_seconds": time.perf_counter() - began}
        missed += [] if is_met else [name]
        shown = {k: v for k, v in results[name].items() if k != "mib"}
        print(f"{name}: {json.dumps(shown, indent=2)}", flush=True)
    results["load_average_at_end"] = os.getloadavg()
    write_record(args.out, make_record("serve-load", vars(args), results, seed=args.seed))
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
