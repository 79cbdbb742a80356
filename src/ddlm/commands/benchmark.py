"""``ddlm benchmark train`` and ``ddlm benchmark sample``: speed, memory, and the peers beside them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

from ddlm.config import Config
from ddlm.files import check_folder
from ddlm.launch import read_launch
from ddlm.settings import Given
from ddlm.types import ConfigError

_READ = {"train": ("model", "process", "time", "mask", "train"), "sample": ("model", "process")}
"""Sections of a configuration that a measurement depends on."""


def benchmark(
    kind: Literal["train", "sample"],
    config: Config | None = None,
    weights: str | None = None,
    rounds: int = 5,
    peers: bool = True,
    growth: bool = False,
    batches: list[int] | None = None,
    processes: int | None = None,
    lengths: list[int] | None = None,
    queue: int | None = None,
    exit_steps: int | None = None,
    compile: bool = False,
    graphs: bool = True,
    out: Path | None = None,
    profile: Path | None = None,
    given: Given | None = None,
) -> None:
    """Measure training steps (--config) or generation (--weights), interleaved with what a user would pick instead.

    Args:
        kind: train or sample.
        config: What to train: a shipped configuration or a file; small when none is named. Single settings without it
            change the defaults, which are base's: of model and process, for train also of time, mask and train.
        weights: sample: a model folder, run folder or hub id, which has its own configuration; none: random weights
            of --config (base), with which early exit says nothing and is left out of the cases.
        rounds: Measurements of each thing; medians are reported.
        peers: Measure the peers in the same run (needs transformers).
        growth: train: measure the cost of a token at growing batches too (--batches), as growth of the record.
        batches: Sequences at once, ascending: those of --growth (none: 32 64 128 256 512 1024), or of sample (none:
            1 8 64).
        processes: train: measure N processes of one thread (DDP on the CPU) against one process of N threads at the
            same train.batch too, as processes of the record; N is at least 2.
        lengths: sample: tokens of a sequence; none: 16 32 64 128 256 512 1024.
        queue: sample: sequences of the early-exit measurement; none: 512.
        exit_steps: sample: steps allowed to each of them; none: 200.
        compile: sample: compile the step, once for each length and batch (about a minute each, not counted).
        graphs: sample: on a CUDA device launch each step as one CUDA graph.
        out: Write the record here as JSON.
        profile: Write a trace and the top operators into this folder.
        given: Names of the single settings among ``config``.
    """
    for name in given or ():
        if name.partition(".")[0] not in _READ[kind]:
            raise ConfigError(
                f"--{name} changes nothing that ddlm benchmark {kind} measures, which reads the sections "
                f"{', '.join(_READ[kind])}: leave it out"
            )
    if rounds < 1:
        raise ConfigError(f"--rounds is {rounds}, at least 1 is needed")
    for name, values in (("--batches", batches or ()), ("--lengths", lengths or ())):
        if any(v < 1 for v in values):
            raise ConfigError(f"{name} has {min(values)}, every value must be at least 1")
    if kind == "train":
        if batches is not None and not growth:
            raise ConfigError(
                "--batches was given without --growth, whose batches it names: add --growth"
            )
        of_sample = {
            "weights": weights,
            "lengths": lengths,
            "queue": queue,
            "exit_steps": exit_steps,
        }
        strays = [f"--{name}" for name, value in of_sample.items() if value is not None]
        strays += [
            name for name, used in (("--compile", compile), ("--no-graphs", not graphs)) if used
        ]
        if strays:
            raise ConfigError(
                f"{strays[0]} is for measuring generation: use it with ddlm benchmark sample, or leave it out"
            )
        _check(peers, out, profile)
        _train(config, rounds, peers, growth, batches, processes, out, profile)
        return
    if growth or processes is not None:
        name = "--growth" if growth else "--processes"
        raise ConfigError(f"{name} measures training: use it with ddlm benchmark train")
    if weights is not None and config is not None:
        raise ConfigError(
            f"--weights {weights} has its own configuration, and --config or single settings were given besides: "
            "leave out one of the two"
        )
    for name, value in (("--queue", queue), ("--exit_steps", exit_steps)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, at least 1 is needed")
    _check(peers, out, profile)
    from ddlm.benchmark.sample import BATCHES, EXIT_STEPS, LENGTHS, QUEUE, benchmark_sample

    results = benchmark_sample(
        weights,
        config=config,
        rounds=rounds,
        peers=peers,
        out=out,
        profile=profile,
        lengths=lengths or LENGTHS,
        batches=batches or BATCHES,
        queue=queue or QUEUE,
        exit_steps=exit_steps or EXIT_STEPS,
        compile=compile,
        graphs=graphs,
    )
    _show_crossover(results["crossover"])


def _check(peers: bool, out: Path | None, profile: Path | None) -> None:
    """Refuse what would spoil the figures, or be found missing only after minutes of measuring.

    Raises:
        ConfigError: under torchrun, for a record or a profile that cannot be written, and for peers without
            transformers.
    """
    if (size := read_launch().size) > 1:
        raise ConfigError(
            f"{size} processes were started and each would measure beside the others: start one, without torchrun "
            "(ddlm benchmark train --processes compares several on a CPU)"
        )
    if out is not None:
        if out.is_dir():
            raise ConfigError(f"--out {out} is a folder: name a file in it")
        check_folder(out.parent, "--out")
    if profile is not None:
        check_folder(profile, "--profile")
    if peers and importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "the peers need the package 'transformers': pip install 'ddlm[eval]', or leave them out with --no-peers"
        )


def _train(
    config: Config | None,
    rounds: int,
    peers: bool,
    growth: bool,
    batches: list[int] | None,
    processes: int | None,
    out: Path | None,
    profile: Path | None,
) -> None:
    from ddlm.benchmark.growth import BATCHES, check_growth, measure_growth
    from ddlm.benchmark.processes import check_processes, compare_processes
    from ddlm.benchmark.train import PEERS, benchmark_train
    from ddlm.config import load_config
    from ddlm.record import make_record, write_record

    config = config or load_config("small")
    # what cannot be measured is refused before minutes are spent on what can
    if growth:
        check_growth(config, batches or BATCHES)
    if processes is not None:
        check_processes(config, processes)
    results = benchmark_train(config, rounds=rounds, peers=PEERS if peers else (), profile=profile)
    _show_steps(results)
    if growth:
        results["growth"] = measure_growth(config, batches or BATCHES, rounds=rounds)
        _show_growth(results["growth"])
    if processes is not None:
        results["processes"] = found = compare_processes(config, processes, rounds=rounds)
        print(
            f"{processes} processes of one thread make {found['ratio']:.2f} times the tokens/s "
            f"of one process of {processes} threads"
        )
    if out is not None:
        # the figures stand beside the record's own fields, where scripts look for them
        record = make_record("benchmark-train", config, results)
        write_record(out, record | record["results"])


def _show_steps(results: dict[str, Any]) -> None:
    print(
        f"{results['tokens_per_second']:,.0f} tokens/s, {results['model_flops_per_second'] / 1e9:,.0f} GFLOP/s, "
        f"{results['mfu']:.2f} of the {results['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s of its matrix products; "
        f"peak memory {results['peak_memory_bytes'] / 2**20:,.0f} MiB; the loss takes {results['loss_share']:.0%}"
    )
    for name, peer in results["peers"].items():
        print(
            f"  {name:14} {peer['tokens_per_second']:,.0f} tokens/s, "
            f"{peer['model_flops_per_second'] / 1e9:,.0f} GFLOP/s"
        )
    if results["fastest_peer"]:
        print(f"{results['speedup_over_fastest_peer']:.2f} times the fastest peer, per model FLOP")


def _show_growth(growth: list[dict[str, Any]]) -> None:
    first = growth[0]["batch"]
    for entry in growth:
        print(
            f"  batch {entry['batch']:5} {entry['seconds_per_step']:.3f} s a step, "
            f"{1e6 * entry['seconds_per_token']:.1f} us a token, "
            f"{entry[f'relative_to_{first}']:.2f} times the cost at batch {first}"
        )


def _show_crossover(crossover: dict[str, dict[str, list[int]]]) -> None:
    for own, peers in crossover.items():
        for peer, lengths in peers.items():
            found = ", ".join(map(str, lengths)) or "none"
            print(f"  {own} is faster than {peer} at batch 1 at these lengths: {found}")
