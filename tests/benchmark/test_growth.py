"""The cost of a token is measured at the batches that are named, and impossible lists are refused."""

from __future__ import annotations

import pytest

from ddlm.benchmark.growth import measure_growth
from ddlm.benchmark.step import Trainee, own_step
from ddlm.benchmark.timing import turns
from ddlm.cli import main
from ddlm.training.distributed import open_world
from ddlm.types import ConfigError
from training.runs import T, small_config


def test_every_other_round_is_in_reverse() -> None:
    assert [list(order) for order in turns([1, 2, 3], 3)] == [[1, 2, 3], [3, 2, 1], [1, 2, 3]]


def test_a_step_is_of_its_own_batch() -> None:
    """One network serves all batches: each step has to keep its own."""
    config = small_config(batch=4, compile=False)
    world = open_world(config)
    trainee = Trainee.create(config, world)
    small, large = (
        own_step(trainee, config, world),
        own_step(trainee, small_config(batch=12, compile=False), world),
    )
    assert small.run().cross_entropy.shape == (4,)
    assert large.run().cross_entropy.shape == (12,)
    assert small.run().cross_entropy.shape == (4,)
    assert trainee.state.step == 3
    assert large.flops > 2 * small.flops


def test_the_cost_at_every_batch() -> None:
    said: list[str] = []
    growth = measure_growth(
        small_config(batch=7, compile=False), [4, 8, 512], rounds=3, say=said.append
    )
    assert [entry["batch"] for entry in growth] == [4, 8, 512]
    assert growth[0]["relative_to_4"] == 1
    for entry in growth:
        tokens = entry["batch"] * T
        assert entry["seconds_per_token"] == pytest.approx(entry["seconds_per_step"] / tokens)
        assert entry["seconds_per_flop"] == pytest.approx(
            entry["seconds_per_token"] / entry["flops_per_token"]
        )
        assert entry["relative_to_4"] == pytest.approx(
            entry["seconds_per_token"] / growth[0]["seconds_per_token"]
        )
        fastest, slowest = entry["spread"]
        assert 0 < fastest <= entry["seconds_per_step"] <= slowest
    # 128 times the work: neither a step that ignores its batch nor a clock that ignores the step passes
    assert growth[2]["seconds_per_step"] > 2 * growth[0]["seconds_per_step"]
    assert growth[2]["relative_to_4"] < 1  # of a tiny network's step nearly all is overhead
    assert sum("round" in line for line in said) == 3


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    said: list[str] = []
    measure_growth(
        small_config(batch=4, compile=True, device="cpu"), [2, 4], rounds=1, say=said.append
    )
    assert sum("no C++ compiler" in line for line in said) == 1


@pytest.mark.parametrize("batches", [[], [8], [8, 4], [4, 4], [0, 4], [-4, 4]])
def test_a_list_that_does_not_ascend(batches: list[int]) -> None:
    with pytest.raises(ConfigError, match="in ascending order"):
        measure_growth(small_config(compile=False), batches, rounds=1, say=lambda line: None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--growth", "--batches", "64", "32"], "--batches is '64 32'"),
        (["train", "--growth", "--batches", "32"], "two or more"),
        (["train", "--growth", "--batches", "32", "x"], "batches"),
        (["train", "--growth", "--batches", "4", "6", "--train.micro_batch", "4"], "micro_batch=4"),
        (["train", "--batches", "32", "64"], "add --growth"),
        (["train", "--growth", "--rounds", "0"], "--rounds is 0"),
        (["train", "--weights", "/no/such/model"], "--weights is for measuring generation"),
        (["train", "--queue", "512"], "--queue is for measuring generation"),
        (["train", "--exit_steps", "9"], "--exit_steps is for measuring generation"),
        (["train", "--lengths", "16"], "--lengths is for measuring generation"),
        (["sample", "--queue", "0"], "--queue is 0"),
        (["sample", "--exit_steps", "0"], "--exit_steps is 0"),
        (["sample", "--weights", "m", "--model.width", "64"], "--weights m has its own"),
        (["sample", "--weights", "m", "--config", "tiny"], "--weights m has its own"),
        (["sample", "--growth"], "--growth measures training"),
        (["sample", "--processes", "2"], "--processes measures training"),
    ],
)
def test_impossible_arguments_leave_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""  # refused before anything is measured
    assert said.err.count("\n") == 1
    assert expected in said.err
