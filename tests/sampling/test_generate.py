"""`DiffusionLM.generate` and `ddlm generate`, from the template to the sample file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddlm.cli import main
from ddlm.config import SampleConfig
from ddlm.lm import DiffusionLM, load
from ddlm.sampling import halting
from ddlm.types import ConfigError
from sampling.models import write_model

LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), LENGTH)


@pytest.fixture(scope="module")
def lm(folder: Path) -> DiffusionLM:
    return load(folder)


def test_templates_become_texts(lm: DiffusionLM) -> None:
    out = lm.generate("the river {8} sea", samples=3, steps=6, seed=5)
    assert [o.seed for o in out] == [5, 6, 7]
    for o in out:
        assert o.text.startswith("the river")
        assert o.text.endswith(" sea")
        assert sum(o.is_noised) == 8
        assert o.prompt == "the river {8} sea"
        ((start, end),) = o.generated
        assert (o.text[:start], o.text[end:]) == ("the river", " sea")
        assert (o.steps, o.reason) == (6, "completed")
    assert len({o.text for o in out}) == 3
    free = lm.generate("{12}", steps=3)[0]
    assert free.generated == [(0, len(free.text))]


def test_a_seed_gives_its_text_again_in_any_company(lm: DiffusionLM) -> None:
    many = lm.generate(
        ["the {8}", "{3}", "sea {20} sun"], samples=3, steps=6, seed=9, halt="patience:2"
    )
    assert [o.prompt for o in many] == ["the {8}"] * 3 + ["{3}"] * 3 + ["sea {20} sun"] * 3
    for o in many:
        (again,) = lm.generate(o.prompt, steps=6, seed=o.seed, halt="patience:2", slots=1)
        assert again == o


def test_long_texts_slide_with_overlap_and_nothing_is_cut(lm: DiffusionLM) -> None:
    text = "the sea {90} and the {5} sun {40} again"
    (out,) = lm.generate(text, steps=4, seed=1, trace=True)
    parts = [n for n in out.is_noised if n]
    assert len(parts) == 135
    assert len(out.tokens) == len(out.is_noised) > 4 * LENGTH
    assert out.text.startswith("the sea")
    assert out.text.endswith(" again")
    given = [t for t, n in zip(out.tokens, out.is_noised, strict=True) if not n]
    expected = [
        t for part in ("the sea", " and the", " sun", " again") for t in lm.tokenizer.encode(part)
    ]
    assert given == expected
    assert out.steps == 4 * len(out.traces)
    assert lm.generate(text, steps=4, seed=1, overlap=4)[0].tokens != out.tokens
    # each window sees the end of the last one: the second starts with 16 positions that are kept
    assert not out.traces[1].generated[:16].any()
    with pytest.raises(ConfigError, match="overlap"):
        lm.generate(text, overlap=LENGTH)


def test_one_window_refuses_what_does_not_fit(lm: DiffusionLM) -> None:
    with pytest.raises(ConfigError, match="the template has 40 tokens, the model takes 32"):
        lm.request("{40}")


def test_a_request_has_the_defaults_of_the_model(tmp_path: Path) -> None:
    """An engine's user gets what :meth:`generate` gives, early exit by name included."""
    own = SampleConfig(steps=9, solver="sde", noise_scale=0.8, temperature=0.7, grid="karras")
    lm = load(write_model(tmp_path, LENGTH, sample=own))
    request = lm.request("the {8}", seed=3)
    assert (request.steps, request.noise_scale, request.temperature) == (9, 0.8, 0.7)
    (result,) = lm.engine(slots=1, length=16).run([request])
    assert result.tokens.tolist() == lm.generate("the {8}", seed=3)[0].tokens
    other = lm.request("the {8}", steps=4, solver="euler", grid="uniform", halt="patience:2")
    assert (other.steps, other.halt) == (4, halting.Patience(2))
    assert lm.request("the {8}", steps=4, grid_name="uniform", solver="euler").times.equal(
        other.times
    )
    with pytest.raises(ConfigError, match="patience"):
        lm.request("the {8}", halt="patience")


def test_one_template_is_one_text(lm: DiffusionLM) -> None:
    (one,) = lm.iterate("the {8}", steps=3)
    assert one == lm.generate("the {8}", steps=3)[0]


def test_texts_come_as_they_are_finished_or_in_order(lm: DiffusionLM) -> None:
    asked = ["the {120}", *["the {4}"] * 11]
    options = {"steps": 3, "slots": 4, "seed": 2}
    found = list(lm.as_finished(asked, **options))  # type: ignore[arg-type]
    assert sorted(n for n, _ in found) == list(range(12))
    assert found[-1][0] == 0
    assert [t for _, t in sorted(found, key=lambda x: x[0])] == lm.generate(asked, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="0 steps"):
        lm.as_finished(asked, steps=0)


