"""The lines of a model card, as a user without ddlm would paste them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from ddlm.integrations.export import export_model
from downstream.tiny import write_tiny_model


def test_the_cards_code_asks_nothing(tmp_path: Path) -> None:
    folder = export_model(write_tiny_model(tmp_path / "tiny"), tmp_path / "export")
    card = (folder / "README.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", card, re.S) if "AutoModel" in c)
    code = code.replace("PATH_OR_ID", str(folder)) + "print(tokenizer('the cat')['input_ids'])\n"
    run = subprocess.run(
        [sys.executable, "-c", code],
        input="",  # a question finds no answer
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert "[y/N]" not in run.stdout + run.stderr
    assert re.fullmatch(r"\[[\d, ]+\]", run.stdout.strip().splitlines()[-1])
