"""What `ddlm reproduce --list` says of time, against records of measurements and a count by hand."""

import json
from pathlib import Path

import pytest

from ddlm.cli import main
from ddlm.config import load_config
from ddlm.downstream.glue import TASKS
from ddlm.reproduce import costs
from ddlm.reproduce.items import listing
from ddlm.reproduce.recipes import SIZES, find
from ddlm.training.flops import run_flops

ROOT = Path(__file__).resolve().parents[2]


def record(name):
    return json.loads((ROOT / "benchmarks" / name).read_text("utf-8"))["results"]


def test_the_list_has_hours_of_training_and_of_the_rest(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["reproduce", "--list"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.split("\n"))) <= 80
    assert "…" not in shown
    for words in ("nyu-mll/glue", "GFLOP/s", "48 settings and 5 seeds"):
        assert words in shown
    heads, lines = listing("tiny")
    assert heads[3:5] == ["hours of each training", "hours of fine-tuning or sampling"]
    found = {line[0]: dict(zip(heads, line, strict=True)) for line in lines}
    beside = {name: line[heads[4]] for name, line in found.items()}
    assert beside["table1"] == "-"
    assert beside["table6"].startswith("at most ")
    # Nine tasks of 53 runs take far longer than the three trainings before them.
    assert float(beside["table6"].removeprefix("at most ").replace(",", "")) > 1000
    assert float(beside["table2"]) > 1


def test_fine_tuning_is_counted_from_its_tokens():
    """Six operations a parameter of the blocks and a token, and one task and setting after the other."""
    model = load_config("base").model
    width, inner = model.width, model.feed_forward
    blocks = model.layers * (4 * width**2 + 2 * width * inner) + 3 * model.embedding_width * width
    tokens = sum(53 * t.epochs * t.sizes["train"] * costs.TOKENS[t.name] for t in TASKS.values())
    four = 4 * 6 * blocks * tokens / SIZES["base"].rate / 3600
    # Attention and the validation sets come on top.
    assert four < costs.hours(find("table6"), "base") < 1.15 * four
    table7 = costs.hours(find("table7"), "base")
    assert table7 == pytest.approx(costs.hours(find("table6"), "base") / 2)  # two models of four


def test_sampling_is_counted_from_its_steps():
    protocol, model = SIZES["base"].protocol, load_config("base").model
    texts = protocol.prompts * protocol.continuations
    forward = (
        2 * 146e6
    )  # a multiplication and an addition for each parameter, nearly all of which are in products
    steps = 25 + 50 + 100 + 6 * 200 + 500 - 2 * 200  # those that the rows of figure1 allow
    expected = texts * steps * model.length * forward / SIZES["base"].rate / 3600
    assert costs.hours(find("figure1"), "base") == pytest.approx(expected, rel=0.25)
    assert costs.hours(find("table1"), "base") == 0


def test_the_rates_are_those_they_are_said_to_be():
    hours = {"small": (1, 1), "base": (48, 8)}  # and machines
    for scale, (each, machines) in hours.items():
        config = load_config(scale)
        rate = run_flops(config, config.train.steps) / (3600 * each * machines)
        assert SIZES[scale].rate == pytest.approx(rate, rel=0.05)
    model = load_config("tiny").model  # the sizes of ddlm-tiny when it was measured
    tuned = 3 * costs._forward(model, costs.TOKENS["mrpc"], head=False)
    tuning = tuned * record("glue-speed.json")["wall"]["ddlm_tokens_per_second"]
    sampled = record("results-earlier/ddlm-tiny-4k-speed.json")
    seconds = sampled["samplings"][0]["plain"]["seconds"]
    step = sampled["length"] * costs._forward(model, sampled["length"], head=True)
    sampling = 50 * step / seconds
    assert (round(tuning / 1e9), round(sampling / 1e9)) == (23, 37)
    assert tuning < SIZES["tiny"].rate / 2 < sampling
    measured = record("metrics-speed.json")
    seconds = measured["metrics_seconds"] + measured["mauve_seconds"]
    assert seconds == pytest.approx(costs.MEASURING * 5000, rel=0.01)


@pytest.mark.parametrize(
    ("found", "text"), [(0.01, "under 0.1"), (3.14159, "3.1"), (84.4, "84"), (8432.0, "8,400")]
)
def test_hours_have_two_digits(found, text):
    assert costs.shown(found) == text
