"""A server on a real socket, in this process, so that tests can look inside."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import uvicorn

from ddlm.lm import DiffusionLM
from ddlm.serve.app import Server
from ddlm.serve.guard import Keys
from ddlm.serve.limits import Limits
from ddlm.serve.run import listener
from ddlm.serve.worker import Worker

LIMITS = Limits(tokens=96, steps=2000, samples=8, deadline=60.0, drain=10.0)


class Running:
    """A server that listens, what speaks HTTP for it, and where."""

    def __init__(self, server: Server, web: uvicorn.Server, url: str) -> None:
        self.server, self.web, self.url = server, web, url

    @property
    def worker(self) -> Worker:
        return self.server.worker

    def until(self, what: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "it did not come to hold"
            time.sleep(0.005)


@contextlib.contextmanager
def running(
    lm: DiffusionLM,
    slots: int = 8,
    keys: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
    **limits: float,
) -> Iterator[Running]:
    """Serve over a real socket for a while."""
    server = Server(lm, "small", slots, replace(LIMITS, **limits), Keys(keys), origins)
    place = socket.create_server(("127.0.0.1", 0))
    web = listener(server)
    thread = threading.Thread(target=lambda: web.run(sockets=[place]), daemon=True)
    thread.start()
    here = Running(server, web, f"http://127.0.0.1:{place.getsockname()[1]}")
    here.until(lambda: web.started)
    try:
        yield here
    finally:
        web.should_exit = True
        thread.join(20)
        place.close()
