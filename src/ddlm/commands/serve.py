"""``ddlm serve``: the model over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def serve(
    *,
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    slots: int = 32,
    queue: int = 1024,
    deadline: float = 120.0,
    tokens: int | None = None,
    steps: int = 1000,
    samples: int = 16,
    body: int = 65_536,
    frames: float = 20.0,
    drain: float = 30.0,
    api_keys: Path | None = None,
    cors: list[str] | None = None,
    quiet: bool = False,
    precision: Literal["fp32", "bf16"] | None = None,
    device: str | None = None,
    compile: bool = False,
) -> None:
    """Answer over HTTP: OpenAI's completions, templates with a stream of steps, and a page that shows it think.

    The page is at /, the description of the API at /docs, POST /v1/completions and /v1/generate write,
    GET /v1/models, /healthz, /readyz and /metrics tell. SIGTERM finishes what is at hand, then ends.

    What is safe to expose: on its own machine (the default host) everything. To a network you trust: with
    --api_keys, which cover /v1 and /metrics; the page, /docs, /healthz and /readyz stay open and tell nothing but
    that a server is here. To the internet: only behind a reverse proxy that speaks TLS (keys travel in clear text
    without it) and limits connections and rates. Not safe: a network address without keys, /metrics for strangers,
    --cors with origins that are not yours. Requests never name files; prompts are neither logged nor kept.

    Args:
        model: Model folder, run folder or hub id.
        host: Address to listen on; 0.0.0.0 is every network the machine is in.
        port: Port to listen on; 0 takes a free one.
        name: What clients call the model; none: the name of its folder.
        slots: Texts advanced together.
        queue: Texts waiting or at work before a client is told to come again (429); one client may hold half.
        deadline: Seconds a request may take, waiting included.
        tokens: Longest text taken, in tokens; none: four times the model's length.
        steps: Most solver steps a text may ask for.
        samples: Most texts a request may ask for.
        body: Largest body taken, in bytes.
        frames: Events a second of a stream, at most.
        drain: Seconds that work at hand may go on after SIGTERM.
        api_keys: File with a key a line; none: keys from DDLM_API_KEYS, split at commas, if it is set.
        cors: Origins of other sites whose pages may use the API, as https://example.org; none: no other site.
        quiet: No line for each request.
        precision: Of the matrix products; none: bf16 on a GPU that has it, fp32 elsewhere.
        device: cpu, cuda or cuda:N; none: a GPU where there is one.
        compile: Compile the step with torch.compile, before /readyz says that the server is ready.
    """
    import ipaddress
    import logging
    from concurrent.futures import ThreadPoolExecutor

    import fastapi  # noqa: F401  (a missing extra is told before the model is loaded)

    from ddlm.compiler import drop_unfinished_libraries
    from ddlm.lm import load
    from ddlm.serve.app import Server
    from ddlm.serve.guard import Keys
    from ddlm.serve.limits import Limits
    from ddlm.serve.run import listen, run

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    if quiet:
        logging.getLogger("ddlm.serve").setLevel(logging.WARNING)
    keys = Keys.read(api_keys)

    if compile:
        drop_unfinished_libraries()

    def made() -> Server:
        lm = load(model, device=device, precision=precision, compile=compile)
        limits = Limits(
            queue=queue,
            share=max(1, queue // 2),
            deadline=deadline,
            tokens=4 * lm.length if tokens is None else tokens,
            steps=steps,
            samples=samples,
            body=body,
            frames=frames,
            drain=drain,
        )
        return Server(lm, name or _name(model), slots, limits, keys, tuple(cors or ()))

    # In a thread that ends: a thread that has computed keeps a team of OpenMP threads, and with the main thread's
    # beside the engine's there are more of them than cores. libgomp then puts threads to sleep between any two
    # operations rather than let them wait, and every operation of a step begins with waking them.
    with ThreadPoolExecutor(1) as aside:
        server = aside.submit(made).result()
    place = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{place.getsockname()[1]}/ serves {server.name}", flush=True)
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and not keys:
        print("warning: anyone who reaches this address may use it: set --api_keys", flush=True)
    run(server, place)


def _name(model: str) -> str:
    from ddlm.types import local

    folder = local(model)
    return folder.resolve().name if folder.exists() else model
