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
    match: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Train GPT-NeoX or GPT-2 with the sizes of a diffusion model, on the same shards for as many tokens or seconds.

    Learning rate, warm-up, decay, weight decay, clipping and optimiser are the configuration's too; not taken over are
    train.ema, micro_batch, self_condition, embeddings, attention, device, threads and strategy.

    The folder is a judge (--judge) and a model (--model) for `ddlm evaluate`, and loads in transformers. The same
    command goes on with a training that was interrupted.

    ddlm baseline --config tiny --data.path shards --out runs/judge

    ddlm baseline --match models/ddlm-tiny --data.path shards --out runs/judge

    Args:
        config: Of the diffusion model to match: shipped name, file or run folder; its model and train sections count.
            With a train.budget it is as many seconds, otherwise as many tokens.
        out: Folder of the model.
        architecture: Network: gpt-neox or gpt2.
        context: Tokens of a sequence; none: four times the diffusion model's length.
        match: Trained diffusion model to match instead, a model or run folder: its sizes and optimisation, and as many
            tokens as it has seen, however long that takes.
        dtype: Of the finished weights, which bfloat16 makes half as large; the checkpoints that a training goes on from
            are float32 either way.
    """
    from ddlm.data.shards import TokenShards
    from ddlm.evaluation import baseline as work
    from ddlm.evaluation.autoregressive import saved_dtype
    from ddlm.files import check_folder
    from ddlm.record import make_record, write_record
    from ddlm.types import ConfigError

    check_folder(out, "--out")
    if match is not None:
        config = _matched(config, match)
    if not config.data.path:
        raise ConfigError("name the prepared shards: --data.path DIR")
    shards = TokenShards(config.data.path)
    plan = work.make_plan(config, shards, architecture, context)
    if work.is_finished(out) and work.has_plan(out, plan):
        if (found := saved_dtype(out)) not in (None, dtype):
            raise ConfigError(
                f"{out} is finished already, with weights in {found} and not in {dtype}: give --dtype {found}, or name "
                "another folder"
            )
        print(f"{out} is finished already")
        return
    results = work.train_baseline(plan, shards, out, dtype)
    plan = work.read_plan(out)  # a folder from before has its own settings
    write_record(out / "record.json", make_record("baseline", plan, results, seed=plan.seed))
    held_out = f"no held-out text of {plan.context} tokens to measure it on"
    if results["held_out_tokens"]:
        held_out = f"{results['held_out_nll']:.3f} nats per held-out token"
    print(f"{out}: {results['parameters']:,} parameters, {results['tokens']:,} tokens, {held_out}")


def _matched(given: Config, model: str) -> Config:
    """The configuration of a trained model, its steps those that make up the tokens it has seen."""
    from ddlm.checkpoint import find_model
    from ddlm.config import load_config
    from ddlm.reproduce.subjects import read_subject
    from ddlm.types import ConfigError

    folder = find_model(model)
    config, plain = load_config(folder), Config()
    if (given.model, given.train) not in ((plain.model, plain.train), (config.model, config.train)):
        raise ConfigError(
            f"--match {model} says what to match, and --config or settings of model and train do so too: "
            "leave out one of the two"
        )
    known = read_subject(folder.parent, folder.name)
    if "tokens" not in known.values:
        raise ConfigError(f"{model} cannot be matched: {known.missing['tokens']}")
    config.train.steps = max(
        1, round(known.values["tokens"] / (config.train.batch * config.model.length))
    )
    config.train.budget = None
    config.data.path = given.data.path or config.data.path
    return config
