"""The HTTP interface: routes over one engine."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from ddlm.serve.completions import Completer
from ddlm.serve.guard import Guard, Keys
from ddlm.serve.jobs import Done, Frame
from ddlm.serve.limits import Limits, RefusedError
from ddlm.serve.metrics import Metrics
from ddlm.serve.schema import Completion, Generate
from ddlm.serve.studio import Studio, Writing
from ddlm.serve.worker import Worker
from ddlm.types import ConfigError

if TYPE_CHECKING:
    from ddlm.lm import DiffusionLM

STATIC = Path(__file__).parent / "static"
T = TypeVar("T")


class Server:
    """A model behind HTTP.

    Args:
        lm: The model.
        name: What clients call it.
        slots: Texts advanced together.
        limits: What may be asked for.
        keys: Who may ask; None: everybody.
        origins: Origins of other sites whose pages may use the API (CORS); none by default.

    Attributes:
        app: The ASGI application.
        worker: Drives the engine; runs while the application's lifespan does.
    """

    def __init__(
        self,
        lm: DiffusionLM,
        name: str,
        slots: int = 32,
        limits: Limits | None = None,
        keys: Keys | None = None,
        origins: tuple[str, ...] = (),
    ) -> None:
        self.lm, self.name, self.limits = lm, name, limits or Limits()
        self.keys = keys or Keys(())
        self.metrics = Metrics()
        self.worker = Worker(lm, slots, self.limits, self.metrics)
        self.studio = Studio(lm, self.worker, self.limits)
        self.completer = Completer(self.studio, name)
        self.created = int(time.time())
        for gauge, text, value in (
            ("ddlm_slots", "Slots of the engine", lambda: self.worker.slots),
            ("ddlm_slots_busy", "Texts in slots", lambda: self.worker.at_work),
            ("ddlm_queue", "Texts in the queue", lambda: self.worker.waiting),
        ):
            self.metrics.gauge(gauge, text, value)
        self.api = self._routes()
        self.app = Guard(
            self.api, self.limits, self.keys, self.metrics, self.worker.check_room, origins
        )

    @asynccontextmanager
    async def _life(self, _: FastAPI) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.stop)

    def _routes(self) -> FastAPI:
        from ddlm import __version__

        api = FastAPI(
            title="ddlm",
            version=__version__,
            description="A diffusion language model: templates in, text out.",
            lifespan=self._life,
            docs_url=None,  # the usual pages load scripts from other hosts; /docs is our own
            redoc_url=None,
        )
        api.add_exception_handler(RefusedError, _refused)
        api.add_exception_handler(ConfigError, _mistake)
        api.add_exception_handler(RequestValidationError, _invalid)
        api.add_exception_handler(HTTPException, _http)
        kinds: dict[int | str, dict[str, Any]] = {
            status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
            for status, text in _STATUS.items()
        }
        api.post("/v1/generate", responses=kinds, response_model=None)(self.generate)
        api.post("/v1/completions", responses=kinds, response_model=None)(self.completions)
        api.get("/v1/models", responses={401: kinds[401]})(self.models)
        api.get("/v1/models/", include_in_schema=False)(self.models)  # no model has an empty name
        named: dict[int | str, dict[str, Any]] = {401: kinds[401], 404: kinds[404]}
        api.get("/v1/models/{model:path}", responses=named)(self.model)
        api.get("/healthz", responses={503: kinds[503]}, response_model=None)(self.healthz)
        api.get("/readyz", responses={503: kinds[503]}, response_model=None)(self.readyz)
        api.get("/metrics", response_model=None, responses={401: kinds[401]})(self.scrape)
        api.get("/", include_in_schema=False)(_file("index.html"))
        api.get("/docs", include_in_schema=False)(_file("docs.html"))
        # what may be read may be asked for without its body; FastAPI's routes know of no HEAD by themselves
        pages = [r for r in api.routes if isinstance(r, APIRoute) and "GET" in (r.methods or ())]
        for route in pages:
            api.head(route.path, include_in_schema=False, response_model=None)(route.endpoint)
        api.mount("/static", StaticFiles(directory=STATIC), name="static")
        return api

    # ---- routes

    async def generate(self, request: Request, body: Generate) -> Response:
        """Write texts from a template: at once, or as server-sent events ``start``, ``step``, ``done``, ``end``."""
        template = self.studio.parse(body.template)
        writing = self.studio.submit(
            request.state.client,
            [template],
            body,
            body.samples,
            overlap=body.overlap,
            watched=body.stream,
            patience=body.settled_after,
        )
        if body.stream:
            return _Stream(self._story(writing), writing)
        with writing:
            finished = await _while_there(request, writing.all())
        rows = [self.studio.done(done) for done in finished]
        for row in rows:
            del row["curve"]
        return JSONResponse(
            {
                "id": f"gen-{uuid.uuid4().hex}",
                "model": self.name,
                "results": rows,
            }
        )

    async def _story(self, writing: Writing) -> AsyncIterator[str]:
        """The events of a generation."""
        first = writing.jobs[0]
        noised = first.text.template.is_noised
        given = first.text.template.tokens.masked_fill(noised, -1)
        yield _event(
            "start",
            {
                "model": self.name,
                "samples": len(writing.jobs),
                "steps": first.steps,
                "seeds": [job.text.seed for job in writing.jobs],
                "tokens": self.studio.pieces(given.tolist()),
                "is_noised": noised.int().tolist(),
            },
        )
        async for event in _kept_alive(writing.events()):
            if event is None:
                yield ": still at it\n\n"
            elif isinstance(event, Frame):
                yield _event("step", self.studio.frame(event))
            elif isinstance(event, Done):
                yield _event("done", self.studio.done(event))
            else:
                yield _event("error", event.error.body() | {"sample": event.number})
        yield _event("end", {})

    async def completions(self, request: Request, body: Completion) -> Response:
        """OpenAI's completions: a text that begins with a prompt and may end with a suffix."""
        answer = self.completer.begin(request.state.client, body)
        if body.stream:

            async def data() -> AsyncIterator[str]:
                async for line in _kept_alive(answer.stream()):
                    yield ": still at it\n\n" if line is None else f"data: {line}\n\n"

            return _Stream(data(), answer.writing)
        with answer.writing:
            return JSONResponse(answer.whole(await _while_there(request, answer.writing.all())))

    async def models(self) -> dict[str, Any]:
        """A list of the one model there is."""
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, model: str) -> dict[str, Any]:
        """The model, its sizes and its own settings of sampling."""
        self.completer.check_model(model)
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "ddlm",
            "length": self.lm.length,
            "vocab_size": self.lm.config.model.vocab_size,
            "parameters": sum(p.numel() for p in self.lm.model.parameters()),
            "defaults": dict(vars(self.lm.config.sample)),
            "grids": ["uniform", "karras", *(["warp"] if self.lm.time_warp else [])],
            "limits": {
                "tokens": self.limits.tokens,
                "steps": self.limits.steps,
                "samples": self.limits.texts,
                "deadline": self.limits.deadline,
            },
        }

    async def healthz(self) -> Response:
        """The process answers and its engine works; once it does not, only a restart helps."""
        if not self.worker.alive:
            return await _refused(
                None, RefusedError(503, "engine", "the engine has failed: restart the server")
            )
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """New texts are taken: the engine runs and the server is not going down."""
        if not self.worker.ready:
            return await _refused(None, RefusedError(503, "draining", "not ready", retry_after=5))
        return JSONResponse({"status": "ready"})

    async def scrape(self) -> Response:
        """Counts, as Prometheus reads them."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


_STATUS = {
    400: "A value that is out of range or over a limit",
    401: "No valid key",
    404: "No such model",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not JSON",
    422: "A body of another form",
    429: "No room in the queue: see Retry-After",
    500: "The engine failed",
    503: "The server is going down, or its engine has failed",
    504: "The deadline has passed",
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "code"],
        }
    },
    "required": ["error"],
}


async def _while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work`` unless the client goes away first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RefusedError(499, "gone", "the client went away")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()


async def _kept_alive(source: AsyncIterator[T], pause: float = 10.0) -> AsyncIterator[T | None]:
    """Everything of ``source``, and None whenever nothing has come for a while: proxies close silent streams."""
    upcoming: asyncio.Future[T] | None = None
    try:
        while True:
            if upcoming is None:
                upcoming = asyncio.ensure_future(anext(source))
            done, _ = await asyncio.wait((upcoming,), timeout=pause)
            if not done:
                yield None
                continue
            finished, upcoming = upcoming, None
            try:
                yield finished.result()
            except StopAsyncIteration:
                return
    finally:
        if upcoming is not None:
            upcoming.cancel()


class _Stream(StreamingResponse):
    """Server-sent events; when the reader goes away, or before it began to read, the texts are given up."""

    def __init__(self, source: AsyncIterator[str], writing: Writing) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(source, media_type="text/event-stream", headers=headers)
        self._writing = writing

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self._writing:
            await super().__call__(scope, receive, send)


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


def _file(name: str) -> Any:
    async def page() -> FileResponse:
        return FileResponse(STATIC / name, headers={"cache-control": "no-cache"})

    return page


async def _refused(_: Any, error: Any) -> Response:
    return Response(
        json.dumps(error.body()), error.status, error.headers(), media_type="application/json"
    )


async def _mistake(request: Request, error: Any) -> Response:
    return await _refused(request, RefusedError(400, "invalid_value", str(error)))


async def _invalid(request: Request, error: Any) -> Response:
    what, where = _complaint(error.errors())
    return await _refused(request, RefusedError(422, "invalid_body", what, param=where))


def _complaint(errors: Sequence[dict[str, Any]]) -> tuple[str, str | None]:
    """What to say of a body that does not fit, and the field it is about."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return (
            f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}",
            None,
        )
    _, *field = first["loc"]
    if not field:
        return "the body must be a JSON object", None

    def progress(one: dict[str, Any]) -> tuple[bool, int, int]:
        last = one["loc"][-1]
        kind_fits = not one["type"].endswith("_type")
        return kind_fits, len(one["loc"]), last if isinstance(last, int) else -1

    # a field that takes several forms is refused once for each of them: the form that fitted furthest is the one meant
    best = max((e for e in errors if e["loc"][1] == field[0]), key=progress)
    # behind the field stand the names that pydantic has for the forms, and places in a list
    path = [field[0], *(part for part in best["loc"][2:] if isinstance(part, int))]
    where = ".".join(str(part) for part in path)[:100].encode("utf-8", "replace").decode()
    return f"{where}: {best['msg'].removeprefix('Value error, ')}", where


async def _http(request: Request, error: Any) -> Response:
    what = str(error.detail)
    if error.status_code == 404:
        what = "there is no such path: /docs lists what there is"
    elif isinstance(error.__cause__, ValueError):
        # from the JSON parser; malformed text comes to _invalid, so this is a number too long for Python
        most = sys.get_int_max_str_digits()
        what = f"a whole number in the body has more than {most} digits: give a smaller one"
    answer = await _refused(request, RefusedError(error.status_code, "http", what))
    answer.headers.update(error.headers or {})
    return answer
