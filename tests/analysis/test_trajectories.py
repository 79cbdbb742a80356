"""Numbers from records against the engine itself: same steps, same tokens, same exits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ddlm.analysis.record import Record
from ddlm.analysis.trajectories import (
    KL_LOOKS,
    Trajectories,
    first_lasting,
    frequency_bands,
    repeated,
)
from ddlm.network.inference import InferenceDenoiser
from ddlm.sampling import halting, sample
from ddlm.sampling.trace import KL_STRIDE
from ddlm.types import DataError
from sampling.models import LENGTH, PROCESS, network

S, STEPS = 8, 60


def drawn(halt=None, trace=False, given=slice(3)):
    tokens = torch.zeros(S, LENGTH, dtype=torch.int64)
    noised = torch.ones(S, LENGTH, dtype=torch.bool)
    noised[:, given] = False
    return sample(
        InferenceDenoiser(network()), tokens, noised, PROCESS, steps=STEPS, halt=halt, trace=trace
    )


@pytest.fixture(scope="module")
def traces():
    return drawn(trace=True).trace


@pytest.fixture(scope="module")
def trajectories(traces) -> Trajectories:
    return recorded(traces)


def recorded(traces) -> Trajectories:
    arrays = {
        "tokens": np.stack([t.tokens.numpy() for t in traces]),
        "generated": np.stack([t.generated.numpy() for t in traces]),
        "times": traces[0].times.numpy(),
        "mean_entropy": np.stack([t.mean("entropy")[0].numpy() for t in traces]),
        "mean_kl": np.stack([t.mean("kl")[0].numpy() for t in traces]),
    }
    return Trajectories(Record("trajectories", {"embedding_width": 16}, arrays))


def test_switches_and_settling_are_those_of_the_trace(trajectories, traces) -> None:
    for i, t in enumerate(traces):
        count = trajectories.switches[i] * int(t.generated.sum())
        assert np.allclose(count, t.switches)
        given = ~t.generated
        assert (trajectories.settled_step[i][~given] == t.settled_step[t.generated].numpy()).all()
        assert (trajectories.settled_step[i][given] == 0).all()
        assert trajectories.last_switch[i] == max(1, *(np.flatnonzero(t.switches.numpy()) + 1), 1)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_patience_exits_where_the_engine_does(trajectories, steps) -> None:
    real = drawn(halting.Patience(steps))
    exits = trajectories.exit_steps("patience", steps)
    assert exits.tolist() == real.steps.tolist()
    assert (trajectories.tokens_at(exits) == real.tokens.numpy()).all()
    assert len(set(exits.tolist())) > 1 or steps == 1  # or the comparison would say nothing


def test_entropy_exits_where_the_engine_does(trajectories) -> None:
    values = np.sort(trajectories.values("entropy").ravel())
    for q in (0.1, 0.4, 0.8):
        i = int(q * len(values))
        threshold = float((values[i] + values[i + 1]) / 2)
        real = drawn(halting.EntropyBelow(threshold))
        assert trajectories.exit_steps("entropy", threshold).tolist() == real.steps.tolist()


def test_kl_exits_are_near_those_of_the_engine(trajectories) -> None:
    assert KL_LOOKS == KL_STRIDE
    for q in (0.3, 0.6):
        threshold = float(np.nanquantile(trajectories.values("kl"), q))
        real = drawn(halting.KLBelow(threshold)).steps.numpy()
        exits = trajectories.exit_steps("kl", threshold)
        assert abs(exits.mean() - real.mean()) < 0.25 * STEPS


@pytest.mark.parametrize("start, first", [(3, 8), (8, 9)])
def test_kl_of_a_short_gap_is_that_of_every_position_once(start, first) -> None:
    """Fewer than eight positions: some looks measure none of them."""
    given = [i for i in range(LENGTH) if not start <= i < start + 4]
    traces = drawn(trace=True, given=given).trace
    t = recorded(traces)
    assert np.isnan(t.values("kl")[:, KL_LOOKS:]).any()

    def exit_step(kl, threshold) -> int:
        for k in range(KL_LOOKS, STEPS + 1):
            seen = kl[k - KL_LOOKS : k, start : start + 4]
            if (np.isfinite(seen).sum(0) == 1).all() and np.nanmean(seen) < threshold:
                return k
        return STEPS

    for threshold in (1e3, 0.3, 0.1, 0.03):
        expected = [exit_step(trace.kl.numpy(), threshold) for trace in traces]
        assert t.exit_steps("kl", threshold).tolist() == expected
    real = drawn(halting.KLBelow(1e3, min_steps=first), given=given)
    assert t.exit_steps("kl", 1e3).tolist() == real.steps.tolist() == [first] * S


def test_a_fixed_exit_and_agreement(trajectories) -> None:
    assert trajectories.exit_steps("fixed", 7).tolist() == [7] * S
    assert trajectories.exit_steps("fixed", 10**6).tolist() == [STEPS] * S
    assert trajectories.agreement(trajectories.exit_steps("fixed", STEPS)).tolist() == [1.0] * S
    share = trajectories.settled_share()
    assert share[-1] == 1
    assert (np.diff(share) >= 0).all()
    for step in (1, 20, 50):  # a settled token is one that agrees from here on
        assert share[step - 1] <= trajectories.agreement(np.full(S, step)).mean() + 1e-9


def test_an_unknown_criterion_and_an_empty_record_are_refused(trajectories) -> None:
    with pytest.raises(DataError, match="no halting criterion 'mood'"):
        trajectories.exit_steps("mood", 1)
    empty = {"tokens": np.zeros((0, 5, 4), int), "generated": np.zeros((0, 4), bool)}
    with pytest.raises(DataError, match="no generated token"):
        Trajectories(replace(trajectories.record, arrays=empty))


def test_first_lasting() -> None:
    holds = np.array([True, False, True, True])
    assert first_lasting(holds, holds) == 3
    assert first_lasting(holds, ~holds) is None
    assert first_lasting(holds, np.ones(4, bool)) == 1


def test_frequency_bands_hold_equal_shares() -> None:
    counts = np.array([0, 40, 10, 10, 10, 10, 10, 10])
    band, names = frequency_bands(counts, 2)
    assert band[1] == 0
    assert sum(counts[band == 0]) == 50
    assert sum(counts[band == 1]) == 50
    assert band[0] == 1
    assert names == ["ranks 1–2", "ranks 3–8"]


def test_repetition_as_in_table_4() -> None:
    assert repeated([1, 2, 3, 1, 2, 4, 3]) == [0, 0, 0, 2, 2, 0, 1]
    assert repeated([1, 2, 3, 1, 2, 4, 3], common={1, 3}) == [0, 0, 0, 2, 2, 0, 0]
    assert repeated([5, 5, 5]) == [0, 2, 2]
    assert repeated([]) == []
