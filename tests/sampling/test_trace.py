from __future__ import annotations

import json
import math

import pytest
import torch

from ddlm.network.inference import InferenceDenoiser
from ddlm.sampling import Trace, halting, sample
from ddlm.sampling.trace import KL_STRIDE, Recorder
from ddlm.types import ConfigError
from sampling.models import LENGTH, PROCESS, VOCAB, Gaussian, network

FROZEN = InferenceDenoiser(network(layers=2))


def traces(**options: object) -> list[Trace]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (3, LENGTH), generator=generator)
    noised = torch.rand(3, LENGTH, generator=generator) > 0.3
    out = sample(FROZEN, tokens, noised, PROCESS, steps=20, trace=True, **options)  # type: ignore[arg-type]
    assert out.trace is not None
    for trace, steps in zip(out.trace, out.steps.tolist(), strict=True):
        assert trace.tokens.shape == (steps, LENGTH)
        assert len(trace.times) == steps
    return out.trace


def test_a_trace_is_the_trajectory() -> None:
    trace = traces()[0]
    assert trace.exact
    assert float(trace.times[0]) == PROCESS.t_max
    assert float(trace.times[-1]) == PROCESS.t_min
    kept = ~trace.generated
    root = math.sqrt(16)
    torch.testing.assert_close(trace.x_norm[:, kept], torch.full_like(trace.x_norm[:, kept], root))
    assert (trace.x0_norm <= root * 1.0001).all()
    torch.testing.assert_close(
        trace.score_cosine[-1][trace.generated], torch.ones(int(trace.generated.sum()))
    )
    torch.testing.assert_close(trace.sequence_x_cosine[-1], torch.tensor(1.0))
    assert (trace.sequence_x_cosine <= 1.0001).all()
    switches = trace.switches
    by_hand = [0] + [
        int((a != b).sum()) for a, b in zip(trace.tokens[1:], trace.tokens, strict=False)
    ]
    assert switches.tolist() == by_hand
    settled = trace.settled_step
    for i in range(LENGTH):
        k = int(settled[i])
        assert (trace.tokens[k - 1 :, i] == trace.tokens[-1, i]).all()
        assert k == 1 or trace.tokens[k - 2, i] != trace.tokens[-1, i]
    mean, deviation = trace.mean("entropy")
    torch.testing.assert_close(mean, trace.entropy[:, trace.generated].mean(1))
    assert (deviation >= 0).all()


def test_kl_is_sampled_without_halting_and_whole_with_it() -> None:
    sampled, whole = traces()[0], traces(halt=halting.KLBelow(1e-30))[0]
    assert sampled.kl is not None
    assert whole.kl is not None
    for k in range(1, 20):
        measured = ~sampled.kl[k].isnan()
        due = (torch.arange(LENGTH) - (k + 1)) % KL_STRIDE == 0
        assert torch.equal(measured, due & sampled.generated)
        torch.testing.assert_close(sampled.kl[k][measured], whole.kl[k][measured])
    assert torch.equal(~whole.kl[1:].isnan(), whole.generated.expand(19, LENGTH))


def test_kl_is_there_even_where_none_was_measured() -> None:
    """One look has nothing to be compared with: NaN, as documented, and its mean too."""
    tokens, noised = torch.zeros(1, LENGTH).long(), torch.ones(1, LENGTH, dtype=torch.bool)
    out = sample(FROZEN, tokens, noised, PROCESS, steps=1, trace=True)
    assert out.trace is not None
    (trace,) = out.trace
    assert trace.kl is not None
    assert trace.kl.shape == (1, LENGTH)
    assert trace.kl.isnan().all()
    mean, deviation = trace.mean("kl")
    assert mean.isnan().all()
    assert deviation.isnan().all()


def test_every_sequence_has_its_place_among_the_traces() -> None:
    tokens, noised = torch.zeros(3, LENGTH).long(), torch.ones(3, LENGTH, dtype=torch.bool)
    noised[1] = False  # nothing to generate, so nothing is seen of it
    out = sample(FROZEN, tokens, noised, PROCESS, steps=4, trace=True)
    assert out.trace is not None
    assert [trace and len(trace.times) for trace in out.trace] == [4, None, 4]
    assert out.steps.tolist() == [4, 0, 4]


def test_a_denoiser_that_compares_what_it_has_not_kept_is_told_so() -> None:
    class Forgetful(Gaussian):
        def divergence(self, new: object, old: object, temperature: object = None) -> None: ...

    tokens, noised = torch.zeros(1, 4).long(), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"Posterior.hidden where readout.keep_hidden asks"):
        sample(Forgetful(), tokens, noised, PROCESS, steps=3, halt=halting.KLBelow(0.1))


def test_the_mean_kl_of_a_denoiser_that_compares_nothing_is_refused() -> None:
    tokens, noised = torch.zeros(1, 4).long(), torch.ones(1, 4, dtype=torch.bool)
    out = sample(Gaussian(), tokens, noised, PROCESS, steps=3, trace=True)
    assert out.trace is not None
    assert out.trace[0].kl is None
    with pytest.raises(ConfigError, match="this trace has no kl"):
        out.trace[0].mean("kl")


def test_recording_changes_nothing() -> None:
    tokens, noised = torch.zeros(4, LENGTH).long(), torch.ones(4, LENGTH, dtype=torch.bool)
    with_trace, without = (
        sample(FROZEN, tokens, noised, PROCESS, steps=10, trace=flag) for flag in (True, False)
    )
    assert torch.equal(with_trace.x, without.x)


def test_sketched_cosines_are_close_to_the_exact_ones() -> None:
    """256 coordinates squeezed into 64: within the error the module states."""
    generator = torch.Generator().manual_seed(0)
    width, length, steps = 256, 32, 12
    last = torch.randn(1, length, width, generator=generator)
    path = [
        last + (steps - k) / 3 * torch.randn(1, length, width, generator=generator)
        for k in range(steps)
    ] + [last]
    recorder = Recorder(width, torch.device("cpu"), torch.float32)
    assert not recorder.exact
    flat = torch.zeros(1, length)
    for x in path:
        recorder.record(
            torch.tensor([0]), [5], [1.0], x, torch.zeros_like(x), None, flat.long(), flat, flat > 0
        )
    trace = recorder.finish(5, length, torch.ones(length, dtype=torch.bool), steps + 1)
    assert trace is not None
    assert trace.kl is None
    for k, x in enumerate(path):
        exact = torch.cosine_similarity(x.flatten(), last.flatten(), dim=0)
        assert abs(trace.sequence_x_cosine[k] - exact) < 4 / math.sqrt(64 * length)
        each = torch.cosine_similarity(x[0], last[0], dim=-1)
        assert (trace.x_cosine[k] - each).abs().max() < 5 / math.sqrt(64)
    assert recorder.finish(5, length, torch.ones(length, dtype=torch.bool), 3) is None  # let go


def test_a_trace_is_plain_json() -> None:
    rows = traces(halt=halting.Patience(3))[0].to_dict()
    text = json.dumps(rows, allow_nan=False)
    assert json.loads(text)["kl"][0] == [None] * LENGTH
    assert "switches" in rows
