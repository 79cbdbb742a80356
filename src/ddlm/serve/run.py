"""A server as a process: listening, going down without losing work."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING

from ddlm.types import ConfigError

if TYPE_CHECKING:
    import uvicorn

    from ddlm.serve.app import Server

_log = logging.getLogger("ddlm.serve")
_CONNECTIONS = 4096  # at a time; further ones are answered 503
_LAST_ANSWERS = (
    5.0  # seconds for what could not be finished to be told so: uvicorn's own answer is a bare 500
)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: when the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        place = socket.socket(family, socket.SOCK_STREAM)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind((host, port))
        place.listen(2048)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {host}:{port} ({why}): choose another --port or --host"
        ) from None
    place.setblocking(False)
    return place


def run(server: Server, place: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; then finish what is at hand, for ``limits.drain`` seconds at most.

    What is not finished by then is answered 503, whatever the engine is doing.
    """
    _allow_files()
    gc.collect()
    gc.freeze()  # what is loaded stays: no collection need walk through the libraries and the model again
    listener(server).run(sockets=[place])
    if server.worker.alive:
        # in a step that is being compiled: an interpreter that ends beside it aborts
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


def _allow_files() -> None:
    """As many open files as the system grants: each connection is one, and 1024 are usual where nobody asks."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _CONNECTIONS if hard == resource.RLIM_INFINITY else min(2 * _CONNECTIONS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _drop_idle_readers(place: socket.socket, seconds: float) -> None:
    """Have the system drop connections whose other end takes nothing for so long; accepted ones inherit it.

    Closing is not enough: a connection is closed only when what was written has left, and to a reader that stopped
    reading it never does. Each would count as one of the connections for ever.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        place.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(1000 * seconds)))


def listener(server: Server) -> uvicorn.Server:
    """What speaks HTTP for a server."""
    import uvicorn

    class Draining(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            for place in sockets or ():
                _drop_idle_readers(place, server.limits.send)
            await super().startup(sockets)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit and sig == signal.SIGINT:
                self.force_exit = True  # the second Ctrl-C does not wait
            server.worker.drain()
            self.should_exit = True
            _log.info("going down: %d texts at hand", server.worker.held)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            end = asyncio.get_running_loop().call_later(server.limits.drain, server.studio.end)
            await super().shutdown(sockets)
            end.cancel()

    # the guard writes log lines without anything that was asked; uvicorn's would hold the address
    logging.getLogger("uvicorn.access").disabled = True
    config = uvicorn.Config(
        server.app,
        log_config=None,
        access_log=False,
        server_header=False,
        http="h11",  # the parser that comes with uvicorn, so that no other one changes what is answered
        timeout_keep_alive=10,
        timeout_graceful_shutdown=math.ceil(server.limits.drain + _LAST_ANSWERS),
        limit_concurrency=_CONNECTIONS,
        lifespan="on",
    )
    return Draining(config)
