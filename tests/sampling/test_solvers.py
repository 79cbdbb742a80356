"""Each solver against a flow that is known, and against the closed-form posterior of a finite table."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ddlm.diffusion.process import NoiseProcess
from ddlm.sampling import grid, sample, solvers
from ddlm.types import Posterior
from oracle import IndependentOracle, MarkovPairOracle
from sampling.models import Gaussian

SMOOTH = NoiseProcess(0.5, 8.0)
STEPS = (33, 65, 129, 257)


def order(errors: list[float]) -> float:
    """Slope of log error on log step size over the two finest pairs."""
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    return sum(slopes[-2:]) / 2


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("spacing", ["uniform", "karras"])
def test_measured_order_on_a_smooth_flow(name: str, spacing: str) -> None:
    denoiser, solver = Gaussian(), solvers.make(name)
    errors = []
    for steps in STEPS:
        out = sample(
            denoiser,
            torch.zeros(2, 3, dtype=torch.int64),
            torch.ones(2, 3, dtype=torch.bool),
            SMOOTH,
            steps=steps,
            solver=solver,
            grid=spacing,
        )
        start = torch.stack(
            [
                torch.randn(3, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
                for s in (0, 1)
            ]
        )
        variance = [denoiser.s**2 + t**2 for t in (SMOOTH.t_min, SMOOTH.t_max)]
        exact = SMOOTH.t_max * start * math.sqrt(variance[0] / variance[1])
        errors.append(float((out.x - exact).abs().max()))
    assert order(errors) == pytest.approx(solver.order, abs=0.15), errors


def test_a_denoiser_in_float64_is_asked_in_float64() -> None:
    asked = []

    class Asked(Gaussian):
        def __call__(
            self, xt: Tensor, t: Tensor, is_noised: Tensor, *rest: object, **options: object
        ) -> Posterior:
            asked.append((xt, t, options["readout"].temperature))  # type: ignore[attr-defined]
            return super().__call__(xt, t, is_noised)

    tokens, noised = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    sample(Asked(), tokens, noised, SMOOTH, steps=2, temperature=0.7)
    assert {x.dtype for look in asked for x in look} == {torch.float64}
    assert all(float(temperature[0]) == 0.7 for _, _, temperature in asked)


def test_the_sde_solver_has_weak_order_one_and_becomes_euler_without_noise() -> None:
    denoiser = Gaussian()
    errors = []
    for (
        steps
    ) in STEPS:  # x0_hat is linear in x, so the variance of x follows exactly from the coefficients
        plan = solvers.plan(solvers.Ancestral(), grid.karras(SMOOTH, steps)).coefficients
        variance = denoiser.s**2 + SMOOTH.t_max**2
        for t, a, b, _, s in plan[:-1, :5].tolist():
            share = denoiser.s**2 / (denoiser.s**2 + t**2)
            variance = (a + b * share) ** 2 * variance + s**2
        errors.append(abs(variance - denoiser.s**2 - SMOOTH.t_min**2))
    assert order(errors) == pytest.approx(1, abs=0.15), errors
    times = grid.uniform(SMOOTH, 20)
    quiet, euler = (
        solvers.plan(s, times).coefficients for s in (solvers.Ancestral(0.0), solvers.Euler())
    )
    torch.testing.assert_close(quiet, euler)


def test_an_ancestral_step_is_the_exact_posterior_of_the_forward_process() -> None:
    """q(x' | x, x_0) of x = x' + sqrt(t^2 - t'^2) eps, x' = x_0 + t' eps: a product of two Gaussians."""
    t, t_next = torch.tensor([4.0, 1.5]).double(), torch.tensor([3.0, 0.2]).double()
    (stage,) = solvers.Ancestral().stages(t, t_next, torch.full_like(t, math.nan))
    gap = t.square() - t_next.square()
    precision = 1 / gap + 1 / t_next.square()
    torch.testing.assert_close(stage.s.square(), 1 / precision)
    torch.testing.assert_close(stage.a, 1 / gap / precision)
    torch.testing.assert_close(stage.b, 1 / t_next.square() / precision)


def test_heun_is_the_mean_of_both_slopes() -> None:
    x, x0, x0_next = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    t, t_next = torch.tensor([3.0, 7.0]).double(), torch.tensor([2.0, 6.5]).double()
    predict, correct = solvers.Heun().stages(t, t_next, t)
    predicted, memory = predict.apply(x, x0, torch.zeros_like(x))
    got, _ = correct.apply(predicted, x0_next, memory)
    t, t_next = t[:, None, None], t_next[:, None, None]
    d = (x - x0) / t
    euler = x + (t_next - t) * d
    torch.testing.assert_close(predicted, euler)
    torch.testing.assert_close(got, x + (t_next - t) * (d + (euler - x0_next) / t_next) / 2)


@pytest.mark.parametrize("name", solvers.NAMES)
def test_evaluations_are_as_declared(name: str) -> None:
    solver = solvers.make(name)
    plan = solvers.plan(solver, grid.uniform(SMOOTH, 10))
    assert len(plan.coefficients) == 9 * solver.evaluations + 1
    assert plan.looks == 10
    assert plan.coefficients[:, 6].max() == 10
    assert plan.coefficients[:, 7].tolist() == [0.0] * (len(plan.coefficients) - 1) + [1.0]


# ---- the oracle: tokens come out with the frequencies of the prior

WIDE = NoiseProcess(
    0.3, 60.0
)  # wide enough that noise alone is a fair start, narrow enough to decide


def table(vocabulary: int, width: int = 8) -> Tensor:
    rows = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(5)).double()
    return math.sqrt(width) * torch.nn.functional.normalize(rows, dim=-1)


def chi_square_p(counts: Tensor, expected: Tensor) -> float:
    """p-value of Pearson's test (regularised upper incomplete gamma function)."""
    statistic = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor((counts.numel() - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic.double() / 2))


def generate(
    oracle: IndependentOracle | MarkovPairOracle, rows: int, length: int, **options: object
) -> Tensor:
    shape = (rows, length)
    out = sample(
        oracle,
        torch.zeros(shape, dtype=torch.int64),
        torch.ones(shape, dtype=torch.bool),
        WIDE,
        generator=torch.Generator().manual_seed(11),
        grid="karras",
        slots=1000,
        **options,  # type: ignore[arg-type]
    )
    return out.tokens


BUDGET = {"euler": 120, "heun": 40, "dpmpp_2m": 40, "sde": 120}


@pytest.mark.parametrize("name", solvers.NAMES)
def test_independent_tokens_come_with_the_frequencies_of_the_prior(name: str) -> None:
    prior = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]).double()
    tokens = generate(IndependentOracle(table(6), prior), 600, 4, steps=BUDGET[name], solver=name)
    counts = torch.bincount(tokens.flatten(), minlength=6).double()
    assert chi_square_p(counts, prior * tokens.numel()) > 1e-3, counts


