"""What a command is told of how its values came about: given outright, or left to their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddlm.arguments import Arguments
from ddlm.config import Config
from ddlm.settings import Given
from ddlm.types import ConfigError


def drawing(curves: bool | None = None, config: Config | None = None, given: Given | None = None):
    """Draw.

    Args:
        curves: Draw them; none: where there are any.
        config: What to draw.
        given: Settings of it.
    """


def reading(*, out: Path = Path("out"), files: list[Path] | None = None, text: str = ""):
    """Read.

    Args:
        out: Where to write.
        files: What to read.
        text: What to say.
    """


def parsed(*argv: str) -> dict[str, Any]:
    return Arguments("ddlm drawing", drawing).parse(argv)


@pytest.mark.parametrize(
    ("argv", "value"), [((), None), (("--curves",), True), (("--no-curves",), False)]
)
def test_yes_and_no_differ_from_neither(argv: tuple[str, ...], value: bool | None) -> None:
    assert parsed(*argv)["curves"] is value


def test_the_settings_that_were_given_are_named() -> None:
    assert parsed()["given"] == ()
    assert parsed("--config", "tiny")["given"] == ()
    values = parsed("--train.lr", "1e-3", "--config=tiny", "--model.width=64")
    assert sorted(values["given"]) == ["model.width", "train.lr"]
    assert values["config"].train.lr == 1e-3


def test_a_tilde_is_the_home_folder_in_paths_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    values = Arguments("ddlm reading", reading).parse(
        ["--out=~/run", "--files", "~/a", "~nobody-here/b", "--text", "~/x {8}"]
    )
    assert values["out"] == tmp_path / "run"
    assert values["files"] == [tmp_path / "a", Path("~nobody-here/b")]
    assert values["text"] == "~/x {8}"


def test_what_is_told_is_no_option() -> None:
    assert "--given" not in Arguments("ddlm drawing", drawing).options
    assert "--given" not in Arguments("ddlm drawing", drawing).help()


def test_a_whole_number_written_otherwise_is_named() -> None:
    def counting(*, limit: int = 3):
        """Count.

        Args:
            limit: How far.
        """

    with pytest.raises(ConfigError, match=r"^--limit is 1000000.0: write 1000000$"):
        Arguments("ddlm counting", counting).parse(["--limit", "1e6"])
