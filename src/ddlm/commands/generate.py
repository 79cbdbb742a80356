"""``ddlm generate``: templates into text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

    from ddlm.lm import DiffusionLM
    from ddlm.prompts import Prompt
    from ddlm.sampling.text import Generated


def generate(
    template: str | None = None,
    *,
    model: str,
    prompts: str | None = None,
    samples: int = 1,
    steps: int | None = None,
    solver: Literal["euler", "heun", "dpmpp_2m", "sde"] | None = None,
    grid: Literal["uniform", "karras", "warp"] | None = None,
    halt: str = "none",
    noise_scale: float | None = None,
    temperature: float | None = None,
    top_k: int = 0,
    guidance: float = 1.0,
    refine: int | None = None,
    seed: int = 0,
    tokens: int | None = None,
    overlap: int | None = None,
    slots: int = 64,
    out: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    live: bool = False,
    trace: Path | None = None,
    json: bool = False,
    precision: Literal["fp32", "bf16"] | None = None,
    device: str | None = None,
    compile: bool = False,
) -> None:
    """Write text from a template, a file of prompts, or standard input.

    In a template {n} stands for n tokens to write and everything else is kept: "{64}" writes freely,
    "The river {32}" goes on, "In the beginning {32} the end." fills in; literal braces are doubled. A template longer
    than the model is written window by window. Several processes share a prompt file and write one sample file:
    torchrun --nproc-per-node 8 -m ddlm generate --prompts FILE --out FILE --model DIR

    Args:
        template: What to write; - reads templates from standard input, one a line.
        model: Model folder, run folder or hub id.
        prompts: File with a template a line, or JSON lines with template (or tokens and is_noised) and reference;
            - reads standard input.
        samples: Texts for each template.
        steps: Solver steps allowed; none: the model's default.
        solver: How to integrate from noise to text; none: the model's default.
        grid: How the steps are spread over t; none: the model's default.
        halt: Early exit: patience:25 (steps without a token switch), entropy:0.1 or kl:0.001 (nats a token),
            with :min=20 (steps) or :freeze (per token) behind them; fixed:100; join several with a comma. A note tells
            which one the steps allowed leave no room for, and which entropy holds from the first step on.
        noise_scale: Initial noise relative to t_max; none: the model's default.
        temperature: Divides the logits before the expectation; none: the model's default.
        top_k: Only the k most probable tokens enter the expectation (0: all).
        guidance: Weight of classifier-free guidance towards what is given (1: none).
        refine: Rounds after the last step that draw a fourth of the tokens anew, given all others, at the same
            temperature: 16 or 32 mend much of what does not fit; none: the model's default.
        seed: Seed of the first text; the next one's is one more.
        tokens: Tokens to write after a prompt that has no slot of its own.
        overlap: Tokens that the windows of a long text share; none: half the model's length.
        slots: Sequences advanced together.
        out: Sample file to write (JSON lines); none: text on standard output.
        overwrite: Replace the sample file, or the file of --trace, once the new one is complete.
        resume: Go on with the sample file: write what is missing. Its prompts, given tokens, references, seeds and
            settings must be the same.
        live: Show the text condensing out of the noise; settled tokens are marked.
        trace: File for the trajectories (JSON lines; .gz compresses), rounds of --refine not among them. Each text has
            its line as soon as it is finished, in whatever order: "number" counts the texts from 0. The file is called
            FILE.part until it is complete; an interrupted call leaves that, as readable when renamed.
        json: Print JSON lines instead of text.
        precision: Of the matrix products; none: bf16 on a GPU that has it, fp32 elsewhere.
        device: cpu, cuda or cuda:N; none: a GPU where there is one.
        compile: Compile the step with torch.compile.
    """
    from ddlm.bulk import Process, check_target
    from ddlm.sampling import halting
    from ddlm.types import ConfigError, local

    if (template is None) == (prompts is None):
        raise ConfigError("give either a TEMPLATE or --prompts FILE (or - for standard input)")
    if tokens is not None and tokens < 1:
        raise ConfigError(f"--tokens {tokens} was given, at least 1 is needed")
    if resume and out is None:
        raise ConfigError("--resume needs --out FILE")
    if overwrite and out is None and trace is None:
        raise ConfigError("--overwrite needs --out FILE or --trace FILE")
    if out is not None and (trace is not None or live):
        raise ConfigError("--trace and --live show what is printed: leave out --out")
    if out is not None and json:
        raise ConfigError(
            f"--json is for what is printed, {out} is written as JSON lines in any case: leave out --json"
        )
    world = Process.current().world
    if out is None and world > 1:
        raise ConfigError(
            f"{world} processes were started and each would print every text: add --out FILE, or start one"
        )
    if world > 1 and ("-" in (template, prompts) or (prompts and local(prompts).is_fifo())):
        raise ConfigError(
            f"{world} processes were started and standard input, like any pipe, can be read by one process only: "
            "write the prompts to a file and name it with --prompts FILE"
        )
    for target in (out, trace):
        if target is not None:
            check_target(target)
    if trace is not None:
        check_target(_part(trace))
    if trace is not None and not overwrite:
        if trace.exists():
            raise ConfigError(f"{trace} exists: add --overwrite to replace it or name another file")
        if (part := _part(trace)).exists() and part.stat().st_size:
            raise ConfigError(
                f"{part} exists, with trajectories of an earlier call: rename it, or add --overwrite to replace it"
            )
    criterion = halting.parse(halt)
    lm = _load(model, device, precision, compile)
    todo = _prompts(lm, template, prompts, tokens)
    options: dict[str, Any] = {
        "steps": steps,
        "solver": solver,
        "grid": grid,
        "halt": criterion,
        "noise_scale": noise_scale,
        "temperature": temperature,
        "top_k": top_k,
        "guidance": guidance,
        "refine": refine,
        "slots": slots,
        "overlap": overlap,
    }
    if out is not None:
        _to_file(lm, todo, out, samples, seed, halt, overwrite, resume, options)
    else:
        _to_screen(lm, todo, samples, seed, options, live=live, json_lines=json, trace=trace)


def _load(
    model: str, device: str | None, precision: Literal["fp32", "bf16"] | None, compile: bool
) -> DiffusionLM:
    """The model, on this process's own GPU when there are several processes."""
    import torch

    from ddlm.bulk import Process
    from ddlm.compiler import drop_unfinished_libraries
    from ddlm.lm import load

    process = Process.current()
    # "cuda" names no GPU in particular: with it all processes would meet on the first one
    if device in (None, "cuda") and process.world > 1 and torch.cuda.is_available():
        device = f"cuda:{process.local_rank}"
    if compile:
        drop_unfinished_libraries()
    return load(model, device=device, precision=precision, compile=compile)


