"""Every knob of the system: plain dataclasses, loaded strictly, overridden by name, dumped beside each run.

The docstring under a field is the help text of the command line. A configuration is data: nothing in a file is run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ddlm import settings
from ddlm.types import ConfigError, local

MaskStrategy = Literal["prefix", "random", "mixed", "span", "blend"]

# Logits 0.1 nats apart are then 100 apart, and e^-100 vanishes beside 1 in float32: the posterior is its argmax. The
# rounding of the logits, about 1e-5, counts for 0.01 nats at most; further down it would decide between tokens, and in
# the end the quotient overflows.
LEAST_TEMPERATURE = 1e-3
MOST_STEPS = 1_000_000  # of generation; more are surely a slip of the keyboard


@dataclass
class ModelConfig:
    """Sizes of the network (DDLM, Table 1)."""

    vocab_size: int = 32_000
    """Entries of the vocabulary V."""
    length: int = 64
    """Longest sequence, in tokens."""
    layers: int = 8
    """Transformer blocks L."""
    heads: int = 8
    """Attention heads; must divide the width."""
    width: int = 1024
    """Hidden width H of the transformer."""
    feed_forward: int = 4096
    """Inner width of the feed-forward layers."""
    embedding_width: int = 256
    """Width D of the token embeddings, in which the diffusion happens; rows have norm sqrt(D)."""
    time_width: int = 128
    """Width of the time embedding that drives the conditional layer norms."""
    self_conditioning: bool = True
    """Feed the previous estimate of x_0 back (CDCD). Off keeps the shape and feeds zeros."""
    likelihood_head: bool = False
    """Add the exact log-likelihood of the noised embedding, x_t . e_w / t^2, to the logits, so that the network has
    only the context to model. Not in the paper; docs/log.md has the measured gain."""
    neighbours: int = 0
    """Reach of the short convolutions before attention and feed-forward, in positions to each side (0: none, as in
    the paper). No gain has been measured (docs/log.md)."""


@dataclass
class ProcessConfig:
    """The noise process: t is its standard deviation (sigma = t). Keep t_max * 16 / sqrt(D) equal when D changes."""

    t_min: float = 1.0
    """Time at which text is read off; in units of the embeddings' unit variance per coordinate."""
    t_max: float = 10.0
    """Time of pure noise at which generation starts (DDLM: 10)."""


@dataclass
class TimeConfig:
    """Which noise levels training spends its steps on."""

    warp: bool = False
    """Learn the CDF of t from the loss (CDCD's time warping) instead of drawing t uniformly (DDLM)."""
    bins: int = 100
    """Pieces of the learned CDF."""
    lr: float = 1e-2
    """Learning rate of the time warp."""


@dataclass
class MaskConfig:
    """Which positions are noised (DDLM, section 3.4); the loss counts there only."""

    strategy: MaskStrategy = "span"
    """prefix: a random prefix stays; random: each position with a random rate; mixed: random positions after a
    random prefix (CDCD); span: random spans, each noised with probability 1/2 (DDLM); blend: each row everything,
    prefix, random or span with equal probability."""
    k_max: int = 9
    """Most spans of the span strategy, alone or in blend (8 cut points make 9 spans)."""


@dataclass
class DataConfig:
    """Token shards written by `ddlm prepare`."""

    path: str = ""
    """Folder of prepared shards (index.json inside)."""


@dataclass
class TrainConfig:
    """Optimisation. One step is one update of the weights with the global batch."""

    steps: int = 1_000_000
    """Updates to make."""
    budget: float | None = None
    """Wall-clock budget in seconds; the learning-rate schedule then follows the time spent. None: steps decide."""
    batch: int = 1024
    """Sequences of the global batch (all processes and accumulation steps together)."""
    micro_batch: int | None = None
    """Sequences of one forward pass of one process; None: its whole share, on a CPU pieces of at most 8192 tokens."""
    lr: float = 3e-5
    """Peak learning rate."""
    warmup: int = 10_000
    """Steps of linear warm-up, then cosine decay."""
    final_lr: float = 0.0
    """Learning rate at the end of the decay, as a fraction of the peak."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw (the paper's); muon: the matrices inside the blocks follow orthogonalised momentum, the rest AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices (0: plain Adam, as in the paper)."""
    clip: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights per step (0: none)."""
    self_condition: float = 0.5
    """Fraction of the sequences trained with a first estimate fed back (CDCD: one half)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the network's matrix products; weights, softmax and optimiser stay in float32. auto: bf16 where the
    device has instructions for it, fp32 elsewhere."""
    compile: bool = False
    """Compile the step with torch.compile (static shapes)."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work under torchrun."""
    embeddings: Literal["random", "spectral"] = "random"
    """How embeddings and the head start: random (CDCD's), or spectral: from counts of each token's neighbours in the
    shards."""
    attention: Literal["random", "matching"] = "random"
    """How attention starts: random, or matching: queries equal to keys, so that alike positions see each other."""
    seed: int = 0
    """Seed of initial weights, data order, noise, masks and times."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 1000
    """Steps between evaluations on the held-out split (0: never)."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints to keep besides the best one."""
    sample_every: int = 0
    """Steps between samples written to the run folder (0: never)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA when there is one."""
    threads: int = 0
    """CPU threads (0: torch's default)."""


