"""What sharing a step among processes costs: N gloo processes of one thread against one process of N threads.

Both sides are started by torchrun and stay, but only one computes at a time: the first process of a side waits for a
line on its standard input, its others wait for it. ``python -m ddlm.benchmark.processes`` is one process of a side.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ddlm.benchmark.step import NO_COMPILER, Trainee, own_step
from ddlm.benchmark.timing import turns
from ddlm.config import Config, dump_config, load_config
from ddlm.device import missing_compiler
from ddlm.training.distributed import check_share, open_world
from ddlm.types import ConfigError

STEPS = 3  # of a turn: the first wakes threads and caches that the other side has used meanwhile
WARM_UP = 2
PATIENCE = 120.0  # seconds that a side has to end by itself
_ANSWER = "ddlm-benchmark "  # marks our lines among what libraries print


def check_processes(config: Config, processes: int) -> None:
    """Refuse what cannot be compared, before anything is measured.

    Raises:
        ConfigError: for fewer than two processes, a batch that they cannot share evenly, a micro-batch that does not
            divide a share, FSDP, or CUDA.
    """
    train = config.train
    if processes < 2:
        raise ConfigError(
            f"--processes is {processes}, at least 2 are needed to share anything; leave it out for one process"
        )
    if train.device == "cuda" or train.strategy != "ddp":
        raise ConfigError(
            f"--processes compares DDP on the CPU's threads, and train.device={train.device}, "
            f"train.strategy={train.strategy} was asked for: use train.device=cpu and train.strategy=ddp"
        )
    check_share(config, processes)


def compare_processes(
    config: Config, processes: int, *, rounds: int = 5, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure the same global batch on N processes of one thread and on one process of N threads, in turn.

    Args:
        config: What to train, on the CPU; ``train.threads`` is not used.
        processes: N.
        rounds: Turns of each side; every other round goes in reverse order.
        say: Receives lines of progress.

    Returns:
        ``ratio``: tokens/s of N processes over tokens/s of one process with N threads, from the medians. ``many`` and
        ``one``: ``processes``, ``threads`` (of each), ``tokens_per_second``, ``seconds_per_step``, ``spread`` (fastest
        and slowest turn, in seconds a step), ``loss`` (nats; of the last step: both sides train alike). Beside them
        ``processes``, ``batch``, ``steps_per_turn``, ``rounds`` and ``cores`` (that this command may use).

    Raises:
        ConfigError: see :func:`check_processes`.
        ChildProcessError: when a side ends before its time.
    """
    check_processes(config, processes)
    config = copy.deepcopy(config)
    config.train.device = "cpu"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores is not None and cores < processes:
        say(f"processes: {processes} processes have {cores} core(s) here: the ratio says little")
    if config.train.compile and (missing := missing_compiler(torch.device("cpu"))):
        say(NO_COMPILER.format(missing))  # the processes say it too, to nobody
    tokens = config.train.batch * config.model.length
    seconds: dict[str, list[float]] = {"many": [], "one": []}
    losses: dict[str, float] = {}
    shapes = {"many": (processes, 1), "one": (1, processes)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(dump_config(config), encoding="utf-8")
        say(f"processes: warming up {processes} processes of one thread")
        with _Side(file, *shapes["many"]) as many:
            say(f"processes: warming up one process of {processes} threads")
            with _Side(file, *shapes["one"]) as one:
                sides = {"many": many, "one": one}
                for i, order in enumerate(turns(tuple(sides), rounds)):
                    for name in order:
                        each, losses[name] = sides[name].turn(STEPS)
                        seconds[name].append(each)
                    say(
                        f"processes: round {i + 1} of {rounds}: {tokens / seconds['many'][-1]:,.0f} tokens/s "
                        f"of {processes} processes, {tokens / seconds['one'][-1]:,.0f} of one"
                    )
    median = {name: statistics.median(values) for name, values in seconds.items()}
    measured = {
        name: {
            "processes": shapes[name][0],
            "threads": shapes[name][1],
            "tokens_per_second": tokens / median[name],
            "seconds_per_step": median[name],
            "spread": [min(seconds[name]), max(seconds[name])],
            "loss": losses[name],
        }
        for name in shapes
    }
    return {
        "processes": processes,
        "batch": config.train.batch,
        "steps_per_turn": STEPS,
        "rounds": rounds,
        "cores": cores,
        **measured,
        "ratio": median["one"] / median["many"],
    }


class _Side:
    """Processes under torchrun that make steps when asked; warm once the constructor returns.

    Args:
        config: File of the configuration.
        processes: How many.
        threads: Threads of each.

    Raises:
        ChildProcessError: when they end before their time, with the last line they left.
    """

    def __init__(self, config: Path, processes: int, threads: int) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        work = ["-m", "ddlm.benchmark.processes", str(config), str(threads)]
        # its own session: Ctrl-C is this process's to answer, which then ends the sides in order
        self._process = subprocess.Popen(
            [*run, "--nproc-per-node", str(processes), *work],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        try:
            self._answer()
        except BaseException:
            self._end()
            raise

    def turn(self, steps: int) -> tuple[float, float]:
        """Make so many steps: seconds of each on average, and the loss of the last."""
        assert self._process.stdin is not None
        try:
            print(steps, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended() from None
        answer = self._answer()
        return answer["seconds"] / steps, answer["loss"]

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                return json.loads(line.removeprefix(_ANSWER))
        raise self._ended()

    def _ended(self) -> ChildProcessError:
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        # torchrun's own summary comes last; the error of the process itself stands before it
        told = [x for x in lines if "Error" in x and "ChildFailedError" not in x] or lines or ["-"]
        return ChildProcessError(
            errno.ECHILD, f"a process of the benchmark ended before its time: {told[-1].strip()}"
        )

    def _end(self) -> None:
        """The end of its standard input ends a side; SIGTERM, which torchrun passes on, one that does not answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it may be gone already
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> _Side:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()


def work(file: Path, threads: int) -> None:
    """One process of a side: warm up, then make steps for every line on the standard input of the first process."""
    torch.set_num_threads(threads)
    config = load_config(file)
    world = open_world(config)
    step = own_step(Trainee.create(config, world), config, world)
    for _ in range(WARM_UP):
        step.run()
    world.barrier()
    _tell(world.is_main, {})
    while True:
        asked = int(sys.stdin.readline() or 0) if world.is_main else 0
        steps = int(world.agree(asked)[0])  # all the others wait here, asleep
        if not steps:
            break
        start = time.perf_counter()
        for _ in range(steps):
            outcome = step.run()
        world.barrier()
        seconds = time.perf_counter() - start
        _tell(world.is_main, {"seconds": seconds, "loss": float(outcome.loss)})
    world.close()


def _tell(is_main: bool, answer: dict[str, float]) -> None:
    if is_main:
        print(_ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
