from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ddlm.network.inference import InferenceDenoiser
from ddlm.sampling import Engine, Progress, Request, Result, halting, make_request, sample, solvers
from ddlm.sampling.engine import least_rows, safe_length
from ddlm.types import ConfigError, Denoiser
from oracle import IndependentOracle, random_embeddings, random_prior
from sampling.models import LENGTH, PROCESS, VOCAB, Gaussian, network

NETWORK = network()
SLOT = safe_length(LENGTH, torch.device("cpu"))
FROZEN = InferenceDenoiser(NETWORK)
CRITERIA = (
    None,
    halting.Patience(2),
    halting.Patience(3, min_steps=5),
    halting.EntropyBelow(0.8),
    halting.KLBelow(0.02),
    halting.Fixed(6),
    halting.Patience(2, freeze=True),
    halting.EntropyBelow(0.3, freeze=True) | halting.Fixed(9),
)


def random_request(number: int, trace: bool = False) -> Request:
    """Everything about a request drawn from its number."""
    draw = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    n = draw.randint(1, LENGTH)
    noised = torch.rand(n, generator=generator) < draw.choice([0.2, 0.6, 1.0])
    return make_request(
        torch.randint(VOCAB, (n,), generator=generator),
        noised,
        PROCESS,
        steps=draw.randint(1, 12),
        solver=draw.choice(solvers.NAMES),
        grid_name=draw.choice(["uniform", "karras"]),
        halt=draw.choice(CRITERIA),
        noise_scale=draw.choice([0.8, 1.0, 1.2]),
        temperature=draw.choice([1.0, 1.0, 0.7]),
        top_k=draw.choice([0, 0, 5]),
        guidance=draw.choice([1.0, 1.0, 1.0, 2.0]),
        seed=draw.getrandbits(63),
        trace=trace,
        refine=draw.choice([0, 0, 0, 1, 5]),
    )


def same(a: Result, b: Result) -> None:
    assert (a.steps, a.reason, a.evaluations) == (b.steps, b.reason, b.evaluations)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.entropy, b.entropy)


def alone(request: Request, denoiser: Denoiser = FROZEN) -> Result:
    length = safe_length(len(request.tokens), torch.device("cpu"))
    (result,) = Engine(denoiser, PROCESS, slots=1, length=length).run([request])
    return result


@pytest.mark.slow
def test_500_random_requests_equal_the_same_ones_alone_bit_for_bit() -> None:
    requests = [random_request(i) for i in range(500)]
    together = list(Engine(FROZEN, PROCESS, slots=6, length=SLOT).run(iter(requests)))
    assert [r.id for r in together] == list(range(500))  # in submission order
    for request, result in zip(requests, together, strict=True):
        same(result, alone(request))
    assert {r.reason for r in together} == set(halting.REASONS)


@pytest.mark.parametrize("denoiser", [NETWORK, FROZEN])
@pytest.mark.parametrize("slots", [1, 2, 5, 16])
def test_a_sequence_does_not_depend_on_the_batch(denoiser: Denoiser, slots: int) -> None:
    requests = [random_request(i, trace=i % 3 == 0) for i in range(1000, 1016)]
    results = Engine(denoiser, PROCESS, slots=slots, length=SLOT).run(requests)
    for request, result in zip(requests, results, strict=True):
        same(result, alone(request, denoiser))


def test_looking_seldom_or_keeping_the_rows_changes_no_result() -> None:
    requests = [random_request(i, trace=True) for i in range(24)]
    plain = list(Engine(FROZEN, PROCESS, slots=4, length=SLOT).run(requests))
    for options in ({"look_every": 5}, {"exact": True}):
        other = Engine(FROZEN, PROCESS, slots=4, length=SLOT, **options)
        for a, b in zip(plain, other.run(requests), strict=True):
            same(a, b)
            assert (a.trace is None) == (b.trace is None)
            if a.trace is not None and b.trace is not None:
                assert torch.equal(a.trace.tokens, b.trace.tokens)