@dataclass
class SampleConfig:
    """Defaults of generation."""

    steps: int = 50
    """Solver steps from t_max to t_min (DDLM: 50)."""
    solver: Literal["euler", "heun", "dpmpp_2m", "sde"] = "euler"
    """Solver of the probability-flow ODE."""
    grid: Literal["uniform", "karras", "warp"] = "uniform"
    """Time grid: uniform in t (DDLM), Karras's rho schedule, or quantiles of the learned time warp."""
    noise_scale: float = 1.0
    """Standard deviation of the initial noise relative to t_max (DDLM, Table 8)."""
    temperature: float = 1.0
    """Divides the posterior's logits (CDCD)."""
    refine: int = 0
    """Rounds after the last step that draw a fourth of the tokens anew, given all others (0: the paper's samplers)."""


@dataclass
class Config:
    """A whole experiment."""

    model: ModelConfig = field(default_factory=ModelConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    time: TimeConfig = field(default_factory=TimeConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


def load_config(
    source: str | Path | None = None, overrides: Mapping[str, Any] | Iterable[str] = ()
) -> Config:
    """Read a configuration strictly, apply overrides, check that its values fit together.

    Args:
        source: Name of a shipped configuration (``"tiny"``), path of a YAML file, or None for the defaults.
        overrides: ``{"train.lr": 1e-3}`` or ``["train.lr=1e-3"]``; text is converted to the field's type.

    Raises:
        ConfigError: naming the key, what was found, what is needed and the nearest valid name.
    """
    config = Config()
    if source is not None:
        path = find_config(source)
        settings.assign(config, settings.read_yaml(path), str(path))
    if not isinstance(overrides, Mapping):
        overrides = dict(settings.split_override(text) for text in overrides)
    for name, value in overrides.items():
        settings.override(config, name, value)
    check_config(config)
    return config


def read_config(path: str | Path) -> Config:
    """Read a configuration from a file, never from a shipped name; as strict as :func:`load_config`.

    Raises:
        ConfigError: for a missing file, text that is not YAML, unknown keys, wrong types or values that cannot work.
    """
    return config_from_dict(settings.read_yaml(local(path)), str(path))


def config_from_dict(values: Mapping[str, Any], source: str = "") -> Config:
    """Build a configuration from nested plain values, strictly; ``source`` names their origin in errors.

    Raises:
        ConfigError: naming the key, what was found, what is needed and the nearest valid name.
    """
    config = Config()
    settings.assign(config, values, source)
    check_config(config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values of a configuration; tuples become lists, as YAML and JSON have them.

    Raises:
        ConfigError: for a value of the wrong type.
    """
    plain = Config()  # without numbers of NumPy and paths
    settings.assign(plain, dataclasses.asdict(config))
    return json.loads(json.dumps(dataclasses.asdict(plain)))


def dump_config(config: Config) -> str:
    """The configuration as YAML text, every field written out; reading it gives back an equal one."""
    import yaml

    # Without allow_unicode every character survives: PyYAML changes some line breaks of Unicode otherwise.
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


def shipped_configs() -> dict[str, Path]:
    """Configurations that travel with the package, by name (``tiny``, ``paper/table2-tmax5``)."""
    folder = Path(__file__).parent / "configs"
    files = sorted(folder.rglob("*.yaml"))
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in files}


def find_config(source: str | Path) -> Path:
    """The file behind a name or a path.

    Raises:
        ConfigError: when there is neither such a shipped configuration nor such a file.
    """
    shipped = shipped_configs()
    if str(source) in shipped:
        return shipped[str(source)]
    path = local(source)
    if path.is_file():
        return path
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    hint = (
        settings.nearest(str(source), shipped) or f"; shipped configurations: {', '.join(shipped)}"
    )
    raise ConfigError(f"no configuration '{source}': neither a shipped name nor a file{hint}")


def check_config(config: Config) -> None:
    """Refuse values that cannot work, alone or together; numbers of NumPy and paths become plain ones.

    Raises:
        ConfigError: naming the fields, their values and what is needed.
    """
    settings.assign(config, dataclasses.asdict(config))
    m, p, t = config.model, config.process, config.train
    rules = [
        (f"model.{k}", getattr(m, k) >= 1, "at least 1")
        for k in ("length", "layers", "heads", "width", "feed_forward", "embedding_width")
    ]
    rules += [
        ("model.vocab_size", m.vocab_size >= 2, "at least 2"),
        (
            "model.time_width",
            m.time_width >= 2 and m.time_width % 2 == 0,
            "an even number, at least 2",
        ),
        ("model.neighbours", 0 <= m.neighbours < m.length, f"0 to {m.length - 1} positions"),
        ("process.t_min", p.t_min > 0, "above 0"),
        ("process.t_max", p.t_max < float("inf"), "a finite number"),
        ("process.t_min", p.t_min < p.t_max, f"below process.t_max, which is {p.t_max}"),
        ("time.bins", config.time.bins >= 2, "at least 2"),
        ("time.lr", 0 < config.time.lr < float("inf"), "above 0 and finite"),
        ("mask.k_max", config.mask.k_max >= 1, "at least 1"),
        ("train.steps", t.steps >= 1, "at least 1"),
        ("train.budget", t.budget is None or t.budget > 0, "above 0 seconds, or null"),
        ("train.batch", t.batch >= 1, "at least 1"),
        ("train.micro_batch", t.micro_batch is None or t.micro_batch >= 1, "at least 1, or null"),
        ("train.lr", 0 < t.lr < float("inf"), "above 0 and finite"),
        ("train.seed", 0 <= t.seed < 2**63, "from 0 to 2^63 - 1"),
        ("train.threads", t.threads >= 0, "0 (torch's default) or more"),
        ("train.warmup", t.warmup >= 0, "0 or more steps"),
        ("train.final_lr", 0 <= t.final_lr <= 1, "a fraction between 0 and 1"),
        (
            "train.optimizer",
            t.optimizer == "adamw" or t.strategy != "fsdp",
            "adamw when train.strategy is fsdp: Muon needs whole matrices",
        ),
        ("train.betas", all(0 <= b < 1 for b in t.betas), "two numbers in [0, 1)"),
        ("train.weight_decay", 0 <= t.weight_decay < float("inf"), "0 or more and finite"),
        ("train.clip", t.clip > 0, "above 0"),
        ("train.ema", 0 <= t.ema < 1, "in [0, 1)"),
        ("train.self_condition", 0 <= t.self_condition <= 1, "a fraction between 0 and 1"),
        ("train.log_every", t.log_every >= 1, "at least 1"),
        ("train.eval_every", t.eval_every >= 0, "0 (never) or more steps"),
        ("train.checkpoint_every", t.checkpoint_every >= 1, "at least 1"),
        ("train.sample_every", t.sample_every >= 0, "0 (never) or more steps"),
        ("train.keep", t.keep >= 1, "at least 1"),
        ("sample.steps", 1 <= config.sample.steps <= MOST_STEPS, f"between 1 and {MOST_STEPS:,}"),
        (
            "sample.noise_scale",
            0 <= config.sample.noise_scale < float("inf"),
            "0 or more and finite",
        ),
        (
            "sample.temperature",
            LEAST_TEMPERATURE <= config.sample.temperature < float("inf"),
            f"{LEAST_TEMPERATURE:g} or more",
        ),
        (
            "sample.grid",
            config.sample.grid != "warp" or config.time.warp,
            "uniform or karras without time.warp, which learns the times of the grid warp",
        ),
        ("sample.refine", 0 <= config.sample.refine <= MOST_STEPS, f"between 0 and {MOST_STEPS:,}"),
    ]
    values = dict(settings.field_values(config))
    for name, holds, needed in rules:
        if not holds:
            raise ConfigError(f"{name} is {values[name]}, it must be {needed}")
    if m.width % (2 * m.heads):
        raise ConfigError(
            f"model.width is {m.width}, it must be a multiple of 2 x model.heads ({2 * m.heads}): "
            "rotary positions turn pairs of each head's channels"
        )
