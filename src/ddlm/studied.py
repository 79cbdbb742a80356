"""A model as :mod:`ddlm.study` samples it: with the sampler of the study, and traces that hold every KL."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddlm.config import MOST_STEPS, SampleConfig, read_config
from ddlm.lm import DiffusionLM
from ddlm.sampling import halting

# no threshold is low enough for a KL that rounds to 0
_NEVER = halting.KLBelow(1.0, min_steps=MOST_STEPS)


def sampler(folder: Path, **chosen: Any) -> SampleConfig:
    """Defaults of generation of the model in ``folder``, with what is ``chosen`` and not None instead of its own.

    Raises:
        ConfigError: as :func:`ddlm.config.read_config`.
    """
    own = read_config(folder / "config.yaml").sample
    return replace(own, **{k: v for k, v in chosen.items() if v is not None})


class StudiedLM(DiffusionLM):
    """A loaded model whose traces hold the KL of every position at every step.

    The engine measures all of them only for requests that halt by KL: without a criterion of its own a traced request
    gets one that never fires.

    Args:
        lm: The model; its weights are shared.
        sample: Defaults of generation instead of the model's own.

    Attributes:
        plain: The model with the same defaults, whose traces hold the KL of an eighth of the positions at a step.
    """

    def __init__(self, lm: DiffusionLM, sample: SampleConfig) -> None:
        vars(self).update(vars(lm))  # the network is not copied and placed on the device once more
        self.config = replace(lm.config, sample=sample)
        self.plain = copy.copy(lm)
        self.plain.config = self.config

    def options(self, *args: Any, **settings: Any) -> dict[str, Any]:
        """See :meth:`ddlm.lm.DiffusionLM.options`."""
        made = super().options(*args, **settings)
        if made["trace"] and made["halt"] is None:
            made["halt"] = _NEVER
        return made
