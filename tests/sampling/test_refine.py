"""Rounds that draw a part of the tokens anew, given all the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddlm.diffusion.posterior import summarize
from ddlm.diffusion.process import NoiseProcess
from ddlm.network.inference import InferenceDenoiser
from ddlm.sampling import Engine, Progress, Request, Result, halting, make_request
from ddlm.sampling.refine import EVERY, parts
from ddlm.types import ConfigError, Posterior, ReadOut
from oracle import MarkovPairOracle, random_embeddings
from sampling.models import LENGTH, PROCESS, VOCAB, network

FROZEN = InferenceDenoiser(network())


class Watched:
    """A denoiser that keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def embeddings(self) -> Tensor:
        return FROZEN.embeddings()

    def __call__(
        self,
        xt: Tensor,
        t: Tensor,
        is_noised: Tensor,
        x0_hat: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        readout: ReadOut | None = None,
    ) -> Posterior:
        self.asked.append((xt[0].clone(), t[:1].clone(), is_noised[0].clone()))
        return FROZEN(xt, t, is_noised, x0_hat, valid=valid, readout=readout)


def request(refine: int, seed: int = 3, steps: int = 5, **options: object) -> Request:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (LENGTH,), generator=generator)
    noised = torch.ones(LENGTH, dtype=torch.bool)
    noised[:4] = noised[15] = False
    return make_request(tokens, noised, PROCESS, steps=steps, seed=seed, refine=refine, **options)  # type: ignore[arg-type]


def write(wanted: Request, denoiser: object = FROZEN) -> Result:
    return next(iter(Engine(denoiser, PROCESS, slots=1, length=LENGTH).run([wanted])))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 21])
def test_every_written_position_has_its_turn_before_one_has_a_second(count: int) -> None:
    is_noised = torch.zeros(30, dtype=torch.bool)
    is_noised[torch.randperm(30, generator=torch.Generator().manual_seed(count))[:count]] = True
    turn = min(EVERY, count)
    rounds = list(parts(is_noised, 3 * turn, torch.Generator().manual_seed(0)))
    assert len(rounds) == 3 * turn
    for start in range(0, 3 * turn, turn):
        seen = torch.stack(rounds[start : start + turn])
        assert torch.equal(seen.sum(0), is_noised.long())
    if count > 1:
        assert not any((r[1:] & r[:-1]).any() for r in rounds)


def test_nothing_written_needs_no_round() -> None:
    nothing = torch.zeros(5, dtype=torch.bool)
    assert list(parts(nothing, 4, torch.Generator())) == []


def test_a_round_noises_its_part_to_t_max_and_keeps_every_other_token() -> None:
    denoiser = Watched()
    wanted = request(refine=6)
    engine = Engine(denoiser, PROCESS, slots=1, length=LENGTH)
    *shown, result = engine.stream(wanted)
    assert isinstance(result, Result)
    looks = denoiser.asked[wanted.steps :]
    assert len(looks) == 6
    table = FROZEN.embeddings()
    for (x, t, part), before in zip(looks, shown[wanted.steps - 1 :], strict=True):
        assert isinstance(before, Progress)
        assert t.item() == PROCESS.t_max
        assert not (part & ~wanted.is_noised).any()
        assert torch.equal(x[~part], table[before.tokens[~part]])
        noise = (x[part] - table[before.tokens[part]]) / PROCESS.t_max
        assert 0.7 < noise.std().item() < 1.3
    assert torch.equal(result.tokens[~wanted.is_noised], wanted.tokens[~wanted.is_noised])


def test_steps_evaluations_and_the_reason_are_those_of_all_together() -> None:
    wanted = request(refine=3, steps=9, halt=halting.Fixed(4))
    plain, refined = write(replace(wanted, refine=0)), write(wanted)
    assert (plain.steps, plain.reason) == (4, "fixed")
    assert (refined.steps, refined.evaluations, refined.reason) == (7, 7, "fixed")
    assert torch.equal(refined.x, plain.x)
    assert not torch.equal(refined.tokens, plain.tokens)
    assert (refined.entropy[wanted.is_noised] > 0).all()


def test_a_trace_ends_with_the_last_step() -> None:
    traced = write(request(refine=3, trace=True))
    plain = write(request(refine=0, trace=True))
    assert traced.trace is not None
    assert plain.trace is not None
    assert torch.equal(torch.as_tensor(traced.trace.tokens), torch.as_tensor(plain.trace.tokens))


def test_streams_go_on_through_the_rounds_and_a_cancelled_round_keeps_its_steps() -> None:
    engine = Engine(FROZEN, PROCESS, slots=1, length=LENGTH)
    *shown, last = engine.stream(request(refine=4))
    assert isinstance(last, Result)
    assert [p.step for p in shown if isinstance(p, Progress)] == list(range(1, 9))
    assert {p.steps for p in shown if isinstance(p, Progress)} == {9}
    assert last.steps == 9
    key = engine.submit(request(refine=4))
    for _ in range(7):
        assert engine.step() == []
    engine.cancel(key)
    (cancelled,) = engine.step()
    assert (cancelled.steps, cancelled.reason) == (7, "cancelled")


