"""The precision that suits a device: bf16 only where there are instructions for it."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddlm.device import (
    can_compile,
    has_bf16,
    missing_compiler,
    product_dtype,
    resolve_precision,
    slow_precision,
)
from ddlm.training.state import TrainState
from ddlm.types import ConfigError
from training.runs import run, small_config

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, *, avx512: bool, amx: bool) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize(
    ("avx512", "amx", "precision"),
    [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")],
)
def test_auto_is_bf16_only_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, precision: str
) -> None:
    pretend(monkeypatch, avx512=avx512, amx=amx)
    assert resolve_precision("auto", CPU) == precision
    assert resolve_precision("fp32", CPU) == "fp32", "what is named is kept"
    assert resolve_precision("bf16", CPU) == "bf16", "what is named is kept"
    state = TrainState.create(small_config(precision="auto"), CPU)
    assert state.model.compute_dtype == product_dtype("auto", CPU)


def test_an_old_torch_without_the_questions_says_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, avx512=True, amx=True)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert not has_bf16(CPU)


def test_each_gpu_is_asked_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.is_bf16_supported answers for the current device whichever is meant."""
    card = {0: SimpleNamespace(major=8), 1: SimpleNamespace(major=7)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card[device.index])
    assert [has_bf16(torch.device("cuda", i)) for i in card] == [True, False]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not has_bf16(torch.device("cuda", 0))


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision 'half' is unknown: choose auto, bf16 or fp32"):
        resolve_precision("half", CPU)  # type: ignore[arg-type]


def test_emulated_bf16_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, avx512=False, amx=False)
    warning = slow_precision("bf16", CPU)
    assert warning is not None
    assert "no bfloat16 instructions" in warning
    assert slow_precision("auto", CPU) is None
    assert slow_precision("fp32", CPU) is None
    pretend(monkeypatch, avx512=True, amx=False)
    assert slow_precision("bf16", CPU) is None


def test_what_this_machine_answers_is_what_it_measures() -> None:
    """bf16 products must not be many times slower than float32 ones where they are said to be there."""
    if not has_bf16(CPU):
        pytest.skip("this CPU has no bfloat16 instructions: nothing to measure")

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(512, 512, dtype=dtype)
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            a @ a
            taken.append(time.perf_counter() - start)
        return min(taken)

    assert seconds(torch.bfloat16) < 3 * seconds(torch.float32)


@pytest.mark.parametrize(("precision", "said"), [("auto", "in float32"), ("bf16", "emulates")])
def test_a_run_says_what_it_computes_in(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    precision: str,
    said: str,
) -> None:
    pretend(monkeypatch, avx512=False, amx=False)
    run(tmp_path / "run", small_config(steps=1, precision=precision), quiet=False)
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


@pytest.mark.parametrize(
    ("device", "found", "variable", "said"),
    [
        ("cpu", "g++", "CXX", "C++ compiler (g++, or what CXX names)"),
        ("cuda:0", "gcc", "CC", "C compiler (gcc, clang, or what CC names)"),
        ("cuda:0", "clang", "CC", "C compiler (gcc, clang, or what CC names)"),
    ],
)
def test_compiling_needs_a_compiler_on_a_gpu_too(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    device: str,
    found: str,
    variable: str,
    said: str,
) -> None:
    at = torch.device(device)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    assert missing_compiler(at) == said
    assert not can_compile(at)
    program = tmp_path / found
    program.touch(mode=0o755)
    assert can_compile(at)
    monkeypatch.setenv(variable, "/no/such/compiler")
    assert not can_compile(at)
    monkeypatch.setenv(variable, str(program))
    assert can_compile(at)
    assert can_compile(torch.device("meta"))
