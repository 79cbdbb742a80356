"""The command line: ``ddlm COMMAND ...``. A table of commands, loaded on use, and the boundary where errors end.

A mistake of the user leaves one line on stderr and exit status 2; Ctrl-C leaves 130. Nothing heavy is imported before
the arguments are known to be right.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

COMMANDS = {
    "demo": (
        "ddlm.commands.demo:demo",
        "write with the shipped weights, train the smaller ones further, measure and plot",
    ),
    "prepare": ("ddlm.commands.prepare:prepare", "turn text into token shards"),
    "train": ("ddlm.commands.train:train", "train a model on token shards"),
    "generate": ("ddlm.commands.generate:generate", "write text from a template"),
    "evaluate": ("ddlm.commands.evaluate:evaluate", "measure samples or a model"),
    "baseline": (
        "ddlm.commands.baseline:baseline",
        "train an autoregressive model of matched size, as baseline and judge",
    ),
    "finetune": ("ddlm.commands.finetune:finetune", "fine-tune on GLUE and compare"),
    "analyze": (
        "ddlm.commands.analyze:analyze",
        "record how text comes about, draw it, write a report",
    ),
    "benchmark": (
        "ddlm.commands.benchmark:benchmark",
        "measure training steps or generation beside what else one could run",
    ),
    "reproduce": (
        "ddlm.commands.reproduce:reproduce",
        "make the paper's tables and figures at any scale",
    ),
    "serve": ("ddlm.commands.serve:serve", "answer over HTTP, with a page that shows it think"),
    "export": ("ddlm.commands.export:export", "write a model folder for others"),
    "push": ("ddlm.commands.export:push", "upload a model to the Hugging Face hub"),
}
"""Command: where its function is, and what it does in a line."""

EXTRAS = {
    "accelerate": "eval",
    "datasets": "data",
    "fastapi": "serve",
    "matplotlib": "plots",
    "mauve": "eval",
    "prometheus_client": "serve",
    "pyarrow": "data",
    "sacrebleu": "eval",
    "scipy": "eval",
    "sentencepiece": "data",
    "sklearn": "eval",
    "tensorboard": "track",
    "trackio": "track",
    "transformers": "eval",
    "uvicorn": "serve",
}
"""Optional package: the extra that installs it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments without the program's name; None takes them from the process.

    Returns:
        Exit status: 0 done, 2 the user's mistake, 130 interrupted, 141 the reader of a pipe went away.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # None: closed by who started us; nobody listens, which is no reason to fail
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as stop:
        _say(str(stop) or "interrupted")
        return 130
    except BrokenPipeError:
        # What is still buffered has no reader: without this the interpreter complains when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        message = _explain(error)
        if message is None or os.environ.get("DDLM_DEBUG"):
            raise
        _say(f"error: {message}")
        return 2


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(version())
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        from ddlm.settings import nearest
        from ddlm.types import ConfigError

        hint = nearest(name, COMMANDS) or f"; commands: {', '.join(COMMANDS)}"
        raise ConfigError(f"there is no command '{name}'{hint}")
    from ddlm.arguments import Arguments

    function = load(name)
    arguments = Arguments(f"ddlm {name}", function)
    if arguments.asks_for_help(rest):
        print(arguments.help(rest), end="")
        return 0
    given = arguments.parse(rest)
    if name != "prepare":  # its tokenizers have many threads and no tensors
        from ddlm.allocator import keep_freed_blocks

        keep_freed_blocks()
    result = function(**given)
    return result if isinstance(result, int) else 0


def load(name: str) -> Callable[..., Any]:
    """The function of a command."""
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(importlib.import_module(module), function)


def overview() -> str:
    """What ``ddlm --help`` prints."""
    lines = [
        "usage: ddlm COMMAND [ARGUMENTS]",
        "",
        "Train, sample, measure and study continuous diffusion language models.",
        "",
        "commands:",
        *(f"  {name:<11} {line}" for name, (_, line) in COMMANDS.items()),
        "",
        "`ddlm COMMAND --help` shows the arguments with their defaults and units, `ddlm --version` the versions.",
        "A first try that takes about six minutes: ddlm demo",
    ]
    return "\n".join(lines)


def version() -> str:
    """Versions of ddlm, of its commit where it runs from a checkout, of torch and Python."""
    import torch

    from ddlm import __version__
    from ddlm.record import commit

    revision = commit()
    return (
        f"ddlm {__version__}{f' (commit {revision})' if revision else ''}, "
        f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    )


def _explain(error: Exception) -> str | None:
    """One line for an error that the user can mend, None for a bug of ours."""
    from ddlm.types import ConfigError

    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            return None
        return f"this needs the package '{package}': pip install 'ddlm[{EXTRAS[package]}]'"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, ConfigError):
        return " ".join(str(error).split())
    from ddlm.compiler import why_it_failed

    return why_it_failed(error)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
