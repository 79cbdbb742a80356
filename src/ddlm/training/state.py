"""The state of a run: what a checkpoint must hold so that the run goes on as if it had never stopped."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddlm.checkpoint import check_weights, global_draws, load_weights, read_weights
from ddlm.config import Config
from ddlm.device import product_dtype
from ddlm.diffusion.process import NoiseProcess
from ddlm.diffusion.time_warp import TimeSampler, TimeWarp, UniformTime
from ddlm.files import CheckpointError, read_tensors, write_text
from ddlm.network.denoiser import DDLM
from ddlm.training.draws import derive_seed
from ddlm.training.optim import Ema, make_optimizer
from ddlm.training.sharded import SavedTensors, kept, move_shards, put, write_whole

_MOMENTS = ("exp_avg", "exp_avg_sq", "step", "momentum")


@dataclass(frozen=True)
class StepOutcome:
    """What a step tells, still on the device.

    Attributes:
        loss: Mean cross-entropy over the noised positions of the global batch, nats.
        grad_norm: Global gradient norm before clipping.
        t: Times ``(B,)`` in row order.
        cross_entropy: Mean cross-entropy of each sequence in nats ``(B,)``, in row order.
    """

    loss: Tensor
    grad_norm: Tensor
    t: Tensor
    cross_entropy: Tensor


@dataclass
class TrainState:
    """Weights, optimiser, averages, time warp and counters.

    There is no random state: every draw is a function of (seed, step).

    Attributes:
        step: Updates made.
        seconds: Wall-clock time spent, earlier parts included.
        skipped: Updates skipped because a gradient was not finite.
        best: Step and held-out cross-entropy of the best evaluation so far.
    """

    model: DDLM
    optimizer: torch.optim.AdamW
    ema: Ema | None
    warp: TimeWarp | None
    warp_optimizer: torch.optim.Adam | None
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    best: dict[str, float] = field(default_factory=dict)

    @classmethod
    def create(cls, config: Config, device: torch.device | str = "cpu") -> TrainState:
        """A new run: weights from ``train.seed``.

        Raises:
            ConfigError: for impossible settings.
        """
        process = NoiseProcess(config.process.t_min, config.process.t_max)
        with global_draws(derive_seed(config.train.seed, "weights")):
            model = DDLM(config.model, process).to(device)
        model.compute_dtype = product_dtype(config.train.precision, device)
        return cls.around(model, config)

    @classmethod
    def around(cls, model: DDLM, config: Config) -> TrainState:
        """A new optimiser, average and time warp for a model."""
        warp = warp_optimizer = None
        if config.time.warp:
            warp = TimeWarp(config.process.t_min, config.process.t_max, config.time.bins)
            warp_optimizer = torch.optim.Adam(warp.parameters(), lr=config.time.lr)
        return cls(
            model=model,
            optimizer=make_optimizer(model, config.train),
            ema=Ema(model.parameters(), config.train.ema) if config.train.ema > 0 else None,
            warp=warp,
            warp_optimizer=warp_optimizer,
        )

    @property
    def times(self) -> TimeSampler:
        """The distribution of t that training draws from."""
        if self.warp is not None:
            return self.warp
        return UniformTime(self.model.process.t_min, self.model.process.t_max)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[DDLM]:
        """The model with its averaged weights in place (or as it is, when none are kept), in evaluation mode."""
        parameters = list(self.model.parameters())
        if self.ema is not None:
            self.ema.swap(parameters)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train()
            if self.ema is not None:
                self.ema.swap(parameters)

    def inference_weights(self) -> dict[str, Tensor]:
        """What a user of the model wants: averaged weights where they are kept. Collective under FSDP: :func:`kept`."""
        names = [n for n, _ in self.model.named_parameters()]
        tensors = self.ema.shadow if self.ema is not None else list(self.model.parameters())
        return {n: kept(t) for n, t in zip(names, tensors, strict=True)}

    def resume_tensors(self) -> dict[str, Tensor]:
        """Every other tensor of the run; under FSDP this process's parts of them."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if self.ema is not None:
                tensors[f"weights.{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        if self.warp is not None and self.warp_optimizer is not None:
            for name, parameter in self.warp.named_parameters():
                for key, value in self.warp_optimizer.state.get(parameter, {}).items():
                    tensors[f"warp.{key}.{name}"] = value
        return tensors

    def counters(self) -> dict[str, Any]:
        """Numbers of the run."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "best": self.best,
        }

    @torch.no_grad()
    def restore(self, folder: Path) -> bool:
        """Take up the state of a training checkpoint.

        Returns:
            Whether the optimiser goes on with its moments; another optimiser than the checkpoint's starts new ones.

        Raises:
            CheckpointError: when it has no training state or belongs to another architecture.
        """
        if not (folder / "training" / "state.json").is_file():
            raise CheckpointError(
                f"{folder} holds a model but no training state: it cannot be resumed"
            )
        averaged = read_weights(folder)
        saved = SavedTensors(folder / "training")
        names = [n for n, _ in self.model.named_parameters()]
        parameters = dict(self.model.named_parameters())
        raw = {k[8:]: k for k in saved.sizes if k.startswith("weights.")}
        if raw:
            empty = {k: torch.empty(saved.sizes[v], device="meta") for k, v in raw.items()}
            check_weights(self.model, empty, folder)
            saved.fill({f"weights.{name}": parameters[name] for name in names})
        else:
            check_weights(self.model, averaged, folder)
            for name in names:
                put(parameters[name], averaged[name])
        if self.ema is not None:
            for name, shadow in zip(names, self.ema.shadow, strict=True):
                put(shadow, averaged[name])
        goes_on = _restore_moments(self.optimizer, self.model, saved)
        if self.warp is not None and self.warp_optimizer is not None:
            if not (folder / "time_warp.safetensors").is_file():
                raise CheckpointError(
                    f"{folder} was trained without a time warp: go on with time.warp=false, or start a new run from it "
                    "with --init"
                )
            load_weights(self.warp, read_tensors(folder / "time_warp.safetensors"), folder)
            _restore_moments(self.warp_optimizer, self.warp, saved, "warp.")
        counters = json.loads((folder / "training" / "state.json").read_text(encoding="utf-8"))
        self.step, self.seconds = counters["step"], counters["seconds"]
        self.skipped, self.best = counters["skipped"], counters["best"]
        return goes_on


def write_training(
    folder: Path, tensors: Mapping[str, Tensor] | Path, counters: Mapping[str, Any]
) -> None:
    """Write ``training/`` into a checkpoint that is being made: whole tensors, or the folder where shards lie."""
    training = folder / "training"
    training.mkdir()
    if isinstance(tensors, Path):
        move_shards(tensors, training)
    else:
        write_whole(training, tensors)
    write_text(training / "state.json", json.dumps(counters, indent=1) + "\n")


def _restore_moments(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, saved: SavedTensors, prefix: str = ""
) -> bool:
    """Moments by parameter name, so that the order of parameters does not matter.

    Returns:
        False where the checkpoint has moments of another rule for some parameter: that one starts with none.
    """
    orthogonal = {id(p) for g in optimizer.param_groups if g.get("orthogonal") for p in g["params"]}
    fused = bool(optimizer.defaults.get("fused"))
    goes_on = True
    targets: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found = [key for key in _MOMENTS if f"{prefix}{key}.{name}" in saved.sizes]
        if not found:  # a checkpoint made before the first update
            continue
        needed = {"momentum"} if id(parameter) in orthogonal else {"exp_avg", "exp_avg_sq", "step"}
        if not needed <= set(found):
            goes_on = False
            continue
        state = {key: torch.zeros_like(parameter) for key in found if key != "step"}
        if "step" in found:  # AdamW counts on the device only when it is fused
            state["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
        targets.update({f"{prefix}{key}.{name}": value for key, value in state.items()})
        optimizer.state[parameter] = state
    saved.fill(targets)
    return goes_on
