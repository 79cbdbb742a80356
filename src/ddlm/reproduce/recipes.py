"""What each table and figure needs: models, samplings, columns, and the paper's numbers beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ddlm.config import Config, load_config
from ddlm.evaluation.generators import Settings
from ddlm.evaluation.protocol import Protocol
from ddlm.settings import nearest, read_yaml
from ddlm.types import ConfigError

MAIN: dict[str, Any] = {"t_max": 10, "warp": False, "mask": "span"}
"""The paper's main model."""

PAPER_WIDTH = 256
"""Width of the paper's embeddings."""


@dataclass(frozen=True)
class Column:
    """A metric, of one task or of the row's."""

    head: str
    metric: str
    task: str | None = None


@dataclass(frozen=True)
class Line:
    """One row of an item.

    Attributes:
        label: First cell.
        train: The model's training: ``t_max`` (at the paper's embedding width), ``warp``, ``mask``; None if not ours.
        model: ``diffusion``, ``baseline``, ``real``, ``scratch``, ``paper`` (only the paper's numbers), or a hub id.
        task: Task of the whole row, or None where columns name it.
        sample: Sampling settings that differ from the usual ones.
        paper: The paper's numbers.
    """

    label: str
    train: dict[str, Any] | None
    model: str
    task: str | None
    sample: dict[str, Any]
    paper: tuple[Any, ...]


@dataclass(frozen=True)
class Recipe:
    """A table or a figure."""

    name: str
    kind: str
    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: str
    raw: Mapping[str, Any]

    def trainings(self) -> list[dict[str, Any]]:
        """The distinct models it needs trained; the main one for samples and traces."""
        if self.kind in ("samples", "traces"):
            return [MAIN]
        found: list[dict[str, Any]] = []
        for line in self.lines:
            if line.train is not None and line.train not in found:
                found.append(line.train)
        return found

    def of_one_model(self) -> bool:
        """Whether one trained model, the main one, is all that it needs trained here."""
        return self.kind != "glue" and all(train == MAIN for train in self.trainings())

    def needs_text(self) -> bool:
        """Whether it reads held-out text."""
        return self.kind in ("measure", "samples")

    def needs_baseline(self) -> bool:
        """Whether a row is the autoregressive model."""
        return any(line.model == "baseline" for line in self.lines)


@dataclass(frozen=True)
class Size:
    """What a scale means beside its configuration.

    Attributes:
        protocol: How much is sampled and measured.
        judged_here: Whether judge and MAUVE features come from an autoregressive model trained on the same shards
            (otherwise the paper's GPT-Neo-1.3B and gpt2-large).
        hours: Of one training.
        trained_on: The hardware of these hours.
        rate: Operations a second of fine-tuning and sampling, on ``machine``.
        machine: What fine-tunes and samples.
        rate_from: Where that rate is from.
        gib: Disk for one trained model with its checkpoints.
    """

    protocol: Protocol
    judged_here: bool
    hours: str
    trained_on: str
    rate: float
    machine: str
    rate_from: str
    gib: float


SIZES: dict[str, Size] = {
    "tiny": Size(
        Protocol(prompts=200, continuations=5, noise_scales=(), temperatures=()),
        judged_here=True,
        hours="0.1 to 0.5",
        trained_on="2 CPU cores",
        rate=60e9,
        machine="2 CPU cores",
        rate_from="measured: 23 to 37 GFLOP/s of one core with AVX2, fp32",
        gib=0.2,
    ),
    "small": Size(
        Protocol(prompts=1000, continuations=5, noise_scales=(), temperatures=()),
        judged_here=True,
        hours="about 1",
        trained_on="one GPU; days on a CPU",
        rate=15e12,
        machine="one GPU",
        rate_from="that of a training in an hour",
        gib=1.0,
    ),
    "base": Size(
        Protocol(noise_scales=(), temperatures=()),
        judged_here=False,
        hours="about 48",
        trained_on="eight A100 80 GB",
        rate=40e12,
        machine="one A100 80 GB",
        rate_from="that of the paper's training, two days on eight",
        gib=6.0,
    ),
}


@cache
def recipes() -> dict[str, Recipe]:
    """Every table and figure, by name."""
    return {
        name: _recipe(name, raw)
        for name, raw in read_yaml(Path(__file__).with_name("paper.yaml")).items()
    }


def find(name: str) -> Recipe:
    """The recipe of an item.

    Raises:
        ConfigError: if there is none of that name.
    """
    known = recipes()
    if name not in known:
        raise ConfigError(
            f"there is no item '{name}'{nearest(name, known) or '; items: ' + ', '.join(known)}"
        )
    return known[name]


def _recipe(name: str, raw: Mapping[str, Any]) -> Recipe:
    lines = (
        [_line(row) for row in raw.get("rows", ())] if raw["kind"] in ("measure", "glue") else []
    )
    columns = [Column(**c) for c in raw.get("columns", ())]
    return Recipe(
        name, raw["kind"], raw["title"], tuple(columns), tuple(lines), raw.get("notes", ""), raw
    )


def _line(row: Mapping[str, Any]) -> Line:
    train = {**MAIN, **row["train"]} if "train" in row else None
    model = row.get("hub") or row.get("model", "diffusion")
    if model == "main":
        train, model = dict(MAIN), "diffusion"
    if row.get("scratch"):
        model = "scratch"
    return Line(
        label=str(row["label"]),
        train=train,
        model=model,
        task=row.get("task"),
        sample=dict(row.get("sample", {})),
        paper=tuple(row.get("paper", ())),
    )


def configuration(
    scale: str, train: Mapping[str, Any], data: str, steps: int | None, budget: float | None
) -> Config:
    """The configuration of one model of an item.

    t_max is scaled so that its ratio to the distance of embeddings stays the paper's: t_max * sqrt(D) / 16.

    Args:
        scale: Shipped configuration it starts from.
        train: ``t_max`` at the paper's embedding width, ``warp``, ``mask``.
        data: Prepared shards.
        steps: Updates, instead of the configuration's limits; equal for all models of an item.
        budget: Wall-clock seconds, instead of the configuration's.
    """
    config = load_config(scale, {"data.path": data})
    config.process.t_max = train["t_max"] * (config.model.embedding_width / PAPER_WIDTH) ** 0.5
    config.time.warp = train["warp"]
    config.mask.strategy = train["mask"]
    if steps is not None:
        config.train.steps, config.train.budget = steps, None
    elif budget is not None:
        config.train.budget = budget
    return config


def run_name(train: Mapping[str, Any]) -> str:
    """Folder name of a model: items that need the same model share it."""
    return f"tmax{train['t_max']:g}-{'warp' if train['warp'] else 'uniform'}-{train['mask']}"


def settings(usual: Settings, sample: Mapping[str, Any]) -> Settings:
    """Sampling settings of a row."""
    from dataclasses import replace

    return replace(usual, **sample)
