"""How long the metrics take: 5,000 samples of 64 tokens, everything but the judge; then MAUVE from cached features.

    python benchmarks/metrics_speed.py texts.jsonl.gz --tokenizer models/ddlm-tiny --features models/ddlm-tiny-ar \
        --out benchmarks/metrics-speed.json

Windows of real text stand for the samples, five seeds of a fifth each, so that every interval is computed. ``metrics``
is a row of ``ddlm evaluate`` without judge and MAUVE, its self-BLEU on the default size and once more on all samples.
``mauve`` compares them with as many other windows, features read from the cache; ``wide`` with invented ones as wide
as GPT-2 large's, 1,280, whose spectrum falls as 1/k. Seconds of wall clock, the median of the rounds; memory is
the most this process ever held, before MAUVE and at the end.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddlm.benchmark.timing import peak_memory
from ddlm.data.tokenizer import Tokenizer
from ddlm.evaluation.mauve import Featurizer, mauve
from ddlm.evaluation.measure import Units, measure_row
from ddlm.evaluation.samples import Sample
from ddlm.record import make_record, write_record

LENGTH, SEEDS, WIDE = 64, 5, 1280
CPU = torch.device("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("texts", nargs="+", type=Path, help="jsonl.gz files with a field `text`")
    parser.add_argument(
        "--tokenizer", required=True, help="model folder whose tokenizer cuts the texts"
    )
    parser.add_argument("--features", required=True, help="feature model of MAUVE (folder)")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="record to write (JSON)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    windows, tokenizer = _windows(arguments.texts, arguments.tokenizer, 2 * arguments.samples)
    size = arguments.samples // SEEDS
    samples = [
        Sample(text=tokenizer.decode(ids), tokens=ids, seed=min(i // size, SEEDS - 1))
        for i, ids in enumerate(windows[: arguments.samples])
    ]
    others = [tokenizer.decode(ids) for ids in windows[arguments.samples :]]
    units = Units("own tokens")

    def row(self_bleu_size: int | None = 1000) -> Any:
        return measure_row(
            "text", "unconditional", samples, units=units, self_bleu_size=self_bleu_size
        )

    results: dict[str, Any] = {
        "metrics_seconds": _median(row, arguments.rounds),
        "metrics_full_self_bleu_seconds": _median(lambda: row(None), arguments.rounds),
        "metrics_memory_bytes": peak_memory(CPU),
        "metrics": sorted(row().metrics),
    }
    print(results)
    with tempfile.TemporaryDirectory() as cache:
        features = Featurizer(arguments.features, cache=Path(cache))
        features(others)
        features([s.text for s in samples])

        def cached() -> Any:
            return mauve(features(others), features([s.text for s in samples]))

        results["mauve_width"] = int(features(others).shape[1])
        results["mauve_seconds"] = _median(cached, arguments.rounds)
    rng = np.random.default_rng(0)
    scale = (1 / np.arange(1, WIDE + 1)).astype(np.float32)
    left, right = (
        rng.standard_normal((arguments.samples, WIDE), np.float32) * scale for _ in range(2)
    )
    results["wide_mauve_width"] = WIDE
    results["wide_mauve_seconds"] = _median(lambda: mauve(left, right), arguments.rounds)
    results["memory_bytes"] = peak_memory(CPU)
    print(results)
    config = {
        k: getattr(arguments, k) for k in ("tokenizer", "features", "samples", "rounds", "threads")
    }
    write_record(arguments.out, make_record("metrics-speed", config | {"length": LENGTH}, results))
    return 0


def _median(run: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _windows(files: list[Path], tokenizer_of: str, count: int) -> tuple[list[list[int]], Any]:
    tokenizer = Tokenizer.load(tokenizer_of)
    windows: list[list[int]] = []
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                ids = tokenizer.encode(json.loads(line)["text"])
                windows.extend(ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH))
                if len(windows) >= count:
                    return windows[:count], tokenizer
    sys.exit(f"{len(windows):,} windows of {LENGTH} tokens in these texts: {count:,} are needed")


if __name__ == "__main__":
    sys.exit(main())
