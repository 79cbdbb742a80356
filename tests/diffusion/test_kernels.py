"""The Triton kernels where there is no GPU: their arithmetic under the interpreter, and doing without them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddlm.diffusion import head
from ddlm.integrations.remote_code import remote_code

# Triton as it is where it cannot compile: everything of it is there, and a first launch raises.
NO_COMPILER = """
class Kernel:
    def __getitem__(self, grid):
        def launch(*given, **constants):
            raise RuntimeError("Failed to find C compiler.\\nPlease specify via CC")
        return launch
def jit(function):
    return Kernel()
"""


def python(*arguments: str, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python, with the packages of the folder ``first`` before all others."""
    path = os.pathsep.join(p for p in (str(first or ""), os.environ.get("PYTHONPATH", "")) if p)
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_kernels_compute_what_the_plain_expressions_do() -> None:
    pytest.importorskip(
        "triton", reason="Triton, whose interpreter runs its kernels, is not installed"
    )
    done = python(str(Path(__file__).with_name("interpreted.py")))
    assert done.returncode == 0, done.stderr


def test_kernels_that_do_not_run_are_done_without(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(NO_COMPILER)
    (tmp_path / "triton" / "language.py").write_text("constexpr = float\n")
    script = """
        import warnings
        from types import SimpleNamespace
        import torch
        from ddlm.diffusion import head, rows
        tensor = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cpu"))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.is_current_stream_capturing = lambda: True  # a build for CPUs has no answer
            assert head.fused_rows(tensor) is None
            assert not said  # in the middle of a recording nothing is tried
            torch.cuda.is_current_stream_capturing = lambda: False
            assert head.fused_rows(tensor) is None
            assert head.fused_rows(tensor) is None
        (warning,) = said  # once for a device
        print(warning.category.__name__, warning.message)
    """
    done = python("-c", "\n".join(line[8:] for line in script.splitlines()), first=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RuntimeWarning the Triton kernels do not run on cpu (Failed to")
    assert done.stdout.count("\n") == 1


def test_without_triton_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.setattr(head.importlib.util, "find_spec", lambda name: None)
    assert head.working_rows(torch.device("cpu")) is None


def test_code_beside_an_exported_model_calls_no_other_ddlm(tmp_path: Path) -> None:
    """The one that is installed may be older or newer than the code that was cut out."""
    for folder in ("exported", "ddlm/diffusion"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("exported", "ddlm", "ddlm/diffusion"):
        (tmp_path / file / "__init__.py").write_text("")
    (tmp_path / "triton.py").write_text("")
    (tmp_path / "ddlm/diffusion/rows.py").write_text("raise SystemExit('it was asked')\n")
    (tmp_path / "exported/ddlm_head.py").write_text(remote_code()["ddlm_head.py"])
    script = """
        import torch
        from types import SimpleNamespace
        from exported import ddlm_head
        torch.cuda.is_current_stream_capturing = lambda: False
        tensor = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda:0"))
        assert ddlm_head.fused_rows(tensor) is None
    """
    done = python("-c", "\n".join(line[8:] for line in script.splitlines()), first=tmp_path)
    assert done.returncode == 0, done.stderr
