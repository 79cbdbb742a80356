"""Steps by graphs, with a capture that needs no GPU: the same work on the same tensors, done anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ddlm.benchmark.cases import warm_up
from ddlm.network.inference import InferenceDenoiser
from ddlm.sampling import Request, Result, graphs, halting, make_request
from ddlm.sampling.engine import Engine
from ddlm.sampling.graphs import EAGER, Graphs, sizes
from ddlm.sampling.slots import advance
from sampling.models import LENGTH, PROCESS, network, one_of_everything

FROZEN = InferenceDenoiser(network())


def repeat(rehearse: Callable[[], object], work: Callable[[], None]) -> Callable[[], None]:
    rehearse()
    return work


def refuse(rehearse: Callable[[], object], work: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def request(seed: int, length: int = LENGTH, **options: Any) -> Request:
    noised = torch.ones(length, dtype=torch.bool)
    noised[: seed % 3] = False
    return make_request(torch.zeros(length).long(), noised, PROCESS, steps=9, seed=seed, **options)


def mixture() -> list[Request]:
    return [*one_of_everything(request), *(request(i) for i in range(10, 20))]


def written(step: Any = None, wanted: list[Request] | None = None, **options: Any) -> list[Result]:
    engine = Engine(FROZEN, PROCESS, slots=3, length=LENGTH, **options)
    engine._advance = step or engine._advance
    return list(engine.run(mixture() if wanted is None else wanted))


def same(found: list[Result], wanted: list[Result]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a.steps, a.reason, a.evaluations) == (b.steps, b.reason, b.evaluations)
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.entropy, b.entropy)
        assert (a.trace is None) == (b.trace is None)


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"exact": True, "look_every": 4}])
def test_graphs_change_no_result(options: dict[str, Any]) -> None:
    step = Graphs(advance, repeat)
    same(written(step, **options), written(**options))
    assert step.failed is None
    assert len(step._recorded) > 1


def test_a_graph_is_recorded_once_it_is_worth_it() -> None:
    recorded = []

    def noting(rehearse: Callable[[], object], work: Callable[[], None]) -> Callable[[], None]:
        recorded.append(work)
        return repeat(rehearse, work)

    engine = Engine(FROZEN, PROCESS, slots=2, length=LENGTH, exact=True)
    engine._advance = Graphs(advance, noting)
    for seed in (0, 3):
        engine.submit(request(seed))
    for tick in range(1, 9):
        before = engine._state.x
        engine.step()
        assert len(recorded) == (tick > EAGER)
        assert (engine._state.x is before) == (tick > EAGER + 1)  # the state stays where it is


def test_a_queue_that_drains_takes_few_graphs() -> None:
    """And a second one none: a capture costs as much as dozens of steps."""
    captured = []

    def noting(rehearse: Callable[[], object], work: Callable[[], None]) -> Callable[[], None]:
        captured.append(engine._state.x.shape[0])
        return repeat(rehearse, work)

    def exits() -> list[Request]:
        return [request(i, halt=halting.Fixed(1 + i % 9)) for i in range(40)]

    engine = Engine(FROZEN, PROCESS, slots=16, length=LENGTH, look_every=4)
    engine.sizes = sizes(16)
    step = engine._advance = Graphs(advance, noting)
    first = list(engine.run(exits()))
    assert set(captured) <= {16, 12, 8, 4, 2}
    assert len(captured) == len(set(captured)) == len(step._recorded) > 1
    for n in engine.sizes:  # as a benchmark warms up
        warm_up(engine, [request(i) for i in range(n)])
    assert sorted(captured, reverse=True) == list(engine.sizes)
    same(list(engine.run(exits())), first)
    assert len(captured) == len(engine.sizes)
    same(first, list(Engine(FROZEN, PROCESS, slots=16, length=LENGTH).run(exits())))


def test_rows_have_few_sizes() -> None:
    assert sizes(64) == (64, 48, 32, 16, 8)
    assert sizes(64, compile=True) == (64, 16, 4, 1)
    assert [sizes(n) for n in (1, 2, 3)] == [(1,), (2, 1), (3, 2, 1)]


def test_no_more_graphs_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    step = Graphs(advance, repeat)
    same(written(step), written())
    assert len(step._recorded) == 1


def test_a_refused_graph_is_told_and_done_without() -> None:
    step = Graphs(advance, refuse)
    with pytest.warns(RuntimeWarning, match="no CUDA graph could be made .operation not") as told:
        same(written(step), written())
    assert len(told) == 1
    assert step.failed == "operation not permitted when stream is capturing"


def test_what_changes_from_look_to_look_is_no_graph() -> None:
    for options in ({"guidance": 2.0}, {"trace": True}, {"halt": halting.KLBelow(0.01)}):
        step = Graphs(advance, repeat)
        wanted = [request(1, **options)]  # type: ignore[arg-type]
        same(written(step, wanted), written(None, wanted))
        assert not step._recorded


def test_a_plain_step_of_the_cpu_is_left_alone() -> None:
    engine = Engine(FROZEN, PROCESS, slots=2, length=LENGTH, graphs=True)
    assert engine._advance is advance
    assert isinstance(engine._state.x, Tensor)
