"""``ddlm train``: train a model on token shards, or go on with a run."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ddlm.config import Config

if TYPE_CHECKING:
    from ddlm.network.denoiser import DDLM
    from ddlm.training.loop import Sample


def train(
    config: Config,
    out: Path = Path("runs/train"),
    init: str | None = None,
    fresh: bool = False,
    overwrite: bool = False,
    track: list[str] = [],  # noqa: B006 - read only; the default is shown in the help
) -> int:
    """Train a model on token shards; the same command goes on with a run that was interrupted.

    Several processes: torchrun --nproc-per-node 8 -m ddlm train --config base --data.path DIR --out runs/base

    Args:
        config: Shipped configuration (tiny, ddlm-tiny, ddlm-small, small, base), file, or run folder.
        out: Run folder: config.yaml, metrics.jsonl, checkpoints, samples.
        init: Model folder, run folder or hub id whose weights a new run starts from, with a new optimiser; none: random
            weights. A run that is there goes on with its own.
        fresh: Start anew instead of going on with what is in the run folder.
        overwrite: With --fresh: delete the run that is there.
        track: Send metrics to these too: tensorboard, trackio, wandb.
    """
    from ddlm.files import check_folder
    from ddlm.training.loop import signal_name
    from ddlm.training.loop import train as run_training

    check_folder(out, "--out")
    sample = _sampler(config, out) if config.train.sample_every else None
    result = run_training(
        config,
        out,
        sample=sample,
        initial=init,
        fresh=fresh,
        overwrite=overwrite,
        track=track,
    )
    is_main = os.environ.get("RANK", "0") == "0"
    if result.stopped:
        size = int(os.environ.get("WORLD_SIZE", "1"))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        program = "ddlm" if size == 1 else f"torchrun --nproc-per-node {here} -m ddlm"
        again = f"{program} train --config {shlex.quote(str(out))} --out {shlex.quote(str(out))}"
        if is_main:
            print(
                f"{signal_name(result.stopped)} at step {result.step}, checkpoint written; go on with"
                f"{'' if here == size else ' this, and torchrun as before, on every machine'}: {again}",
                file=sys.stderr,
            )
        return 128 + result.stopped
    if is_main:
        print(f"trained {result.step} steps: {result.checkpoint}")
    return 0


def _sampler(config: Config, out: Path) -> Sample | None:
    """Writes four samples of a model, from the same noise at every step, to ``samples/step-N.jsonl``."""
    import json

    import torch

    from ddlm.data.shards import TokenShards
    from ddlm.files import write_text
    from ddlm.sampling import sample

    if not config.data.path:
        return None  # the training says what is missing
    tokenizer = TokenShards(config.data.path).tokenizer

    def write(model: DDLM, step: int) -> None:
        tokens = torch.zeros(
            4, config.model.length, dtype=torch.int64, device=model.embedding.device
        )
        result = sample(
            model,
            tokens,
            torch.ones_like(tokens, dtype=torch.bool),
            model.process,
            steps=config.sample.steps,
            solver=config.sample.solver,
            # a learned grid moves while it is learned
            grid="uniform" if config.sample.grid == "warp" else config.sample.grid,
            noise_scale=config.sample.noise_scale,
            temperature=config.sample.temperature,
            refine=config.sample.refine,
            generator=torch.Generator().manual_seed(config.train.seed),
        )
        lines = [
            {"text": tokenizer.decode(ids), "tokens": ids, "step": step}
            for ids in result.tokens.tolist()
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(out / "samples" / f"step-{step}.jsonl", text)

    return write
