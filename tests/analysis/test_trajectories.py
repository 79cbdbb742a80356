"""Numbers from records against the engine itself: same steps, same tokens, same exits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ddlm.analysis.beyond import exit_points
from ddlm.analysis.record import Record
from ddlm.analysis.trajectories import (
    EVERY_KL,
    Trajectories,
    first_lasting,
    frequency_bands,
    repeated,
)
from ddlm.config import MOST_STEPS
from ddlm.network.inference import InferenceDenoiser
from ddlm.sampling import halting, sample
from ddlm.types import DataError
from sampling.models import LENGTH, PROCESS, network

S, STEPS = 8, 60


def drawn(halt=None, trace=False):
    tokens = torch.zeros(S, LENGTH, dtype=torch.int64)
    noised = torch.ones(S, LENGTH, dtype=torch.bool)
    noised[:, :3] = False
    return sample(
        InferenceDenoiser(network()), tokens, noised, PROCESS, steps=STEPS, halt=halt, trace=trace
    )


@pytest.fixture(scope="module")
def traces():
    # a criterion that never fires: else the engine measures an eighth of the KL
    return drawn(halting.KLBelow(1.0, min_steps=MOST_STEPS), trace=True).trace


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
    header = {"embedding_width": 16, "settings": {"kl": EVERY_KL}}
    return Trajectories(Record("trajectories", header, arrays))


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


@pytest.mark.parametrize(
    "criterion, halt", [("entropy", halting.EntropyBelow), ("kl", halting.KLBelow)]
)
def test_entropy_and_kl_exit_where_the_engine_does(trajectories, criterion, halt) -> None:
    values = np.sort(trajectories.values(criterion)[:, 1:].ravel())
    for q in (0.02, 0.1, 0.4, 0.8):
        i = int(q * len(values))
        threshold = float((values[i] + values[i + 1]) / 2)
        real = drawn(halt(threshold))
        exits = trajectories.exit_steps(criterion, threshold)
        assert exits.tolist() == real.steps.tolist()
        assert (trajectories.tokens_at(exits) == real.tokens.numpy()).all()
        assert len(set(exits.tolist())) > 1 or q > 0.1  # or the comparison would say nothing


def test_an_eighth_of_the_kl_gives_no_exits(trajectories) -> None:
    header = {k: v for k, v in trajectories.header.items() if k != "settings"}
    old = Trajectories(replace(trajectories.record, header=header))
    assert exit_points(old, "kl") == []
    assert exit_points(trajectories, "kl")
    with pytest.raises(DataError, match="record again with --overwrite"):
        old.exit_steps("kl", 0.1)


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
