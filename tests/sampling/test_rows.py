"""Which rows and positions the engine computes, so that a sequence's bits do not depend on its company."""

from __future__ import annotations

from inspect import Parameter, Signature

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddlm.network.inference import InferenceDenoiser
from ddlm.network.layers import attend
from ddlm.sampling import Engine, Request, halting, make_request, sample, slots
from ddlm.sampling.engine import safe_length
from ddlm.sampling.jobs import Schedule
from ddlm.sampling.trace import KL_STRIDE, kl_eighth
from ddlm.types import Posterior
from sampling.models import LENGTH, PROCESS, network

FROZEN = InferenceDenoiser(network())
CPU = torch.device("cpu")


def request(seed: int = 0, **options: object) -> Request:
    tokens, noised = torch.zeros(LENGTH).long(), torch.ones(LENGTH, dtype=torch.bool)
    return make_request(tokens, noised, PROCESS, steps=5, seed=seed, **options)  # type: ignore[arg-type]


# ---- padding


def padded_attention(given: tuple[Tensor, ...], length: int, *, short: bool = True) -> Tensor:
    n = given[0].shape[2]
    q, k, v = (F.pad(x, (0, 0, 0, length - n)) for x in given)
    mask = None if length == n else (torch.arange(length) < n)[None, None, None]
    return attend(q, k, v, mask, short)[:, :, :n]