def test_mistakes_are_told_at_the_call(lm: DiffusionLM) -> None:
    """Nobody has to take the first text to learn of them."""
    assert [t.seed for t in lm.iterate(["{3}", "{4}"], steps=2, seeds=[7, 5])] == [7, 5]
    for options, message in (
        ({"seeds": [1]}, "1 seeds were given for 2 texts"),
        ({"seeds": [1, 2, 3]}, "3 seeds were given for 2 texts"),
        ({"seed": 2**63 - 1}, "between 0 and"),
        ({"seed": -1}, "between 0 and"),
        ({"samples": 0}, "samples=0"),
        ({"slots": 0}, "slots=0"),
        ({"overlap": LENGTH}, "overlap=32"),
        ({"grid": "warp"}, "time warp"),
        ({"steps": 0}, "0 steps"),
        ({"steps": 10**12}, "at most 1000000"),
        ({"halt": ",".join(f"patience:{i}" for i in range(1, 6))}, "at most 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            lm.iterate(["{3}", "{4}"], **options)  # type: ignore[arg-type]


# ---- the command


def run(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_command_prints_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("the river {8}", "--model", folder, "--steps", 4, "--halt", "patience:2") == 0
    assert capsys.readouterr().out.startswith("the river")
    assert run("the {8}", "--model", folder, "--steps", 4, "--json", "--seed", 3) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["seed"] == 3
    assert {"text", "tokens", "prompt", "is_noised", "steps", "reason", "seed"} <= set(row)


def test_what_could_only_be_ignored_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "g.jsonl"
    assert run("the {8}", "--model", folder, "--tokens", 0) == 2
    assert "--tokens 0 was given" in capsys.readouterr().err
    assert run("the {8}", "--model", folder, "--steps", 4, "--json", "--out", out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{out} is written as JSON lines in any case: leave out --json" in line
    assert list(tmp_path.iterdir()) == []


def test_the_command_records_traces_and_animates(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    assert run("the {8}", "--model", folder, "--steps", 5, "--trace", trace, "--live") == 0
    (row,) = rows(trace)
    (recorded,) = row["traces"]  # type: ignore[misc]
    assert len(recorded["switches"]) == 5
    assert {"entropy", "kl", "x_norm", "x0_norm", "score_cosine", "x_cosine"} <= set(recorded)
    before = trace.read_bytes()
    again = ("the {4}", "--model", folder, "--steps", 3, "--trace", trace)
    assert run(*again) == 2  # refused
    assert trace.read_bytes() == before
    assert run(*again, "--overwrite") == 0
    assert trace.read_bytes() != before


def test_a_trace_without_its_rounds_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("the {8}", "--model", folder, "--steps", 4, "--trace")
    assert run(*common, tmp_path / "plain.jsonl") == 0
    assert "note:" not in capsys.readouterr().err
    trace = tmp_path / "refined.jsonl"
    assert run(*common, trace, "--refine", 3) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"note: {trace} ends with the last step; 3 rounds of refinement follow it (--refine 0: none)"
    )
    (row,) = rows(trace)
    (recorded,) = row["traces"]  # type: ignore[misc]
    assert (row["steps"], len(recorded["switches"])) == (7, 4)


@pytest.mark.skipif(os.name != "posix", reason="needs a shell of POSIX")
@pytest.mark.parametrize(
    ("closed", "status", "error"),
    [("<&-", 2, "standard input is closed"), (">&-", 0, "")],
)
def test_closed_streams(folder: Path, tmp_path: Path, closed: str, status: int, error: str) -> None:
    command = [sys.executable, "-m", "ddlm", "generate", "--model", str(folder), "--steps", "2"]
    asked = "-" if closed == "<&-" else "the {4}"
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *command, asked],
        input="the {4}",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert error in done.stderr


PROMPTS = "the river {8}\n{5} sea\nthe sun {3} again\n"


def test_prompt_files_become_sample_files(folder: Path, tmp_path: Path, lm: DiffusionLM) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "o.jsonl"
    prompts.write_text(PROMPTS)
    common = ("--prompts", prompts, "--model", folder, "--steps", 4, "--out", out)
    assert run(*common, "--samples", 2) == 0
    first = rows(out)
    direct = lm.generate(PROMPTS.splitlines(), samples=2, steps=4)
    assert [r["text"] for r in first] == [o.text for o in direct]
    assert not out.with_name("o.jsonl.parts").exists()
    before = out.stat().st_mtime_ns
    assert run(*common, "--samples", 2) == 2  # refused
    assert out.stat().st_mtime_ns == before
    assert run(*common, "--samples", 2, "--resume") == 0
    assert rows(out) == first
    prompts.write_text(PROMPTS + "it {4}\n")
    assert run(*common, "--samples", 2, "--resume") == 0  # appended
    assert rows(out)[:6] == first
    assert len(rows(out)) == 8
    prompts.write_text("another {8}\n" * 4)
    assert run(*common, "--samples", 2, "--resume") == 2  # other prompts
    assert run(*common, "--samples", 2, "--overwrite") == 0
    assert len(rows(out)) == 8
    assert run(*common, "--overwrite", "--resume") == 2


def test_json_prompts_carry_tokens_and_references(folder: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    lines = [
        {"template": "the {4}", "reference": "the sea"},
        {"prompt": "sun"},
        {"tokens": [5, 6, -100, 999], "is_noised": [False, 0, 1, True]},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (
        run("--prompts", prompts, "--model", folder, "--steps", 3, "--out", out, "--tokens", 6) == 0
    )
    done = rows(out)
    assert done[0]["reference"] == "the sea"
    assert done[1]["prompt"] == "sun{6}"
    assert done[2]["tokens"][:2] == [5, 6]  # type: ignore[index]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("the {3}\n\nsea {2}\n", "p.txt", "p.txt, line 2 is empty"),
        ("the {3}\nsea\n", "p.txt", "p.txt, line 2: .*nothing to generate"),
        ('{"template": "a {2}"}\n{oops\n', "p.jsonl", "p.jsonl, line 2: not JSON"),
        ('{"template": 3}\n', "p.jsonl", "line 1: need a string"),
        ('{"tokens": [1, 999], "is_noised": [true, false]}\n', "p.jsonl", "line 1: .*below 300"),
        ('{"tokens": [1, 2], "is_noised": ["false", true]}\n', "p.jsonl", "as many true and false"),
        ('{"tokens": [1, 2], "is_noised": [0.5, 1]}\n', "p.jsonl", "as many true and false"),
        ('{"tokens": [true, 2], "is_noised": [true, false]}\n', "p.jsonl", "must be ids below"),
        (
            '{"tokens": [1], "is_noised": [false]}\n',
            "p.jsonl",
            "line 1: nothing is to be generated",
        ),
        ("", "p.txt", "holds no prompts"),
    ],
)
def test_bad_prompt_files_are_named_by_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    name: str,
    message: str,
) -> None:
    (tmp_path / name).write_text(content)
    out = tmp_path / "o.jsonl"
    assert run("--prompts", tmp_path / name, "--model", folder, "--out", out) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert not out.exists()
    assert not (tmp_path / "o.jsonl.parts").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("{0}",), ("{-3}",), ("a {3",), ("{3}", "--halt", "patience:0"), ("{3}", "--steps", "0"),
        ("{3}", "--samples", "0"), ("{3}", "--noise-scale", "-1"), ("{3}", "--grid", "warp"), (), ("{3}", "--resume"),
        ("{3}", "--solver", "rk4"), ("--prompts", "nowhere.txt"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert run(*arguments, "--model", folder) == 2
    assert capsys.readouterr().err.count("\n") == 1


def start(
    folder: Path, prompts: Path, out: Path, *more: str, ranks: int = 1
) -> subprocess.Popen[bytes]:
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [*launch, "ddlm", "generate", "--prompts", str(prompts), "--model", str(folder), "--out", str(out),
               "--steps", str(MANY_STEPS), "--slots", "2", *more]  # fmt: skip
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def descendants(pid: int) -> list[int]:
    """A process and all that it has started; torchrun's workers have sessions of their own."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(d for child in children for d in descendants(int(child)))]


def test_a_part_that_somebody_still_writes_is_left_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    prompts, out = tmp_path / "p.txt", tmp_path / "o.jsonl"
    prompts.write_text(PROMPTS)
    part = tmp_path / "o.jsonl.parts" / "rank-0.jsonl"
    part.parent.mkdir()
    common = ("--prompts", prompts, "--model", folder, "--steps", 3, "--out", out, "--resume")
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(*common) == 2
    assert "still being written" in capsys.readouterr().err
    assert run(*common) == 0
    assert len(rows(out)) == 3


MANY, MANY_STEPS = [f"the river {{{8 + i % 9}}} sea" for i in range(60)], 30


@pytest.fixture(scope="module")
def written_undisturbed(lm: DiffusionLM) -> list[dict[str, object]]:
    return [o.to_row() for o in lm.generate(MANY, steps=MANY_STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_is_resumed_with_nothing_lost_or_written_twice(
    folder: Path, tmp_path: Path, written_undisturbed: list[dict[str, object]], ranks: int
) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "o.jsonl"
    prompts.write_text("".join(t + "\n" for t in MANY))
    process = start(folder, prompts, out, ranks=ranks)
    parts = tmp_path / "o.jsonl.parts"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        written = sum(p.read_bytes().count(b"\n") for p in parts.glob("rank-*.jsonl"))
        if written >= 10:
            break
        time.sleep(0.02)
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not out.exists(), "it was over before it could be killed"
    assert 10 <= written < len(MANY)
    torn = next(iter(parts.glob("rank-*.jsonl")))
    with torn.open("ab") as file:
        file.write(b'{"number": 59, "row": {"te')  # what a kill in the middle of a write leaves
    again = start(folder, prompts, out, "--resume", ranks=ranks)
    _, error = again.communicate(timeout=200)
    assert again.returncode == 0, error.decode()
    assert not parts.exists()
    written = rows(out)
    assert len({json.dumps(row.pop("settings")) for row in written}) == 1
    assert written == json.loads(json.dumps(written_undisturbed))