def test_a_round_that_has_not_looked_yet_is_told_as_what_it_refines() -> None:
    *shown, last = Engine(FROZEN, PROCESS, slots=1, length=LENGTH).stream(request(refine=6))
    assert isinstance(last, Result)
    after = [p for p in shown if isinstance(p, Progress) and p.step >= 5]
    assert [p.step for p in after] == list(range(5, 11))
    written = request(refine=6).is_noised
    for told in after:
        assert (told.entropy[written] > 0).all()


def test_nothing_is_final_while_a_round_is_to_come() -> None:
    """A server sends on what is not noised: tokens settled, or outside the part of a round, may change yet."""
    wanted = request(refine=3, steps=12, halt=halting.Patience(2, freeze=True))
    plain = Engine(FROZEN, PROCESS, slots=1, length=LENGTH).stream(replace(wanted, refine=0))
    settled = [p.is_noised for p in plain if isinstance(p, Progress)]
    assert any(not torch.equal(s, wanted.is_noised) for s in settled)
    shown = Engine(FROZEN, PROCESS, slots=1, length=LENGTH).stream(wanted)
    told = [p.is_noised for p in shown if isinstance(p, Progress)]
    assert len(told) > 3
    assert all(torch.equal(t, wanted.is_noised) for t in told)


def test_rounds_lead_to_what_the_model_believes_of_both_tokens_together() -> None:
    """Two tokens of which the second nearly follows from the first; decided in one step, they know nothing of that."""
    vocabulary, count = 6, 1_500
    transition = torch.full((vocabulary, vocabulary), 0.05, dtype=torch.float64)
    transition += torch.eye(vocabulary, dtype=torch.float64).roll(1, 1)
    transition /= transition.sum(-1, keepdim=True)
    initial = torch.arange(1.0, vocabulary + 1, dtype=torch.float64)
    oracle = MarkovPairOracle(random_embeddings(vocabulary, 8), initial / initial.sum(), transition)
    process = NoiseProcess(0.5, 5.0)
    distance = {}
    for refine in (0, 12):
        requests: Iterator[Request] = (
            make_request(
                torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool), process,
                steps=1, seed=seed, refine=refine,
            )
            for seed in range(count)
        )  # fmt: skip
        made = Engine(oracle, process, slots=64, length=2).run(requests)
        first, second = torch.stack([r.tokens for r in made]).unbind(1)
        share = torch.bincount(first * vocabulary + second, minlength=vocabulary**2) / count
        distance[refine] = (share - oracle.joint_prior.flatten()).abs().sum().item() / 2
    # of exact draws of this number, the mean distance is 0.05
    assert distance[12] < 0.1
    assert distance[0] > 2 * distance[12]


def test_tokens_are_drawn_with_the_probabilities_of_the_posterior() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 4, generator=generator), torch.randn(7, 4, generator=generator)
    table, n = random_embeddings(7, 8).float(), 20_000
    at = torch.rand(n, generator=generator)
    tau, k = torch.full((n,), 0.7), torch.full((n,), 5)
    rows = hidden.expand(n, 4)
    drawn = summarize(
        rows, weight, None, table, chunk=64, temperature=tau, top_k=k, draw_at=at
    ).tokens
    logits = (hidden @ weight.T)[0] / 0.7
    kept = logits >= logits.sort(descending=True).values[4]
    expected = logits.masked_fill(~kept, -torch.inf).softmax(-1)
    share = torch.bincount(drawn, minlength=7) / n
    torch.testing.assert_close(share, expected, atol=0.015, rtol=0)
    assert set(drawn.tolist()) == set(kept.nonzero().flatten().tolist())
    plain = summarize(rows[:3], weight, None, table, draw_at=torch.tensor([-1.0, 0.0, 0.9999999]))
    assert plain.tokens[0] == logits.argmax()
    assert plain.tokens[1] == 0
    assert plain.tokens[2] == 6


def test_impossible_rounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="refine=-1 was given"):
        request(refine=-1)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("exit_at", [5, 6, 7, 8, None])
def test_rounds_after_early_exit_depend_on_neither_looks_nor_company(
    exit_at: int | None, guidance: float
) -> None:
    """Until the host looks it draws noise for a sequence that has ended: the rounds must not go on from there."""
    halt = halting.Fixed(exit_at) if exit_at else None
    wanted = request(6, steps=12, solver="sde", halt=halt, guidance=guidance)
    expected = write(wanted)
    assert expected.steps == (exit_at or 12) + 6
    company = [request(0, seed=20 + i, steps=3 + 2 * i) for i in range(3)]
    for look_every in (2, 3, 4, 7):
        for others in ([], company):
            engine = Engine(
                FROZEN, PROCESS, slots=4, length=LENGTH, exact=True, look_every=look_every
            )
            found = next(iter(engine.run([wanted, *others])))
            assert torch.equal(found.tokens, expected.tokens), (look_every, len(others))
            assert torch.equal(found.entropy, expected.entropy)
            assert torch.equal(found.x, expected.x)
            assert (found.steps, found.evaluations) == (expected.steps, expected.evaluations)
