"""``ddlm baseline``: an autoregressive model of matched size, trained from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ddlm.config import Config


def baseline(
    config: Config,
    out: Path = Path("runs/baseline"),
    architecture: Literal["gpt-neox", "gpt2"] = "gpt-neox",
    context: int | None = None,
) -> None:
    """Train GPT-NeoX or GPT-2 with the sizes and the number of tokens of a diffusion model, on the same shards.

    Learning rate, warm-up, decay, weight decay, clipping and optimiser are the configuration's too; not taken over are
    train.ema, micro_batch, self_condition, embeddings, attention, device, threads and strategy.

    The folder is a judge (--judge) and a model (--model) for `ddlm evaluate`, and loads in transformers. The same
    command goes on with a training that was interrupted.

    ddlm baseline --config tiny --data.path shards --out runs/judge

    Args:
        config: Of the diffusion model to match: shipped name, file or run folder; its model and train sections count.
        out: Folder of the model.
        architecture: Network: gpt-neox or gpt2.
        context: Tokens of a sequence; none: four times the diffusion model's length.
    """
    from ddlm.data.shards import TokenShards
    from ddlm.evaluation import baseline as work
    from ddlm.record import make_record, write_record
    from ddlm.types import ConfigError

    if not config.data.path:
        raise ConfigError("name the prepared shards: --data.path DIR")
    shards = TokenShards(config.data.path)
    plan = work.make_plan(config, shards, architecture, context)
    if work.is_finished(out) and work.has_plan(out, plan):
        print(f"{out} is finished already")
        return
    results = work.train_baseline(plan, shards, out)
    plan = work.read_plan(out)  # a folder from before has its own settings
    write_record(out / "record.json", make_record("baseline", plan, results, seed=plan.seed))
    print(
        f"{out}: {results['parameters']:,} parameters, {results['tokens']:,} tokens, "
        f"{results['held_out_nll']:.3f} nats per held-out token"
    )
