"""Weights of the main model on its way through training: the curves of figure1, which checkpoints are too few for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ddlm.checkpoint import save_model

if TYPE_CHECKING:
    from ddlm.config import Config
    from ddlm.network.denoiser import DDLM

MOST = 8
"""Kept of a training; a longer training ends with 4 to 8, evenly spaced."""


def milestones(run: Path) -> list[Path]:
    """Model folders of a training, oldest first; none where it kept none."""
    found = [p for p in (run / "milestones").glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=_step)


class Milestones:
    """Keeps the averaged weights now and then; for ``sample`` of :func:`ddlm.training.loop.train`.

    How many steps a budget of seconds will allow is not known before its end: whenever there are too many, every
    second one is removed, and from then on only every second one is written.

    Args:
        run: Run folder.
        config: The training's; ``train.sample_every`` steps lie between two at first.
        tokenizer_from: Folder whose tokenizer files are copied.
    """

    def __init__(self, run: Path, config: Config, tokenizer_from: Path) -> None:
        self._run, self._config, self._tokenizer = run, config, tokenizer_from

    def __call__(self, model: DDLM, step: int) -> None:
        """Keep the weights of this step, if its turn has come."""
        kept = milestones(self._run)
        apart = _step(kept[0]) if kept else step  # the first one lies as far from the start
        if step % apart:
            return
        folder = self._run / "milestones" / f"step-{step}"
        save_model(folder, model, self._config, tokenizer_from=self._tokenizer, step=step)
        kept = milestones(self._run)
        if len(kept) > MOST:
            for path in kept:
                if _step(path) % (2 * apart):
                    shutil.rmtree(path)


def gib(parameters: int) -> float:
    """Most disk that they take, GiB."""
    return MOST * 4 * parameters / 2**30


def _step(folder: Path) -> int:
    return int(folder.name[5:])
