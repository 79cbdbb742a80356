"""What a study records of many sequences."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from ddlm.lm import DiffusionLM, load
from ddlm.sampling.trace import Trace
from ddlm.tracing import trace_sequences
from sampling.models import write_model

SEQUENCES, STEPS = 10, 8


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> DiffusionLM:
    folder: Path = write_model(tmp_path_factory.mktemp("model"), 16)
    return load(folder, device="cpu")


def test_trajectories_are_let_go_and_their_means_stay(lm: DiffusionLM) -> None:
    kept: list[int] = []

    def alive() -> int:
        return sum(type(x) is Trace for x in gc.get_objects())

    others = alive()  # of other tests

    def count(_: int) -> None:
        kept.append(alive() - others)

    template = "the {8} sea"
    arrays, header = trace_sequences(
        lm, template, sequences=SEQUENCES, steps=STEPS, slots=2, on_sequence=count
    )
    assert len(kept) == SEQUENCES == header["sequences"]
    # those of twice as many texts as there are slots, and what is being looked at
    assert max(kept) <= 6 < SEQUENCES, "trajectories pile up"
    whole = lm.generate(template, SEQUENCES, steps=STEPS, trace=True)
    assert header["texts"] == [g.text for g in whole]
    for name in ("entropy", "kl", "x_norm", "score_cosine"):
        values = np.stack([getattr(g.traces[0], name).numpy() for g in whole])
        known = np.isfinite(values)
        want = np.where(
            known.any(0), np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan
        )
        assert arrays[f"position_{name}"].dtype == np.float32
        np.testing.assert_allclose(arrays[f"position_{name}"], want, rtol=1e-5, atol=1e-6)
    assert np.isnan(arrays["position_kl"]).any()
