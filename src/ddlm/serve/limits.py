"""What one request, one client and the whole server may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from ddlm.types import ConfigError

_LONGEST = 250  # characters of a message: it may repeat what was asked


@dataclass(frozen=True)
class Limits:
    """Bounds of a server; every one answers with a 4xx that names it.

    Attributes:
        body: Bytes of a request's body.
        depth: Nesting of its JSON.
        tokens: Tokens of one text, what is given included.
        steps: Solver steps of one text (of one window, for a text longer than the model).
        samples: Texts of one request; see :attr:`texts`.
        queue: Texts waiting or at work in the whole server; further ones are answered 429.
        share: Texts waiting or at work for one client.
        deadline: Seconds a request may take, waiting included.
        receive: Seconds a client may take to send its body.
        send: Seconds a reader may keep one piece of the answer from leaving; on Linux also seconds after which a
            connection is dropped whose other end takes nothing at all.
        frames: Events a second of a stream, at most; what falls between them is merged, none of it is lost.
        drain: Seconds that work at hand may go on after SIGTERM.
    """

    body: int = 65_536
    depth: int = 16
    tokens: int = 1024
    steps: int = 1000
    samples: int = 16
    queue: int = 1024
    share: int = 512
    deadline: float = 120.0
    receive: float = 20.0
    send: float = 30.0
    frames: float = 20.0
    drain: float = 30.0

    @property
    def texts(self) -> int:
        """Texts one request may really ask for: it is queued whole, so never more than a client may hold."""
        return min(self.samples, self.share, self.queue)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise ConfigError(f"--{name} {value} was given, it must be above 0")


class RefusedError(Exception):
    """A request that is not done: becomes an HTTP answer in the one form all errors have.

    Args:
        status: HTTP status.
        code: Short name of the error for programs.
        message: For people, one line.
        param: The field it is about.
        retry_after: Seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.param, self.retry_after = param, retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON of the answer (OpenAI's form)."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        clean = self.message.encode("utf-8", "replace").decode()  # lone surrogates cannot be sent
        clean = " ".join(clean.split())  # what was asked may hold line breaks
        clean = clean if len(clean) <= _LONGEST else f"{clean[:_LONGEST]}…"
        return {"error": {"message": clean, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def went_down() -> RefusedError:
    """What is told of a text that a server which ends has not finished."""
    return RefusedError(503, "draining", "the server went down")
