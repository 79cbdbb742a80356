"""The command line: instant help, one line for a mistake, signatures that become arguments."""

from __future__ import annotations

import errno
import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from ddlm import cli
from ddlm.arguments import Arguments
from ddlm.config import Config
from ddlm.types import ConfigError

HELP_BUDGET = 0.5  # seconds


def run(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ddlm", *argv], capture_output=True, text=True, **options
    )


def refused(function: Any, *argv: str) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(ConfigError) as caught:
        Arguments("ddlm try", function).parse(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parsed(function: Any, *argv: str) -> dict[str, Any]:
    return Arguments("ddlm try", function).parse(argv)


def command(
    files: list[Path],
    kind: Literal["euler", "heun"] = "euler",
    *,
    out: Path,
    noise_scale: float = 1.0,
    count: int | None = None,
    seeds: list[int] = [1, 2],  # noqa: B006 - never changed
    live: bool = False,
    verify: bool = True,
) -> None:
    """Try things.

    Args:
        files: What to read.
        kind: The solver.
        out: Where to write.
        noise_scale: In units of 100% of t_max.
        count: How many, in tokens.
        seeds: Several.
        live: Show it.
        verify: Check it.
    """


def template(text: str, *, model: str) -> None:
    """Take text as it is."""


def experiment(config: Config | None = None, *, out: Path = Path("runs")) -> None:
    """Take a configuration."""


def optional(text: str | None = None, *, model: str = "m") -> None:
    """Take text if there is some.

    Args:
        text: What to write.
        model: By which.
    """


def flat(model: str, text: str | None = None, out: Path = Path("runs")) -> None:
    """Without a star."""


# ---- arguments from signatures


def test_text_before_the_star_may_be_left_out() -> None:
    assert parsed(optional) == {"text": None, "model": "m"}
    assert parsed(optional, "x", "--model", "n") == {"text": "x", "model": "n"}


def test_without_a_star_defaults_make_options() -> None:
    assert parsed(flat, "m") == {"model": "m", "text": None, "out": Path("runs")}
    assert parsed(flat, "m", "--out", "o", "--text", "x")["out"] == Path("o")


def test_values_have_the_types_of_the_signature() -> None:
    values = parsed(command, "a", "b", "--out", "c", "--count", "3", "--seeds", "4", "5", "--live")
    assert values == {
        "files": [Path("a"), Path("b")],
        "kind": "euler",
        "out": Path("c"),
        "noise_scale": 1.0,
        "count": 3,
        "seeds": [4, 5],
        "live": True,
        "verify": True,
    }


def test_options_take_dashes_too_and_equal_signs() -> None:
    values = parsed(command, "--noise-scale=1e-3", "--no-verify", "--out=c", "--kind", "heun", "a")
    assert (values["noise_scale"], values["verify"], values["kind"]) == (1e-3, False, "heun")


@pytest.mark.parametrize(
    "text", ["{32}", "null", "1.50", "true", "a: b", "@x", "[1]", "-- she said", "'quoted'", ""]
)
def test_text_is_taken_as_it_is(text: str) -> None:
    assert parsed(template, text, "--model", "m")["text"] == text


def test_everything_after_two_dashes_is_text() -> None:
    assert parsed(template, "--model", "m", "--", "--x")["text"] == "--x"


@pytest.mark.parametrize(
    "argv, said",
    [
        (("a", "--out", "c", "--cuont", "3"), "has no option '--cuont'; did you mean '--count'?"),
        (("a", "--out", "c", "--coun", "3"), "did you mean '--count'?"),  # never an abbreviation
        (("a", "--out", "c", "--noise-scal", "3"), "did you mean '--noise_scale'?"),
        (("a", "--out", "c", "--zzz"), "has no option '--zzz'; see ddlm try --help"),
        (("a", "--out", "c", "--count", "x"), "--count is 'x', it must be a whole number"),
        (("a", "--out", "c", "--seeds", "1", "x"), "--seeds is 'x', it must be a whole number"),
        (("a", "--out", "c", "--kind", "hen"), "one of euler, heun; did you mean 'heun'?"),
        (("a", "--out", "c", "--count"), "--count needs a value"),
        (("a",), "--out must be given"),
        (("--out", "c"), "FILES must be given"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(argv: tuple[str, ...], said: str) -> None:
    assert said in refused(command, *argv)


def test_more_than_is_taken_is_refused() -> None:
    assert "'b' is more than this command takes" in refused(template, "a", "b", "--model", "m")


def test_overrides_win_wherever_config_stands(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train:\n  lr: 1.0\n  steps: 7\n", encoding="utf-8")
    orders = (
        ["--config", str(path), "--train.lr", "1e-3"],
        ["--train.lr=1e-3", "--config", str(path)],
    )
    for argv in orders:
        config = parsed(experiment, *argv)["config"]
        assert (config.train.lr, config.train.steps) == (1e-3, 7)
    assert parsed(experiment)["config"] is None
    assert parsed(experiment, "--train.lr", "1e-3")["config"].train.lr == 1e-3


def test_wrong_settings_are_refused_with_the_nearest() -> None:
    assert "did you mean '--train.lr'?" in refused(experiment, "--train.lrr", "1")
    assert "did you mean '--time.lr' or '--train.lr'?" in refused(experiment, "--lr", "1")
    assert "train.lr is 'x', it must be a number" in refused(experiment, "--train.lr", "x")
    assert "did you mean 'tiny'?" in refused(experiment, "--config", "tinny")


def test_help_shows_defaults_choices_and_texts() -> None:
    text = " ".join(Arguments("ddlm try", command).help().split())
    for part in (
        "FILES [FILES ...]",
        "--out PATH Where to write. (required)",
        "--noise_scale X In units of 100% of t_max. (default: 1)",
        "--kind {euler,heun} The solver. (default: euler)",
        "--count N How many, in tokens. (default: none)",
        "(default: 1,2)",
        "--live Show it. (default: false)",
        "--verify, --no-verify Check it. (default: true)",
    ):
        assert part in text


def test_help_of_a_configuration_shows_the_values_of_the_one_that_is_named() -> None:
    arguments = Arguments("ddlm try", experiment)
    assert "Transformer blocks L. (default: 8)" in " ".join(arguments.help().split())
    named = " ".join(arguments.help(["--config", "tiny"]).split())
    assert "Transformer blocks L. (default: 4)" in named


# ---- the table of commands


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_exists_and_documents_every_argument(name: str) -> None:
    import docstring_parser

    function = cli.load(name)
    arguments = Arguments(f"ddlm {name}", function)
    assert arguments.help().startswith(f"usage: ddlm {name}")
    documented = {
        p.arg_name
        for p in docstring_parser.parse(inspect.getdoc(function) or "").params
        if p.description
    }
    assert set(inspect.signature(function).parameters) <= documented


def test_every_extra_exists(root: Path) -> None:
    import tomllib

    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(cli.EXTRAS.values()) <= set(extras["optional-dependencies"])


# ---- the program


def test_help_is_instant_and_pulls_in_nothing_heavy() -> None:
    code = (
        "import sys; from ddlm.cli import main; main(['--help']);"
        "print([m for m in ('torch', 'numpy', 'rich', 'jsonargparse') if m in sys.modules])"
    )
    best, out = float("inf"), ""
    for _ in range(5):  # the fastest of some: other work on the machine is not ours
        start = time.perf_counter()
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        best = min(best, time.perf_counter() - start)
    assert out.rstrip().endswith("[]")
    assert "usage: ddlm COMMAND" in out
    for name in cli.COMMANDS:
        assert f"\n  {name} " in out
    assert best < HELP_BUDGET


def test_help_of_a_command_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from ddlm.cli import main; main(['train', '--help']); main(['prepare', '-h']);"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.rstrip().endswith("False")


def test_version_names_ddlm_torch_and_python() -> None:
    import torch

    import ddlm

    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith(f"ddlm {ddlm.__version__}")
    assert f"torch {torch.__version__}" in done.stdout


@pytest.mark.parametrize(
    "argv, said",
    [
        (("trian",), "there is no command 'trian'; did you mean 'train'?"),
        (("xyzzy",), "commands: "),
        (("train", "--train.lrr", "1"), "did you mean '--train.lr'?"),
        (("prepare",), "--out must be given"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv: tuple[str, ...], said: str) -> None:
    done = run(*argv)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def with_command(monkeypatch: pytest.MonkeyPatch, body: Any) -> int:
    """Run the boundary around a command that does ``body``."""

    def fail() -> None:
        """Fail."""
        body()

    monkeypatch.delenv("DDLM_DEBUG", raising=False)
    monkeypatch.setattr(cli, "load", lambda name: fail)
    return cli.main(["train"])


def raising(error: BaseException) -> Any:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    "error, status, line",
    [
        (ConfigError("a\n  b"), 2, "error: a b\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x"),
            2,
            "error: No space left on device: x\n",
        ),
        (
            ModuleNotFoundError("no", name="matplotlib.figure"),
            2,
            "error: this needs the package 'matplotlib': pip install 'ddlm[plots]'\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("go on with: ddlm x"), 130, "go on with: ddlm x\n"),
    ],
)
def test_the_boundary_turns_errors_into_a_line(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert with_command(monkeypatch, raising(error)) == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    "error",
    [RuntimeError("bug"), ModuleNotFoundError("no", name="ddlm.nothing"), ValueError("bug")],
)
def test_our_own_mistakes_keep_their_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(type(error)):
        with_command(monkeypatch, raising(error))


def test_debug_keeps_every_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "load", lambda name: raising(ConfigError("a")))
    monkeypatch.setenv("DDLM_DEBUG", "1")
    with pytest.raises(ConfigError):
        cli.main(["train"])


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and signals of POSIX")
def test_a_closed_pipe_is_no_error() -> None:
    code = "import sys; from ddlm.cli import main; print('x' * 2**20); sys.exit(main(['--help']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(30)
    # The print before main meets the closed pipe on some systems; nothing of ddlm may add to it.
    assert b"ddlm" not in errors


@pytest.mark.skipif(os.name != "posix", reason="needs signals of POSIX")
def test_ctrl_c_leaves_130_and_no_traceback() -> None:
    code = (
        "import sys, time; from ddlm import cli\n"
        "def wait():\n  'Wait.'\n  print('ready', flush=True); time.sleep(60)\n"
        "cli.load = lambda name: wait\nsys.exit(cli.main(['train']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background has Ctrl-C ignored by all of its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "interrupted\n"
