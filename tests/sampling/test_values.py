"""What Python callers naturally pass: numbers of numpy and torch, arrays of times, and what is none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ddlm.diffusion.process import NoiseProcess
from ddlm.lm import DiffusionLM, load
from ddlm.sampling import Request, make_request
from ddlm.sampling.solvers import Heun
from ddlm.sampling.template import Template, parse
from ddlm.types import ConfigError
from sampling.models import write_model


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
        ({"guidance": -1e39}, "it must be between -1e+38 and 1e+38"),
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


def test_all_at_once_takes_the_seeds_of_one_by_one(lm: DiffusionLM) -> None:
    whole = lm.generate("the {8}", samples=2, steps=3, seeds=[7, 5])
    assert whole == list(lm.iterate("the {8}", samples=2, steps=3, seeds=[7, 5]))
