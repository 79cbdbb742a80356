"""Several users of one engine, and what is seen of a sequence that has ended before anybody looked."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

import pytest
import torch

from ddlm.network.inference import InferenceDenoiser
from ddlm.sampling import Engine, Progress, Request, Result, halting, make_request
from ddlm.sampling.engine import safe_length
from sampling.models import LENGTH, PROCESS, network

FROZEN = InferenceDenoiser(network())
SLOT = safe_length(LENGTH, torch.device("cpu"))


def request(steps: int, seed: int = 0, **options: object) -> Request:
    tokens = torch.zeros(LENGTH, dtype=torch.int64)
    noised = torch.ones(LENGTH, dtype=torch.bool)
    return make_request(tokens, noised, PROCESS, steps=steps, seed=seed, **options)  # type: ignore[arg-type]


def alone(wanted: Request) -> Result:
    (result,) = Engine(FROZEN, PROCESS, slots=1, length=SLOT).run([wanted])
    return result


def same(a: Result, b: Result) -> None:
    assert (a.steps, a.reason) == (b.steps, b.reason)
    assert torch.equal(a.tokens, b.tokens)


# ---- the caller's modes


@pytest.mark.parametrize("made_in", [False, True])
def test_an_engine_is_driven_in_inference_mode_and_outside(made_in: bool) -> None:
    wanted = [request(4, seed=seed, solver="sde", guidance=2.0) for seed in range(4)]
    first, *others = [alone(r) for r in wanted]
    with torch.inference_mode(made_in):
        engine = Engine(FROZEN, PROCESS, slots=2, length=SLOT)
        run = engine.run(wanted)
        same(next(run), first)
        assert torch.is_inference_mode_enabled() is made_in
    for got, expected in zip(run, others, strict=True):
        same(got, expected)
    with torch.inference_mode(not made_in):
        same(next(engine.run(wanted)), first)
    same(next(engine.run(wanted)), first)
    assert torch.is_grad_enabled()


# ---- looking seldom


def test_progress_ends_where_the_sequence_ended() -> None:
    engine = Engine(FROZEN, PROCESS, slots=2, length=SLOT, look_every=4)
    *states, last = engine.stream(request(20, halt=halting.Fixed(5)))
    assert [s.step for s in states if isinstance(s, Progress)] == [1, 2, 3, 4, 5]
    assert isinstance(last, Result)
    assert last.steps == 5


def test_cancelling_what_has_ended_counts_no_steps_that_were_not_made() -> None:
    engine = Engine(FROZEN, PROCESS, slots=2, length=SLOT, look_every=10)
    key = engine.submit(request(20, halt=halting.Fixed(5), trace=True))
    for _ in range(7):
        assert engine.step() == []
    progress = engine.poll(key)
    assert progress is not None
    assert progress.step == 5
    engine.cancel(key)
    (result,) = engine.step()
    assert (result.steps, result.reason) == (5, "cancelled")
    assert result.trace is not None
    assert len(result.trace.times) == 5


# ---- taking turns


@pytest.fixture
def bounded() -> Iterator[None]:
    """Ends a turn that never ends."""

    def stop(*_: object) -> NoReturn:
        raise TimeoutError("a stream waits for what it will never get")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("bounded")
def test_streams_that_take_turns_both_see_every_step_and_their_own_end() -> None:
    engine = Engine(FROZEN, PROCESS, slots=2, length=SLOT)
    wanted = [request(8, seed=1), request(5, seed=2)]
    streams = [engine.stream(r) for r in wanted]
    seen: list[list[Progress | Result]] = [[], []]
    while any(not s or isinstance(s[-1], Progress) for s in seen):
        for stream, events in zip(streams, seen, strict=True):
            if not events or isinstance(events[-1], Progress):
                events.append(next(stream))
    for events, asked in zip(seen, wanted, strict=True):
        *states, last = events
        steps = [s.step for s in states if isinstance(s, Progress)]
        assert steps == sorted(set(steps))
        assert isinstance(last, Result)
        same(last, alone(asked))
    assert [s.step for s in seen[0] if isinstance(s, Progress)] == list(range(1, 8))
    assert engine.ticks <= 9  # they share the evaluations
    assert not engine.busy


@pytest.mark.usefixtures("bounded")
def test_a_stream_goes_on_beside_a_run_and_beside_steps() -> None:
    engine = Engine(FROZEN, PROCESS, slots=2, length=SLOT)
    long, short = request(12, seed=1), request(3, seed=2)
    stream = engine.stream(long)
    assert isinstance(next(stream), Progress)
    key = engine.submit(request(3, seed=5))
    runs = [engine.run([request(3, seed=s) for s in (2, 3, 4)]) for _ in range(2)]
    firsts = [next(run) for run in runs]
    for first in firsts:
        same(first, alone(short))
    (submitted,) = engine.step()  # what nobody else has asked for is still there
    assert submitted.id == key
    assert [len(list(run)) for run in runs] == [2, 2]
    *_, last = stream
    assert isinstance(last, Result)
    same(last, alone(long))
    assert not engine.busy
    assert engine.step() == []


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("steps", [4, 12])
def test_a_stream_that_is_given_up_leaves_nothing(steps: int) -> None:
    engine = Engine(FROZEN, PROCESS, slots=2, length=SLOT)
    first, second = engine.stream(request(9, seed=1)), engine.stream(request(steps, seed=2))
    assert isinstance(next(first), Progress)
    assert isinstance(next(second), Progress)
    first.close()
    *_, last = second
    assert isinstance(last, Result)
    same(last, alone(request(steps, seed=2)))
    assert not engine.busy
    assert engine.step() == []
    assert engine.ticks == steps + 1  # and nothing was computed for it


@pytest.mark.usefixtures("bounded")
def test_a_run_that_is_given_up_leaves_nothing() -> None:
    engine = Engine(FROZEN, PROCESS, slots=2, length=SLOT)
    key = engine.submit(request(12, seed=7))
    run = engine.run([request(n, seed=n) for n in (3, 9, 2, 9, 9)])
    same(next(run), alone(request(3, seed=3)))
    run.close()
    left = []
    while engine.busy:
        left += engine.step()
    assert [r.id for r in left] == [key]
    same(left[0], alone(request(12, seed=7)))


@pytest.mark.usefixtures("bounded")
def test_a_stream_may_be_collected_while_the_engine_is_busy_with_its_queue() -> None:
    """Python collects what is left in a cycle whenever it likes, in whatever thread."""
    engine = Engine(FROZEN, PROCESS, slots=2, length=SLOT)
    stream = engine.stream(request(4))
    next(stream)
    with engine._lock:
        stream.close()
    assert engine.step() == []
    assert not engine.busy


@pytest.mark.usefixtures("bounded")
def test_nobody_waits_for_results_that_a_stream_keeps() -> None:
    engine = Engine(FROZEN, PROCESS, slots=2, length=SLOT)
    stream = engine.stream(request(4))
    next(stream)
    while engine.busy:
        assert engine.step() == []
    assert isinstance(next(stream), Result)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("ticks", range(6))
def test_a_cancelled_request_counts_what_was_evaluated(ticks: int, guidance: float) -> None:
    """Heun may be given up between the two evaluations of a step."""
    engine = Engine(FROZEN, PROCESS, slots=1, length=SLOT)
    key = engine.submit(request(9, solver="heun", guidance=guidance))
    for _ in range(ticks):
        assert engine.step() == []
    engine.cancel(key)
    (result,) = engine.step()
    assert (result.reason, result.steps) == ("cancelled", (ticks + 1) // 2)
    assert result.evaluations == ticks * (1 if guidance == 1.0 else 2)


def test_a_result_that_another_thread_adds_meanwhile_is_kept() -> None:
    engine = Engine(FROZEN, PROCESS, slots=1, length=LENGTH)
    given = make_request(
        torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool), PROCESS, steps=2
    )
    other: list[threading.Thread] = []

    class Slow(list[Result]):
        def __iter__(self) -> Iterator[Result]:  # the other thread comes while the list is read
            other.append(threading.Thread(target=engine.submit, args=(given,)))
            other[-1].start()
            other[-1].join(0.2)
            return super().__iter__()

    engine._finished = Slow()
    engine._drop_cancelled()
    for thread in other:
        thread.join()
    assert len(engine.step()) == 1
