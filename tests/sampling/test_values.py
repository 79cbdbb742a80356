"""What Python callers naturally pass: numbers of numpy and torch, arrays of times, and what is none of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ddlm.diffusion.process import NoiseProcess
from ddlm.lm import DiffusionLM, load
from ddlm.network.inference import InferenceDenoiser
from ddlm.sampling import Engine, Progress, Request, halting, make_request, sample
from ddlm.sampling.solvers import Ancestral, Euler, Heun
from ddlm.sampling.template import Template, from_tokens, parse
from ddlm.types import ConfigError
from sampling.models import LENGTH, PROCESS, VOCAB, network, write_model

FROZEN = InferenceDenoiser(network())


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> DiffusionLM:
    return load(write_model(tmp_path_factory.mktemp("model")))


def test_a_later_text_outside_the_vocabulary_is_told_at_the_call(lm: DiffusionLM) -> None:
    first = parse("the {4}", lm.tokenizer)
    far = Template("far", torch.tensor([300, 0]), torch.tensor([False, True]))
    with pytest.raises(ConfigError, match="token 300 is outside the vocabulary of 300"):
        lm.iterate([first, far], steps=2)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"seed": 1.0}, "seed=1.0 was given, it must be a whole number"),
        ({"seeds": [1, 2.5]}, "seed=2.5 was given, it must be a whole number"),
        ({"seeds": torch.tensor([0.0, 1.0])}, "it must be a whole number"),
        ({"samples": "2"}, "samples='2' was given"),
        ({"slots": 2.0}, "slots=2.0 was given"),
        ({"overlap": 2.0}, "overlap=2.0 was given, it must be a whole number"),
        ({"steps": 3.0}, "steps=3.0 was given, it must be a whole number"),
        ({"halt": ["patience:3"]}, "it must be a halting criterion"),
        ({"seed": 10**5000}, "seed was given as a number of 16610 bits, at most 128 can be"),
        ({"seeds": 5}, "seeds=5 was given, it must hold whole numbers, as a list does"),
        ({"samples": True}, "samples=True was given, it must be a whole number"),
    ],
)
def test_what_is_no_whole_number_or_criterion_is_told_at_the_call(
    lm: DiffusionLM, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        lm.iterate(["{3}", "{4}"], **options)
    assert said in str(error.value)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_seeds_are_whole_numbers_of_any_library(
    lm: DiffusionLM, kind: Callable[[list[int]], Any]
) -> None:
    plain = list(lm.iterate("the {8}", samples=2, steps=3, seeds=[7, 5]))
    assert [t.seed for t in plain] == [7, 5]
    given = kind([7, 5])
    assert list(lm.iterate("the {8}", samples=2, steps=3, seeds=given)) == plain
    (one,) = lm.generate("the {8}", steps=3, seed=given[0])
    assert one == plain[0]
    assert type(one.seed) is int
    asked = lm.request("the {8}", steps=3, seed=given[1])
    assert type(asked.seed) is int
    (result,) = lm.engine(slots=1, length=16).run([asked])
    assert result.tokens.tolist() == plain[1].tokens


TIMES = [13.0, 5.0, 0.7]


def request(**options: Any) -> Request:
    return make_request(torch.zeros(4), torch.ones(4), NoiseProcess(0.7, 13.0), **options)


@pytest.mark.parametrize(
    "times",
    [TIMES, np.array(TIMES), np.array(TIMES[::-1])[::-1], torch.tensor(TIMES, dtype=torch.float64)],
)
def test_times_may_come_in_any_container(times: Any) -> None:
    assert request(grid_name=times).times.tolist() == TIMES


@pytest.mark.parametrize(
    "options, said",
    [
        ({"grid_name": 3}, "grid=3 was given: choose one of uniform, karras, warp, or give times"),
        ({"grid_name": ["13", "late"]}, "or give times"),
        ({"grid_name": np.ones((2, 2))}, "or give times"),
        ({"grid_name": []}, "n >= 1 is needed"),
        ({"steps": 3.0}, "steps=3.0 was given, it must be a whole number"),
        ({"steps": "3"}, "steps='3' was given, it must be a whole number"),
        ({"top_k": 1.5}, "top_k=1.5 was given"),
        ({"refine": None}, "refine=None was given"),
        ({"temperature": "0.5"}, "temperature='0.5' was given, it must be a number"),
        ({"temperature": 1e39}, "it must be between 0.001 and 1e+38"),
        ({"guidance": [2.0, 3.0]}, "guidance=[2.0, 3.0] was given, it must be a number"),
        # what would make a state of infinities and a text of token 0
        ({"guidance": -1e7}, "it must be between -1e+06 and 1e+06"),
        ({"noise_scale": 1e7}, "it must be between 0 and 1e+06"),
        ({"grid_name": [5.0, 1e-20]}, "its times must be between 1e-10 and 1e+10"),
        ({"grid_name": itertools.count(1)}, "a time grid has more than 1000000 times"),
        ({"grid_name": torch.tensor([5 + 1j])}, "or give times"),
        ({"grid_name": b"uniform"}, "grid=b'uniform' was given: choose one of uniform"),
        ({"grid_name": "karras", "rho": "7"}, "rho='7' was given, it must be a number"),
        ({"top_k": True}, "top_k=True was given, it must be a whole number"),
        ({"temperature": True}, "temperature=True was given, it must be a number"),
        ({"guidance": 10**400}, "guidance was given as a number beyond any float"),
        ({"noise_scale": torch.ones(2)}, "it must be a number"),
        ({"solver": Heun}, "it must be one of euler, heun, dpmpp_2m, sde, or a solver"),
        ({"solver": None}, "solver=None was given"),
    ],
)
def test_what_is_no_grid_no_number_and_no_solver_is_refused(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        request(**options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, np.array])
def test_numbers_of_any_library_shape_a_text(lm: DiffusionLM, kind: Callable[[float], Any]) -> None:
    numbers: dict[str, Any] = {"temperature": 0.5, "guidance": 2.0, "noise_scale": 0.75}
    given = {name: kind(value) for name, value in numbers.items()}
    assert lm.generate("the {8}", steps=3, **given) == lm.generate("the {8}", steps=3, **numbers)
    asked = request(**given)
    assert {name: getattr(asked, name) for name in numbers} == numbers
    assert {type(getattr(asked, name)) for name in numbers} == {float}


@pytest.mark.parametrize("template", [None, 5, b"the {8}", [None], ["the {8}", 5]])
def test_what_is_no_template_is_told_at_the_call(lm: DiffusionLM, template: Any) -> None:
    with pytest.raises(ConfigError, match=r"was given, it must be text such as 'The river \{32\}'"):
        lm.iterate(template, steps=3)


def test_of_very_many_texts_the_first_may_be_taken(lm: DiffusionLM) -> None:
    texts = lm.iterate("the {8}", samples=2**40, steps=2, slots=2)
    assert next(texts) == lm.generate("the {8}", steps=2)[0]
    with pytest.raises(ConfigError, match="seeds from 5 to 9223372036854775808 were asked for"):
        lm.iterate("the {8}", samples=2**63 - 4, seed=5)


def test_all_at_once_takes_the_seeds_of_one_by_one(lm: DiffusionLM) -> None:
    whole = lm.generate("the {8}", samples=2, steps=3, seeds=[7, 5])
    assert whole == list(lm.iterate("the {8}", samples=2, steps=3, seeds=[7, 5]))


@pytest.mark.parametrize("times", [iter([5.0, 1.0, 0.5]), (t for t in (5.0, 1.0, 0.5))])
def test_times_of_an_iterator_serve_every_text(lm: DiffusionLM, times: Any) -> None:
    whole = lm.generate("the {8}", samples=2, grid=[5.0, 1.0, 0.5])
    assert lm.generate("the {8}", samples=2, grid=times) == whole


def test_times_stay_what_they_were_at_the_call(lm: DiffusionLM) -> None:
    times = torch.tensor([5.0, 1.0, 0.5], dtype=torch.float64)
    texts = lm.iterate("the {8}", samples=2, grid=times)
    whole = lm.generate("the {8}", samples=2, grid=times)
    times[1] = 4.0
    assert list(texts) == whole


# ---- tokens and where they are to be generated


@pytest.mark.parametrize("refine", [0, 3])
@pytest.mark.parametrize("there", [-1, VOCAB, 7, float("nan")])
def test_whatever_stands_where_a_token_is_to_be_generated_changes_nothing(
    there: float, refine: int
) -> None:
    noised = torch.arange(12) % 3 > 0
    given = torch.arange(12).double()
    options: dict[str, Any] = {"steps": 4, "solver": "sde", "guidance": 2.0, "refine": refine}
    plain, other = (
        next(Engine(FROZEN, PROCESS, slots=1, length=16).run([wanted]))
        for wanted in (
            make_request(given.long().masked_fill(noised, 0), noised, PROCESS, **options),
            make_request(given.masked_fill(noised, there), noised, PROCESS, **options),
        )
    )
    assert torch.equal(plain.tokens, other.tokens)
    assert torch.equal(plain.x, other.x)


def test_a_request_that_never_began_ends_with_tokens_that_are_there() -> None:
    engine = Engine(FROZEN, PROCESS, slots=1, length=8)
    key = engine.submit(make_request([-1, 5], [True, False], PROCESS))
    engine.cancel(key)
    (result,) = engine.step()
    assert (result.tokens.tolist(), result.last) == ([0, 5], None)


@pytest.mark.parametrize(
    "tokens, noised, said",
    [
        ([0, 1], [True], r"tokens \(2,\) and is_noised \(1,\) were given, both must be \(T,\)"),
        ([], [], "with T >= 1"),
        ([[0]], [[True]], "with T >= 1"),
        ([0, 1], [0, 2], "is_noised holds 2, it must be True"),
        ([0, 1], [0.0, float("nan")], "is_noised holds nan, it must be True"),
        ([0.0, 1.5], [1, 0], "tokens hold 1.5, each must be a whole number"),
        ([0.0, float("nan")], [1, 0], "tokens hold nan, each must be a whole number"),
        ("the", [True], "both must be tensors, arrays or lists"),
        (None, None, "both must be tensors, arrays or lists"),
    ],
)
def test_what_is_no_sequence_is_one_line(tokens: Any, noised: Any, said: str) -> None:
    for make in (
        lambda: make_request(tokens, noised, PROCESS),
        lambda: Request(tokens, noised, torch.tensor([5.0]), Euler()),
        lambda: Template("", tokens, noised),
    ):
        with pytest.raises(ConfigError, match=said) as error:
            make()
        assert "\n" not in str(error.value)


def test_a_request_and_a_batch_take_lists_and_names() -> None:
    plain = make_request(torch.zeros(4), torch.ones(4), PROCESS, steps=2, halt="fixed:1")
    made = Request([0] * 4, [True] * 4, [5.0, 0.5], "euler", "fixed:1")  # type: ignore[arg-type]
    found = list(Engine(FROZEN, PROCESS, slots=2, length=8).run([plain, made]))
    assert torch.equal(found[0].tokens, found[1].tokens)
    options: dict[str, Any] = {"steps": 2}
    whole = sample(FROZEN, torch.zeros(2, 4).long(), torch.ones(2, 4).bool(), PROCESS, **options)
    zeros, ones = np.zeros((2, 4), dtype=int), [[True] * 4] * 2
    listed = sample(FROZEN, zeros, ones, PROCESS, grid=iter([5.0, 0.5]))  # type: ignore[arg-type]
    assert torch.equal(whole.tokens, listed.tokens)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Engine(FROZEN, PROCESS, slots=2.5), "slots=2.5 was given"),  # type: ignore[arg-type]
        (lambda: Engine(FROZEN, PROCESS, length=float("nan")), "length=nan was given"),  # type: ignore[arg-type]
        (lambda: Engine(FROZEN, PROCESS, look_every=True), "look_every=True was given"),
        (lambda: batch(slots=0), "slots=0 was given, an engine needs at least 1"),
        (lambda: batch(slots="4"), "slots='4' was given, it must be a whole number"),
        (lambda: batch(generator=3), "generator=3 was given, write torch.Generator"),
        (lambda: Ancestral("much"), "eta='much' was given, it must be a number"),  # type: ignore[arg-type]
        (lambda: halting.EntropyBelow("low"), "nats='low' was given"),  # type: ignore[arg-type]
        (lambda: halting.KLBelow(0.0), "a KL threshold of 0 nats was given"),
        (lambda: halting.Patience(1, freeze="no"), "freeze='no' was given"),  # type: ignore[arg-type]
        (lambda: halting.Any(("fixed:1",)), "several halting criteria are needed"),  # type: ignore[arg-type]
        (lambda: halting.Any(halting.Fixed(1)), "several halting criteria are needed"),  # type: ignore[arg-type]
        (lambda: from_tokens([1], 1.5), "generate=1.5 was given"),  # type: ignore[arg-type]
        (lambda: from_tokens([1.5], 1), "tokens hold 1.5"),  # type: ignore[list-item]
    ],
)
def test_other_values_that_are_none(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert said in str(error.value)


def batch(**options: Any) -> object:
    return sample(FROZEN, torch.zeros(1, 4).long(), torch.ones(1, 4).bool(), PROCESS, **options)


@pytest.mark.parametrize("length", [0, -1, 2.0])
def test_an_engine_of_no_length_is_refused(lm: DiffusionLM, length: Any) -> None:
    with pytest.raises(ConfigError, match=f"length={length} was given"):
        lm.engine(length=length)


def test_the_farthest_settings_leave_numbers() -> None:
    tokens, noised = torch.zeros(LENGTH), torch.arange(LENGTH) > 3
    extremes: list[dict[str, Any]] = [
        {"noise_scale": 1e6, "grid_name": [1e10, 1e-10]},
        {"guidance": 1e6, "grid_name": [1e10, 1e-10]},
        {"guidance": -1e6, "solver": "heun"},
        {"temperature": 1e38, "solver": "dpmpp_2m"},
        {"temperature": 1e-3, "solver": "sde"},
    ]
    wanted = [make_request(tokens, noised, PROCESS, **({"steps": 3} | e)) for e in extremes]
    for result in Engine(FROZEN, PROCESS, slots=5, length=32).run(wanted):
        assert bool(torch.isfinite(result.x).all())
        assert bool(torch.isfinite(result.entropy).all())


# ---- the last of what is reported


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"steps": 3, "refine": 2},
        {"steps": 3, "solver": "heun"},
        {"steps": 9, "halt": "patience:1:freeze"},
    ],
)
def test_what_is_reported_last_is_the_text(lm: DiffusionLM, options: dict[str, Any]) -> None:
    states: dict[int, list[Progress]] = {}
    texts = lm.generate(
        ["the {8}", "{5} sea"],
        samples=2,
        slots=3,
        on_progress=lambda number, state: states.setdefault(number, []).append(state),
        **options,
    )
    assert sorted(states) == [0, 1, 2, 3]
    for number, text in enumerate(texts):
        last = states[number][-1]
        assert (last.tokens.tolist(), last.step) == (text.tokens, text.steps)
        steps = [state.step for state in states[number]]
        assert steps == sorted(steps)
        assert bool((last.stable[last.is_noised] <= last.step).all())


def test_of_a_long_text_every_window_is_reported_to_its_end(lm: DiffusionLM) -> None:
    tails: list[list[int]] = []
    (text,) = lm.generate(
        "{60}",
        steps=2,
        overlap=0,
        on_progress=lambda _, state: (
            tails.append(state.tokens.tolist()) if state.step == 2 else None
        ),
    )
    assert tails[0] == text.tokens[:32]
    assert tails[-1] == text.tokens[-32:]
