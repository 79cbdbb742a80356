"""Weights that are given instead of trained: what they are, and where their recipe is not the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddlm.config import Config, load_config, read_config
from ddlm.reproduce.recipes import MAIN, PAPER_WIDTH
from ddlm.types import ConfigError, local

_RECIPE = (
    "model.length",
    "model.vocab_size",
    "model.self_conditioning",
    "model.likelihood_head",
    "model.neighbours",
    "time.warp",
    "mask.strategy",
    "mask.k_max",
    "train.optimizer",
    "train.betas",
    "train.embeddings",
    "train.attention",
    "train.lr",
    "train.batch",
    "train.weight_decay",
    "train.ema",
    "train.self_condition",
)
"""Settings whose departure from the paper's a table names."""

_NOT_NAMED = (
    # Told otherwise: t_min and t_max by a line of their own, sizes by the parameters, updates by the step.
    *("process.t_min", "process.t_max", "train.steps", "train.budget"),
    *("model.layers", "model.heads", "model.width", "model.feed_forward"),
    *("model.embedding_width", "model.time_width"),
    # Only with time.warp, which is named.
    *("time.bins", "time.lr"),
    # The paper does not state them, and they follow the number of updates.
    *("train.warmup", "train.final_lr", "train.clip"),
    # How it was computed, not what.
    *("train.micro_batch", "train.precision", "train.compile", "train.strategy", "train.seed"),
    *("train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep"),
    *("train.sample_every", "train.device", "train.threads"),
)
"""Settings whose departure is not named; a new setting has to be put into one of the two lists."""


@dataclass(frozen=True)
class Weights:
    """A trained diffusion model that stands for the paper's main model.

    Attributes:
        path: As it was named.
        folder: The model folder behind that.
        config: What it was trained with.
        step: Updates it had, or None when unknown.
        hash: Of its files; the same at another place.
    """

    path: str
    folder: Path
    config: Config
    step: int | None
    hash: str

    @property
    def name(self) -> str:
        """Short name, for folders and titles."""
        return Path(self.path).name

    def describe(self) -> dict[str, Any]:
        """What a record needs to say about them."""
        return {
            "path": self.path,
            "step": self.step,
            "hash": self.hash,
            "departures": departures(self.config),
        }


def read_weights(path: str) -> Weights:
    """Read what a model folder says of itself; its tensors are read when it writes.

    Args:
        path: A model folder, a run folder (its best checkpoint) or a hub id.

    Raises:
        ConfigError: when there is no diffusion model, or its folder is damaged.
    """
    from ddlm.checkpoint import find_model
    from ddlm.evaluation.hub import cache_folder, fingerprint
    from ddlm.files import verify_files

    if (local(path) / "plan.json").is_file():
        raise ConfigError(f"{path} is an autoregressive model: --baseline takes it, not --model")
    folder = find_model(path)
    step = verify_files(folder).get("step")
    return Weights(
        path,
        folder,
        read_config(folder / "config.yaml"),
        step,
        fingerprint(folder, cache_folder()),
    )


def departures(config: Config) -> list[str]:
    """Where a configuration leaves the recipe of the paper's main model, each with the paper's value in brackets."""
    paper = load_config("base")
    found = []
    # The paper's t_max means the same noise only at the same distance between embeddings.
    t_max = config.process.t_max * (PAPER_WIDTH / config.model.embedding_width) ** 0.5
    if abs(t_max - MAIN["t_max"]) > 1e-6 * t_max:
        found.append(
            f"t_max {config.process.t_max:g}, which is {t_max:g} at the paper's embedding width ({MAIN['t_max']})"
        )
    if config.process.t_min != paper.process.t_min:
        found.append(f"t_min {config.process.t_min:g} ({paper.process.t_min:g})")
    for key in _RECIPE:
        section, name = key.split(".")
        ours, theirs = (getattr(getattr(c, section), name) for c in (config, paper))
        if ours != theirs:
            found.append(f"{key} {_plain(ours)} ({_plain(theirs)})")
    return found


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:,}" if isinstance(value, int) else str(value)
