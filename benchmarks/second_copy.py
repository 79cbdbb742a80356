"""Does a model use what it has just read? Cross-entropy of a text after a copy of itself, and after another text.

    python benchmarks/second_copy.py models/ddlm-tiny --data shards --out benchmarks/second-copy.json

A sequence is "first <end> second <end>". The first text is clean, every position of the second is noised at one time t.
To a network that compares the tokens of two texts a copy makes the second nearly certain; tasks about pairs of
sentences need no less. ± is half of the 95% interval of the difference over the sequences.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddlm.checkpoint import load_model
from ddlm.data.shards import TokenShards
from ddlm.diffusion.objective import NoisedBatch, denoising_loss
from ddlm.diffusion.process import NoiseProcess
from ddlm.record import make_record, write_record
from ddlm.types import ConfigError

Z = 1.96


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help="model or run folders of one tokenizer")
    parser.add_argument("--data", required=True, help="prepared shards; the held-out split is read")
    parser.add_argument("--out", type=Path, required=True, help="record to write (JSON)")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--times", type=float, nargs="+", default=[2, 3, 4, 5, 7])
    arguments = parser.parse_args()
    if arguments.sequences < 2:
        parser.error(f"--sequences is {arguments.sequences}, an interval needs at least 2")
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    try:
        shards = TokenShards(arguments.data)
        rows = [row for path in arguments.models for row in measure(path, shards, arguments)]
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_record(arguments.out, make_record("second-copy", settings, {"rows": rows}, seed=0))
    for row in rows:
        print(
            f"{row['model']} at t = {row['t']:g}: {row['other']:.3f} nats after another text, "
            f"{row['same']:.3f} after the same, {row['difference']:.3f} ± {row['half']:.3f} less"
        )
    return 0


def measure(path: str, shards: TokenShards, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each time.

    Raises:
        ConfigError: for a model of another tokenizer, or too little held-out text.
    """
    loaded = load_model(path)
    theirs = loaded.provenance.get("tokenizer")
    if theirs and theirs != shards.tokenizer_hash:
        raise ConfigError(f"{path} was trained with another tokenizer than that of {shards.folder}")
    count, half = arguments.sequences, loaded.config.model.length // 2
    needed = 2 * count * (half - 1)
    if shards.tokens("val") < needed:
        raise ConfigError(
            f"{shards.folder} has {shards.tokens('val')} held-out tokens, {needed} are needed: fewer --sequences"
        )
    text = torch.from_numpy(shards.read("val", 0, needed)).view(2, count, half - 1)
    end = torch.full((count, 1), shards.end_id)
    second = text[0]
    is_noised = torch.zeros(count, 2 * half, dtype=torch.bool)
    is_noised[:, half:-1] = True
    process = NoiseProcess(loaded.config.process.t_min, loaded.config.process.t_max)
    width = loaded.config.model.embedding_width
    noise = torch.randn(count, 2 * half, width, generator=torch.Generator().manual_seed(0))

    def cross_entropy(first: Tensor, t: float) -> Tensor:
        tokens = torch.cat([first, end, second, end], dim=1)  # (count, 2 half)
        batch = NoisedBatch.make(tokens, is_noised, torch.full((count,), t), noise)
        with torch.no_grad():
            return denoising_loss(loaded.model.eval(), process, batch).per_sequence.double()

    rows = []
    for t in arguments.times:
        same, other = cross_entropy(text[0], t), cross_entropy(text[1], t)
        less = other - same
        rows.append(
            {
                "model": path,
                "step": loaded.step,
                "t": t,
                "same": float(same.mean()),
                "other": float(other.mean()),
                "difference": float(less.mean()),
                "half": Z * float(less.std()) / math.sqrt(count),
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