def random_heads(n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    return tuple(torch.randn(1, 2, n, 16, generator=generator).to(dtype) for _ in range(3))


@pytest.mark.parametrize("n", [13, 100, 150, 191, 200, 256, 300, 400, 700])
def test_attention_has_the_same_bits_at_every_safe_length(n: int) -> None:
    given = random_heads(n)
    first = padded_attention(given, safe_length(n, CPU))
    for longer in (n + 40, n + 90, 384, 512, 1000):
        if longer > n:
            assert torch.equal(padded_attention(given, safe_length(longer, CPU)), first), longer


@pytest.mark.parametrize("most", [64, 256, 320, 512, 720])
def test_a_model_keeps_its_length_and_shorter_engines_give_its_bits(most: int) -> None:
    assert safe_length(most, CPU, most) == most  # no position more than the model has
    for n in range(10, most, 90):
        given = random_heads(n)
        whole = padded_attention(given, most)
        assert torch.equal(padded_attention(given, safe_length(n, CPU, most)), whole), n


def test_padding_does_not_choose_the_kernel_of_bfloat16() -> None:
    """A model whose sequences are longer than the limit takes one path for all of them."""
    from dataclasses import replace

    from ddlm.network.denoiser import DDLM

    config = replace(network().config, length=400)
    blocks = DDLM(config, PROCESS).transformer.blocks
    assert not any(block.attention.is_short for block in blocks)
    assert all(block.attention.is_short for block in network().transformer.blocks)
    given = random_heads(150, torch.bfloat16)
    paths = [padded_attention(given, length, short=False) for length in (160, 400)]
    assert torch.equal(*paths)
    assert not torch.equal(padded_attention(given, 160), paths[0])  # the other path is another


# ---- rows


class Counting:
    """Passes on to a network and notes how many rows each call has."""

    def __init__(self, inner: InferenceDenoiser) -> None:
        self.inner = inner
        self.rows: set[int] = set()
        self.compared: set[int] = set()

    def embeddings(self) -> Tensor:
        return self.inner.embeddings()

    def __call__(self, xt: Tensor, *args: object, **options: object) -> Posterior:
        self.rows.add(xt.shape[0])
        return self.inner(xt, *args, **options)  # type: ignore[arg-type]

    def divergence(
        self, new: Posterior, old: Posterior, temperature: Tensor | None = None
    ) -> Tensor:
        self.compared.add(new.tokens.numel())
        return self.inner.divergence(new, old, temperature)


@pytest.mark.parametrize("trace", [False, True])
def test_an_empty_batch_has_an_empty_result(trace: bool) -> None:
    model = network()
    tokens = torch.zeros(0, 4, dtype=torch.int64)
    out = sample(InferenceDenoiser(model), tokens, tokens.bool(), PROCESS, steps=3, trace=trace)
    one = sample(
        InferenceDenoiser(model),
        torch.zeros(1, 4).long(),
        torch.ones(1, 4).bool(),
        PROCESS,
        steps=3,
    )
    for name in ("tokens", "steps", "x"):
        empty, usual = getattr(out, name), getattr(one, name)
        assert (empty.shape, empty.dtype) == ((0, *usual.shape[1:]), usual.dtype), name
    assert (out.reasons, out.trace) == ([], [] if trace else None)


def test_an_exact_engine_computes_the_same_number_of_rows_whoever_is_there() -> None:
    counting = Counting(FROZEN)
    engine = Engine(counting, PROCESS, slots=4, length=LENGTH, exact=True)
    wanted = [
        request(1, guidance=2.0),
        request(2, halt=halting.KLBelow(0.02)),
        request(3, trace=True),
        request(4, guidance=0.5, trace=True, temperature=0.7),
        request(5, halt=halting.KLBelow(0.1), trace=True),
        request(6),
    ]
    together = list(engine.run(wanted))
    assert counting.rows == {4}
    assert counting.compared == {4 * LENGTH, 4 * LENGTH // KL_STRIDE}
    for asked, result in zip(wanted, together, strict=True):
        (alone,) = Engine(FROZEN, PROCESS, slots=4, length=LENGTH).run([asked])
        assert torch.equal(alone.x, result.x)
        assert (alone.steps, alone.reason) == (result.steps, result.reason)


def test_indices_are_made_once_for_a_set_of_requests() -> None:
    """A fresh index every tick would make the host wait for a GPU every tick."""
    engine = Engine(FROZEN, PROCESS, slots=3, length=LENGTH)
    for seed in range(2):
        engine.submit(request(seed, guidance=2.0, halt=halting.KLBelow(1e-30), trace=True))
    engine.step()
    schedule = engine._schedule
    assert isinstance(schedule, Schedule)
    first, second = (schedule.needs(schedule.rows(tick)) for tick in (1, 2))
    assert first.guided is second.guided is not None
    assert first.kl[0] is second.kl[0]
    engine.step()
    assert engine._schedule is schedule  # nobody came or went
    engine.cancel(0)
    engine.step()
    assert engine._schedule is not schedule


@pytest.mark.parametrize("length", [5, 12, 16])
def test_the_rotating_eighth(length: int) -> None:
    slots = 4
    for look in range(1, 10):
        rows, looks = torch.tensor([0, 3]), torch.tensor([look, look + 3])
        found = kl_eighth(rows, looks, length, nowhere=slots * length)
        assert len(found) == 2 * -(-length // KL_STRIDE)
        due = [
            s * length + i
            for s, k in ((0, look), (3, look + 3))
            for i in range(length)
            if (i - k) % KL_STRIDE == 0
        ]
        assert found[found < slots * length].tolist() == due


# ---- compiling


def test_a_compiled_engine_has_rows_for_nobody_too() -> None:
    engine = Engine(FROZEN, PROCESS, slots=64, length=LENGTH, compile=True)
    assert [engine._rows(n) for n in (0, 1, 4, 5, 16, 17, 64, 900)] == [1, 1, 4, 16, 16, 64, 64, 64]


def texts(engine: Engine, wanted: list[Request]) -> list[tuple[list[int], int, str]]:
    return [(r.tokens.tolist(), r.steps, r.reason) for r in engine.run(wanted)]


@pytest.mark.slow
def test_a_compiled_engine_writes_what_the_plain_one_writes() -> None:
    """With the real compiler; also once the queue is empty, and after a text was given up."""
    from torch._dynamo.utils import counters

    from ddlm.device import can_compile

    if not can_compile(CPU):
        pytest.skip("no C++ compiler was found")
    counters.clear()
    plain, compiled = (
        Engine(FROZEN, PROCESS, slots=4, length=LENGTH, compile=c) for c in (False, True)
    )
    wanted = [request(i) for i in range(6)]  # four, then two in as many rows
    assert texts(compiled, wanted) == texts(plain, wanted)
    given_up, *kept = [compiled.submit(request(i)) for i in range(9, 12)]
    compiled.step()
    compiled.cancel(given_up)
    ended = compiled.step()
    assert [(r.id, r.reason) for r in ended] == [(given_up, "cancelled")]
    while compiled.busy:
        ended += compiled.step()
    beside = [r.tokens.tolist() for r in ended if r.id in kept]
    assert beside == [tokens for tokens, *_ in texts(plain, [request(10), request(11)])]
    mixed = [
        request(1, halt=halting.KLBelow(0.02), temperature=0.8),
        request(2, guidance=2.0, trace=True),
        request(3, halt=halting.Patience(2)),
        request(4, refine=3),
    ]
    assert texts(compiled, mixed) == texts(plain, mixed)
    assert not counters["graph_break"], "a part of the step is not compiled"


@pytest.mark.parametrize(
    "known",
    [(), ("recompile_limit",), ("recompile_limit", "isolate_recompiles")],
    ids=["2.10", "2.12", "2.13"],
)
def test_each_torch_is_asked_for_what_its_compile_knows(
    known: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {}

    parameters = [
        Parameter(x, Parameter.KEYWORD_ONLY, default=None) for x in ("model", "dynamic", *known)
    ]
    fake = lambda model, **options: given.update(options)  # noqa: E731
    fake.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "compile", fake)
    with torch._dynamo.config.patch(cache_size_limit=8):
        slots.compiled()
        limit = torch._dynamo.config.cache_size_limit
    assert set(given) == {"dynamic", *known}
    assert limit == (8 if known else 64)