def _prompts(
    lm: DiffusionLM, template: str | None, prompts: str | None, tokens: int | None
) -> list[Prompt]:
    """What is to be written."""
    import sys

    from ddlm.prompts import Prompt, has_slot, read_prompts
    from ddlm.sampling.template import parse
    from ddlm.types import DataError, local

    if prompts is None and template is not None and template != "-":
        whole = template if tokens is None or has_slot(template) else f"{template}{{{tokens}}}"
        return [Prompt(parse(whole, lm.tokenizer))]
    if prompts in (None, "-"):
        if sys.stdin is None:
            raise DataError("standard input is closed: lead templates into it or name a file")
        return read_prompts(sys.stdin, "standard input", lm, tokens)
    path = local(str(prompts))
    try:
        with path.open(encoding="utf-8") as file:
            return read_prompts(file, str(path), lm, tokens)
    except OSError as error:
        raise DataError(f"cannot read the prompts {path}: {error.strerror}") from error


def _to_file(
    lm: DiffusionLM,
    todo: list[Prompt],
    out: Path,
    samples: int,
    seed: int,
    halt: str,
    overwrite: bool,
    resume: bool,
    options: dict[str, Any],
) -> None:
    """Write the sample file, with a progress bar of this process's share."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from ddlm.bulk import Process, SampleFile, write_samples

    # refuses what is out of range before anything of the file is touched
    lm.iterate([prompt.template for prompt in todo], samples, seed=seed, **options)
    settings = _settings(lm, halt, options)
    expected = [
        (prompt, seed + j * samples + i) for j, prompt in enumerate(todo) for i in range(samples)
    ]
    process = Process.current()
    file = SampleFile(out, expected, settings, process, overwrite=overwrite, resume=resume)
    console = Console(stderr=True)
    if process.rank == 0:
        _remark(console, lm, options)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=process.rank > 0) as bar:
        task = bar.add_task("samples", total=len(file.mine))
        try:
            count = write_samples(
                lm,
                todo,
                file,
                samples=samples,
                seed=seed,
                on_sample=lambda _: bar.advance(task),
                **options,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same call with --resume goes on") from None
    if process.rank == 0:
        console.print(
            f"{out}: {len(expected)} samples, {count} of them new from this process",
            markup=False,
            soft_wrap=True,
        )


def _to_screen(
    lm: DiffusionLM,
    todo: list[Prompt],
    samples: int,
    seed: int,
    options: dict[str, Any],
    *,
    live: bool,
    json_lines: bool,
    trace: Path | None,
) -> None:
    """Print texts as they are finished."""
    import functools
    import io
    import json
    import sys

    from rich.console import Console

    from ddlm.live import LiveView
    from ddlm.sampling.text import in_order

    whole = (sys.stdout.encoding or "").lower() in ("utf-8", "utf8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # one character that is missing loses no text
    templates = [prompt.template for prompt in todo]
    note = Console(stderr=True)
    rounds = lm.options(refine=options["refine"])["refine"]
    if trace is not None and rounds:  # the model's own default may be what asks for them
        _note(
            note,
            f"{trace} ends with the last step; {rounds} rounds of refinement follow it (--refine 0: none)",
        )
    count = len(templates) * samples
    with contextlib.ExitStack() as stack:
        view = stack.enter_context(LiveView(lm.tokenizer, console=note)) if live else None
        save = stack.enter_context(_trace_file(trace, count, note)) if trace is not None else None
        say = view.say if view else functools.partial(print, flush=True)
        finished = lm.as_finished(
            templates,
            samples=samples,
            seed=seed,
            trace=trace is not None,
            on_progress=view.update if view else None,
            **options,
        )
        _remark(note, lm, options)
        if save is not None:
            finished = _saved(finished, save)
        for number, text in enumerate(in_order(finished)):
            if json_lines:
                say(json.dumps(text.to_row(), ensure_ascii=not whole))
                continue
            say(text.text + ("\n" if number + 1 < count else ""))
            if note.is_terminal:
                note.print(f"[dim]{text.reason} after {text.steps} steps, seed {text.seed}[/dim]")


def _note(console: Console, text: str) -> None:
    """A line on standard error that is no error."""
    console.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)


def _remark(console: Console, lm: DiffusionLM, options: dict[str, Any]) -> None:
    """Tell of thresholds of early exit that do nothing, or end everything at once."""
    from ddlm.sampling import halting

    size, top_k = lm.config.model.vocab_size, options["top_k"]
    steps = lm.options(steps=options["steps"])["steps"]
    for line in halting.remarks(options["halt"], steps, min(size, top_k) if top_k else size):
        _note(console, line)


def _part(trace: Path) -> Path:
    """The trace file while it is incomplete."""
    return trace.with_name(trace.name + ".part")


@contextlib.contextmanager
def _trace_file(path: Path, total: int, console: Console) -> Iterator[Callable[[str], None]]:
    """What adds a line to the trace file, which has another name until it is complete.

    What has been added is there to be read, whatever ends the work; ``total`` lines are to come.
    """
    import gzip
    import os

    part = _part(path)
    part.parent.mkdir(parents=True, exist_ok=True)
    written = (0, 0)  # lines, and bytes up to the end of the last one
    try:
        with part.open("wb") as file:

            def add(line: str) -> None:
                nonlocal written
                content = line.encode("utf-8")
                # each line compressed by itself: together they are one gzip file, at any moment a whole one
                file.write(gzip.compress(content) if path.suffix == ".gz" else content)
                file.flush()
                written = (written[0] + 1, file.tell())

            yield add
        part.replace(path)
    except BaseException as error:
        lines, end = written
        if not lines:
            part.unlink(missing_ok=True)
            raise
        os.truncate(part, end)  # a line that was torn by what has ended us
        left = f"{lines} of {total} trajectories are in {part}: rename it to use it as {path.name}"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted; {left}") from None
        _note(console, left)
        raise


def _saved(
    finished: Iterator[tuple[int, Generated]], save: Callable[[str], None]
) -> Iterator[tuple[int, Generated]]:
    """The same texts, each one's trajectory written and let go first: a text may wait for one before it."""
    import json
    from dataclasses import replace

    for number, text in finished:
        save(json.dumps({"number": number} | _trace_row(text)) + "\n")
        yield number, replace(text, traces=())


def _trace_row(text: Generated) -> dict[str, Any]:
    return text.to_row() | {"traces": [t.to_dict() for t in text.traces]}


def _settings(lm: DiffusionLM, halt: str, options: dict[str, Any]) -> dict[str, Any]:
    """What shapes the samples, the model's defaults filled in: they may change while its weights stay."""
    told = {k: v for k, v in options.items() if k not in ("slots", "overlap")}
    used = lm.options(**told)
    shown = ("steps", "solver", "noise_scale", "temperature", "top_k", "guidance", "refine")
    return {k: used[k] for k in shown} | {
        "grid": used["grid_name"],
        "halt": halt.strip() if used["halt"] is not None else "none",
        "overlap": lm.length // 2 if options["overlap"] is None else options["overlap"],
        "precision": lm.precision,
        "model": _identity(lm),
    }


def _identity(lm: DiffusionLM) -> str:
    """A fingerprint of the weights, so that a sample file is not continued with another model."""
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(lm.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
