"""A client that costs little: what it takes of the processor, the server it measures does not have.

A pool such as httpx's looks at all of its connections for every request, so that with 500 of them the client, not the
server, is what is measured. Here each connection has a coroutine of its own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: HTTP status.
        headers: By their names in lower case.
        body: As sent.
        seconds: From the first byte sent to the last one received.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        """The body parsed."""
        return json.loads(self.body)


class Connection:
    """One connection that is kept open.

    Args:
        url: ``http://host:port``; what follows is ignored.
    """

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self.host, self.port = str(place.hostname), int(place.port or 80)

    async def __aenter__(self) -> Connection:
        self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def send(self, path: str, body: dict[str, Any] | None = None) -> None:
        """Begin a request: POST when there is a body, GET otherwise."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: {self.host}\r\n"
        if body is not None:
            head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n"
        self.writer.write(head.encode() + b"\r\n" + content)

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> Answer:
        """One request and its answer."""
        began = time.perf_counter()
        self.send(path, body)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in head[1:] if line)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        content = await self.reader.readexactly(int(headers["content-length"]))
        status = int(head[0].split()[1])
        return Answer(status, headers, content, time.perf_counter() - began)


async def ask_all(
    url: str,
    bodies: Iterable[dict[str, Any]],
    clients: int,
    after: Callable[[int, Answer], None],
    path: str = "/v1/generate",
) -> float:
    """Send every body, ``clients`` at a time, each on a connection of its own; seconds in all.

    Args:
        url: Of the server.
        bodies: What is asked.
        clients: Connections.
        after: Told the number of each request and its answer.
        path: Route.
    """
    todo = iter(enumerate(bodies))

    async def one() -> None:
        async with Connection(url) as connection:
            for number, body in todo:
                after(number, await connection.ask(path, body))

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return time.perf_counter() - began
