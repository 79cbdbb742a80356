"""What stands before every route: keys, bodies that are JSON and of bounded size, slow readers, log lines, counts.

Plain ASGI, so that a stream passes through unbuffered and a client that leaves is noticed at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from ddlm.serve.limits import Limits, RefusedError
from ddlm.serve.metrics import Metrics
from ddlm.types import ConfigError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

WRITING = ("/v1/generate", "/v1/completions")  # what takes places in the queue
KEYS_VARIABLE = "DDLM_API_KEYS"
_log = logging.getLogger("ddlm.serve")

# Nothing from elsewhere is ever loaded by the page, nor may it be put in a frame.
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Keys:
    """The keys that open the API; none: everybody may.

    Args:
        keys: As clients send them.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    @classmethod
    def read(cls, file: Path | None) -> Keys:
        """Keys of a file, one a line (# begins a comment), or of the variable DDLM_API_KEYS, split at commas.

        Raises:
            ConfigError: for a file that cannot be read, a file or a variable that is there and holds no key, or a
                key that is short enough to guess.
        """
        source = str(file) if file is not None else KEYS_VARIABLE
        if file is not None:
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"the keys {file} cannot be read: {error}") from None
            keys = [line.partition("#")[0].strip() for line in text.splitlines()]
        else:
            keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
        keys = [key for key in keys if key]
        if file is not None and not keys:
            raise ConfigError(f"{file} holds no key: put one on each line")
        # a secret that was not filled in must not open the API to everybody
        if not keys and KEYS_VARIABLE in os.environ:
            raise ConfigError(
                f"{KEYS_VARIABLE} is set and holds no key: give it keys, split at commas, or unset it"
            )
        if any(len(key) < 16 for key in keys):
            raise ConfigError(f"{source} holds a key of fewer than 16 characters: use longer ones")
        return cls(keys)

    def client(self, headers: dict[bytes, bytes]) -> str | None:
        """Name of the client whose key is sent, or None. Takes the same time whichever key it is."""
        given = headers.get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        if kind.lower() != b"bearer" or not any(found):
            return None
        return f"key-{found.index(True) + 1}"


class Guard:
    """Wraps the application.

    Args:
        app: The application.
        limits: Of bodies and readers.
        keys: Who may use /v1 and /metrics.
        metrics: Told about every request.
        check_room: Raises RefusedError when the client named has no room for one more text.
        origins: Origins of other sites whose pages may use the API (CORS).
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        keys: Keys,
        metrics: Metrics,
        check_room: Callable[[str], None],
        origins: Sequence[str] = (),
    ) -> None:
        self.app, self.limits, self.keys, self.metrics = app, limits, keys, metrics
        self._check_room = check_room
        self._inside: App = self._checked
        if origins:
            from starlette.middleware.cors import CORSMiddleware

            # around the checks, or a page of these origins could read neither why it is refused nor for how long;
            # within the counts and the log, so that its preflights are in both
            self._inside = CORSMiddleware(
                self._checked,
                allow_origins=list(origins),
                allow_methods=["GET", "HEAD", "POST"],
                allow_headers=["*"],  # OpenAI's client for pages sends a dozen of its own
                expose_headers=["retry-after"],
            )

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            async with asyncio.timeout(self.limits.send):
                await send(message)

        peer = scope.get("client")
        state = scope.setdefault("state", {})
        state["client"] = peer[0] if peer else "local"
        try:
            await self._inside(scope, receive, answer)
        except TimeoutError:
            _log.warning("%s reads too slowly: closed", state["client"])
        except _GoneError:
            status = 499
        finally:
            self._count(scope, state["client"], status or 499, time.monotonic() - began)

    async def _checked(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass on what may pass, refuse the rest."""
        try:
            client = scope["state"]["client"] = self._client(scope, scope["state"]["client"])
            if scope["method"] in ("POST", "PUT", "PATCH"):
                body = await self._body(scope, receive)
                if scope["method"] == "POST" and scope["path"] in WRITING:
                    # before anything parses the body: in a flood, refusing must be cheap
                    self._check_room(client)
                check_json(body, self.limits.depth)
                receive = _replay(body, receive)
            await self.app(scope, receive, send)
        except RefusedError as error:
            await refuse(error, send)

    def _client(self, scope: Message, address: str) -> str:
        """Who asks.

        Raises:
            RefusedError: without a valid key where one is needed.
        """
        path = scope["path"]
        guarded = path.startswith("/v1/") or path == "/metrics"
        if not self.keys or not guarded or scope["method"] == "OPTIONS":
            return address
        client = self.keys.client(dict(scope["headers"]))
        if client is None:
            raise RefusedError(
                401, "invalid_api_key", "this server needs a key: send Authorization: Bearer KEY"
            )
        return client

    async def _body(self, scope: Message, receive: Receive) -> bytes:
        """Read the whole body.

        Raises:
            RefusedError: for a body that is too large, too slow or not declared to be JSON.
        """
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise RefusedError(
                415,
                "unsupported_media_type",
                "the body must be JSON: Content-Type: application/json",
            )
        too_large = RefusedError(
            413, "too_large", f"the body is larger than {self.limits.body} bytes: shorten it"
        )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > self.limits.body):
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.receive):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    body += message.get("body", b"")
                    if len(body) > self.limits.body:
                        raise too_large
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise RefusedError(
                408, "too_slow", f"the body did not come within {self.limits.receive:g} seconds"
            ) from None
        return bytes(body)

    def _count(self, scope: Message, client: str, status: int, seconds: float) -> None:
        """The log line, without anything that was written or asked, and the counts."""
        path = scope["path"]
        route = getattr(scope.get("route"), "path", None) or (path if path in WRITING else "other")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        method = scope["method"] if scope["method"].isalpha() else "?"
        _log.info("%s %s %s %d %.0f ms", client, method[:10], route, status, 1000 * seconds)


class _GoneError(Exception):
    """The client went away."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read back as one message, then whatever comes."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def check_json(body: bytes, depth: int) -> None:
    """Refuse what a parser should not see.

    Raises:
        RefusedError: for bytes that are not JSON in UTF-8, or brackets nested deeper than ``depth``.
    """
    # by them Python's parser tells UTF-16 and UTF-32, whose brackets and quotes the count below would mistake
    if (nul := body.find(0)) >= 0:
        raise RefusedError(
            400,
            "invalid_utf8",
            f"the body is not JSON in UTF-8: byte {nul} is NUL; was it sent as UTF-16 or UTF-32?",
        )
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError(
            400,
            "invalid_utf8",
            f"the body is not UTF-8: byte {error.start} is {body[error.start]:#x}",
        ) from None
    if body.count(b"[") + body.count(b"{") <= depth:
        return  # there are not enough of them to nest deeper
    level, quoted, escaped = 0, False, False
    for byte in body:
        if quoted:
            if escaped:
                escaped = False
            elif byte == 0x5C:  # backslash
                escaped = True
            elif byte == 0x22:
                quoted = False
        elif byte == 0x22:
            quoted = True
        elif byte in b"[{":
            level += 1
            if level > depth:
                raise RefusedError(
                    400, "too_deep", f"the JSON is nested deeper than {depth} levels"
                )
        elif byte in b"]}":
            level -= 1


async def refuse(error: RefusedError, send: Send) -> None:
    """Send an error."""
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(k.encode(), v.encode()) for k, v in error.headers().items()]
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not waited for
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