@pytest.mark.parametrize("name", solvers.NAMES)
def test_pairs_of_a_markov_chain_come_with_their_joint_frequencies(name: str) -> None:
    initial = torch.tensor([0.5, 0.3, 0.2]).double()
    transition = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.1, 0.6]]).double()
    oracle = MarkovPairOracle(table(3), initial, transition)
    tokens = generate(oracle, 1500, 2, steps=BUDGET[name], solver=name)
    counts = torch.bincount(3 * tokens[:, 0] + tokens[:, 1], minlength=9).double()
    expected = (initial[:, None] * transition).flatten() * len(tokens)
    assert chi_square_p(counts, expected) > 1e-3, counts


def test_the_chi_square_test_notices_a_wrong_start() -> None:
    prior = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]).double()
    tokens = generate(IndependentOracle(table(6), prior), 600, 4, steps=60, noise_scale=0.3)
    counts = torch.bincount(tokens.flatten(), minlength=6).double()
    assert chi_square_p(counts, prior * tokens.numel()) < 1e-6, counts


def test_requests_of_one_grid_share_their_plan_but_not_with_somebody_elses_solver() -> None:
    class Mine(solvers.Euler):
        def stages(self, t: Tensor, t_next: Tensor, t_previous: Tensor) -> list[solvers.Stage]:
            (stage,) = super().stages(t, t_next, t_previous)
            return [dataclasses.replace(stage, s=torch.ones_like(t))]

    times = torch.linspace(5.0, 1.0, 7, dtype=torch.float64)
    first, again = (solvers.plan(solvers.Euler(), t) for t in (times, times.clone()))
    assert again is first
    longer = solvers.plan(solvers.Euler(), torch.linspace(5.0, 1.0, 8, dtype=torch.float64))
    other = solvers.plan(solvers.Ancestral(0.5), times)
    assert len(longer.coefficients) == 8
    assert not torch.equal(other.coefficients, first.coefficients)
    assert solvers.plan(solvers.Ancestral(1.0), times) is not other
    mine = solvers.plan(Mine(), times)
    noise = solvers.COLUMNS.index("s")
    assert mine.coefficients[:-1, noise].eq(1).all()
    assert first.coefficients[:, noise].eq(0).all()


def test_a_plan_of_very_many_times_is_not_kept() -> None:
    solvers.plan(solvers.Euler(), torch.linspace(5.0, 0.5, 7, dtype=torch.float64))
    kept = solvers._shared_plan.cache_info().currsize
    long = solvers.plan(solvers.Heun(), torch.linspace(5.0, 0.5, 9000, dtype=torch.float64))
    assert long.looks == 9000
    assert solvers._shared_plan.cache_info().currsize == kept > 0