@pytest.mark.parametrize("solver", solvers.NAMES)
def test_the_same_seed_gives_the_same_text_whatever_the_batch_size(solver: str) -> None:
    tokens = torch.zeros(9, LENGTH, dtype=torch.int64)
    noised = torch.ones(9, LENGTH, dtype=torch.bool)
    whole = sample(FROZEN, tokens, noised, PROCESS, steps=8, solver=solver)
    again = sample(FROZEN, tokens, noised, PROCESS, steps=8, solver=solver, slots=2)
    part = sample(FROZEN, tokens[:1], noised[:1], PROCESS, steps=8, solver=solver)
    assert torch.equal(whole.x, again.x)
    assert torch.equal(whole.x[:1], part.x)
    assert not torch.equal(whole.x[0], whole.x[1])
    drawn = [
        sample(
            FROZEN,
            tokens,
            noised,
            PROCESS,
            steps=8,
            solver=solver,
            generator=torch.Generator().manual_seed(s),
        ).x
        for s in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_bf16_agrees_within_its_precision() -> None:
    """The tolerance the engine states for bf16: near ties may fall the other way, nearly all tokens stay."""
    tokens = torch.zeros(16, LENGTH, dtype=torch.int64)
    noised = torch.ones(16, LENGTH, dtype=torch.bool)
    wide = sample(FROZEN, tokens, noised, PROCESS, steps=20).tokens
    narrow = sample(
        InferenceDenoiser(NETWORK, torch.bfloat16), tokens, noised, PROCESS, steps=20
    ).tokens
    assert (wide == narrow).float().mean() > 0.8


class Watching:
    """Passes on to another denoiser and checks what every evaluation is given."""

    def __init__(self, inner: Denoiser, given: Tensor, kept: Tensor) -> None:
        self.inner, self.given, self.kept, self.calls = inner, given, kept, 0

    def embeddings(self) -> Tensor:
        return self.inner.embeddings()

    def __call__(
        self, xt: Tensor, t: Tensor, is_noised: Tensor, *args: object, **options: object
    ) -> object:
        self.calls += 1
        assert torch.equal(xt[self.kept], self.given[self.kept])  # to the bit, at every evaluation
        assert torch.equal(is_noised, ~self.kept)
        return self.inner(xt, t, is_noised, *args, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", solvers.NAMES)
def test_given_positions_keep_their_clean_embeddings(solver: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (5, LENGTH), generator=generator)
    kept = torch.rand(5, LENGTH, generator=generator) < 0.5
    given = FROZEN.embeddings()[tokens]
    watching = Watching(FROZEN, given, kept)
    out = sample(watching, tokens, ~kept, PROCESS, steps=10, solver=solver)  # type: ignore[arg-type]
    assert watching.calls == 9 * solvers.make(solver).evaluations + 1
    assert torch.equal(out.tokens[kept], tokens[kept])
    assert torch.equal(out.x[kept], given[kept])


def test_noise_starts_at_noise_scale_times_t_max() -> None:
    request = make_request(
        torch.zeros(LENGTH, dtype=torch.int64),
        torch.ones(LENGTH, dtype=torch.bool),
        PROCESS,
        steps=1,
        noise_scale=0.9,
        seed=7,
    )
    eps = torch.randn(LENGTH, 16, generator=torch.Generator().manual_seed(7))
    assert torch.equal(alone(request).x, 0.9 * PROCESS.t_max * eps)


def test_nothing_to_generate_gives_the_tokens_back() -> None:
    request = make_request(torch.arange(5), torch.zeros(5, dtype=torch.bool), PROCESS)
    result = alone(request)
    assert (result.tokens.tolist(), result.steps, result.reason) == (
        [0, 1, 2, 3, 4],
        0,
        "completed",
    )


def test_finished_sequences_leave_at_once_and_others_enter() -> None:
    """Ticks are what is paid: 2 slots, lengths 4, 4, 12: the third starts when the first leaves."""

    def request(steps: int) -> Request:
        noised = torch.ones(4, dtype=torch.bool)
        return make_request(torch.zeros(4, dtype=torch.int64), noised, PROCESS, steps=steps)

    engine = Engine(FROZEN, PROCESS, slots=2, length=16, exact=True)
    list(engine.run([request(12), request(4), request(4), request(4)]))
    assert engine.ticks == 12
    engine = Engine(FROZEN, PROCESS, slots=8, length=64)
    for steps in (2, 2, 2, 2, 2, 2, 9):
        engine.submit(request(steps))
    sizes = []
    while engine.busy:
        engine.step()
        sizes.append(engine._state.x.shape[0])
    assert sizes[0] == 7
    assert sizes[-1] == 1  # the last one does not drag idle slots along
    assert len(sizes) == 9


def test_stepping_polling_and_cancelling() -> None:
    engine = Engine(FROZEN, PROCESS, slots=1, length=SLOT)
    first, second, third = (engine.submit(random_request(i)) for i in (1, 3, 5))
    assert engine.poll(first) is None  # queued
    engine.step()
    progress = engine.poll(first)
    assert isinstance(progress, Progress)
    assert progress.step == 1
    assert engine.poll(second) is None
    engine.cancel(first)
    engine.cancel(third)
    ended = engine.step()  # frees the slot and lets the next one in, in one step
    assert [(r.id, r.reason) for r in ended if r.id != second] == [
        (first, "cancelled"),
        (third, "cancelled"),
    ]
    assert ended[0].steps == 1
    finished = []
    while engine.busy:
        finished += engine.step()
    assert [r.id for r in [*ended, *finished] if r.reason != "cancelled"] == [second]
    (result,) = [r for r in [*ended, *finished] if r.id == second]
    same(result, alone(random_request(3)))
    engine.cancel(second)  # long gone: nothing happens
    assert engine.step() == []


def test_a_cancelled_slot_is_taken_in_the_same_step() -> None:
    engine = Engine(FROZEN, PROCESS, slots=1, length=SLOT)
    full = torch.ones(LENGTH, dtype=torch.bool)
    keys = [
        engine.submit(make_request(torch.zeros(LENGTH).long(), full, PROCESS, steps=50))
        for _ in range(2)
    ]
    engine.step()
    engine.cancel(keys[0])
    assert [r.reason for r in engine.step()] == ["cancelled"]
    progress = engine.poll(keys[1])
    assert progress is not None
    assert progress.step == 1


def test_requests_may_be_submitted_from_other_threads() -> None:
    engine = Engine(FROZEN, PROCESS, slots=3, length=SLOT)
    threads = [
        threading.Thread(
            target=lambda k=k: [engine.submit(random_request(10 * k + i)) for i in range(10)]
        )
        for k in range(4)
    ]
    results = []
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads) or engine.busy:
        results += engine.step()
    assert sorted(r.id for r in results) == list(range(40))


def test_streaming_shows_every_step_and_ends_with_the_result() -> None:
    request = make_request(
        torch.zeros(LENGTH, dtype=torch.int64),
        torch.ones(LENGTH, dtype=torch.bool),
        PROCESS,
        steps=9,
        solver="heun",
    )
    *states, last = Engine(FROZEN, PROCESS, slots=2, length=SLOT).stream(request)
    assert [s.step for s in states if isinstance(s, Progress)] == list(range(1, 9))
    assert isinstance(last, Result)
    same(last, alone(request))


def test_endless_requests_are_drawn_as_slots_become_free() -> None:
    drawn = 0

    def endless() -> Iterator[Request]:
        nonlocal drawn
        while True:
            drawn += 1
            yield random_request(drawn)

    results = Engine(FROZEN, PROCESS, slots=2, length=SLOT).run(endless())
    for i in range(1, 11):
        same(next(results), alone(random_request(i)))
    assert drawn < 40


def test_guidance_interpolates_between_both_estimates() -> None:
    """w = 1 is the conditional network; with independent tokens there is nothing to be guided by."""
    oracle = IndependentOracle(random_embeddings(6, 8), random_prior(6))
    tokens = torch.randint(6, (4, 5), generator=torch.Generator().manual_seed(0))
    noised = torch.tensor([True, False, True, True, False]).expand(4, 5)
    plain, guided = (
        sample(oracle, tokens, noised, PROCESS, steps=12, guidance=w) for w in (1.0, 3.0)
    )
    torch.testing.assert_close(plain.x, guided.x)
    one, two, zero = (
        sample(FROZEN, tokens, noised, PROCESS, steps=2, guidance=w).x.double()
        for w in (1.0, 2.0, 0.0)
    )
    torch.testing.assert_close(
        two - one, one - zero, rtol=1e-3, atol=1e-4
    )  # linear in w after one move
    assert not torch.equal(one, two)


def test_temperature_and_top_k_reach_the_posterior() -> None:
    tokens, noised = torch.zeros(3, LENGTH).long(), torch.ones(3, LENGTH, dtype=torch.bool)
    table = FROZEN.embeddings()
    one = sample(FROZEN, tokens, noised, PROCESS, steps=2, top_k=1, trace=True)
    assert one.trace is not None
    for trace in one.trace:  # only the argmax is left: its embedding is the estimate
        torch.testing.assert_close(trace.x0_norm, table.norm(dim=-1)[trace.tokens.long()])
        assert (trace.entropy == 0).all()
    cold, warm = (
        sample(FROZEN, tokens, noised, PROCESS, steps=2, temperature=tau, trace=True).trace
        for tau in (0.5, 2.0)
    )
    assert cold is not None
    assert warm is not None
    assert cold[0].entropy[0].mean() < warm[0].entropy[0].mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "0 steps"),
        ({"noise_scale": -1.0}, "noise_scale"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": 1e-50}, "temperature=1e-50 was given, it must be between 0.001 and"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"guidance": float("inf")}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"solver": "rk4"}, "euler, heun, dpmpp_2m, sde"),
        ({"grid_name": torch.tensor([1.0, 2.0])}, "descend"),
        ({"grid_name": "warp"}, "time warp"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make_request(torch.zeros(3).long(), torch.ones(3, dtype=torch.bool), PROCESS, **change)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_impossible_submissions_are_refused() -> None:
    engine = Engine(FROZEN, PROCESS, slots=1, length=4)
    yes = torch.ones(5, dtype=torch.bool)
    with pytest.raises(ConfigError, match="5 tokens was given, this engine takes at most 4"):
        engine.submit(make_request(torch.zeros(5).long(), yes, PROCESS))
    with pytest.raises(ConfigError, match="outside the vocabulary of 96"):
        engine.submit(make_request(torch.tensor([96]), ~yes[:1], PROCESS))
    with pytest.raises(ConfigError, match="request=None was given, make one with make_request"):
        list(engine.run([None]))  # type: ignore[list-item]
    many = halting.Any(tuple(halting.Patience(i) for i in range(1, 6)))
    with pytest.raises(ConfigError, match="at most 4"):
        engine.submit(make_request(torch.zeros(2).long(), yes[:2], PROCESS, halt=many))
    with pytest.raises(ConfigError, match="divergence"):
        Engine(Gaussian(), PROCESS, length=4).submit(
            make_request(torch.zeros(2).long(), yes[:2], PROCESS, halt=halting.KLBelow(0.1))
        )
    assert not engine.busy
    with pytest.raises(ConfigError, match="slots=0"):
        Engine(FROZEN, PROCESS, slots=0)


def test_few_rows_are_padded_to_safe_ones() -> None:
    cpu = torch.device("cpu")
    assert [safe_length(n, cpu) for n in (1, 16, 17, 64)] == [16, 16, 32, 64]
    assert least_rows(1, cpu) == 16 * torch.get_num_threads()
    assert least_rows(1024, cpu) == 1
    tiny = [
        make_request(
            torch.zeros(1).long(), torch.ones(1, dtype=torch.bool), PROCESS, steps=6, seed=s
        )
        for s in range(40)
    ]
    together = Engine(FROZEN, PROCESS, slots=40, length=16).run(tiny)
    for request, result in zip(tiny, together, strict=True):
        same(result, alone(request))
