"""What torchrun says in the environment is read in one way, and half of it is one line."""

from __future__ import annotations

import pytest

from ddlm.bulk import Process
from ddlm.cli import main
from ddlm.launch import Launch, read_launch
from ddlm.types import ConfigError

WHOLE = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "::1",
    "MASTER_PORT": "1",
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)


def announce(monkeypatch: pytest.MonkeyPatch, **changed: str) -> None:
    for name, value in (WHOLE | changed).items():
        monkeypatch.setenv(name, value)


def test_a_process_on_its_own() -> None:
    assert read_launch() == Launch()
    assert Process.current() == Process()


def test_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch)
    assert read_launch() == Launch(rank=3, size=4, local_rank=1)
    assert Process.current() == Process(rank=3, world=4, local_rank=1)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": "4"}, "RANK=4 is set and WORLD_SIZE=4"),
        ({"RANK": "first"}, "RANK='first' is set, it must be a whole number of 0 or more"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is set, it must be a whole number of 1 or more"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' is set"),
    ],
)
def test_what_cannot_be(
    changed: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(monkeypatch, **changed)
    with pytest.raises(ConfigError, match=said) as error:
        read_launch()
    assert "\n" not in str(error.value)


def test_half_of_it_is_one_line_of_generate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate", "{4}", "--model", "m", "--out", "o.jsonl"]) == 2
    said = capsys.readouterr().err
    assert "WORLD_SIZE=2 is set and RANK, MASTER_ADDR, MASTER_PORT are not" in said
    assert "torchrun" in said
    assert "Traceback" not in said
