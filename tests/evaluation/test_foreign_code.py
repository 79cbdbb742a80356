"""Judges, feature models and baselines with code of their own are refused in one line, and it is not run."""

import json
import shutil
from types import SimpleNamespace

import pytest

from ddlm.cli import main
from ddlm.evaluation.autoregressive import load_baseline
from ddlm.evaluation.judges import Judge
from ddlm.evaluation.mauve import Featurizer
from ddlm.reproduce import checks
from ddlm.types import ConfigError


def judged_by(folder):
    """The check of `ddlm reproduce`, with the folder as feature model."""
    shop = SimpleNamespace(
        judge_names=lambda: ("none", str(folder)), judge_trained_here=False, precision="fp32"
    )
    checks._check_judges(shop)


WAYS = {"judge": Judge, "features": Featurizer, "baseline": load_baseline, "check": judged_by}


@pytest.fixture(autouse=True)
def nobody_is_asked(tmp_path, monkeypatch):
    """A terminal at which somebody would answer yes."""
    monkeypatch.setenv("DDLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *a: "y")


@pytest.fixture
def foreign(judge_folder, tmp_path):
    """A model whose configuration and network are code in its folder, which leaves a file when it is run."""
    folder = shutil.copytree(judge_folder, tmp_path / "foreign")
    names = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoModelForCausalLM": "own.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))
    lines = [
        f"open({str(tmp_path / 'ran')!r}, 'w')",
        "from transformers import GPT2Config, GPT2LMHeadModel",
        "class C(GPT2Config): model_type = 'own'",
        "class M(GPT2LMHeadModel): config_class = C",
    ]
    (folder / "own.py").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_code_of_a_model_folder_is_not_run(way, foreign, tmp_path):
    with pytest.raises(ConfigError, match="it brings code of its own, which is never run") as error:
        WAYS[way](str(foreign))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("way", WAYS)
def test_a_diffusion_model_is_named_as_one(way, judge_folder, tmp_path):
    folder = shutil.copytree(judge_folder, tmp_path / "ours")
    names = {"AutoConfig": "modeling_ddlm.DDLMConfig"}
    (folder / "config.json").write_text(json.dumps({"model_type": "ddlm", "auto_map": names}))
    with pytest.raises(ConfigError, match=r"is a diffusion model: .* `ddlm baseline` trains"):
        WAYS[way](str(folder))


@pytest.mark.parametrize("option", ["--judge", "--features"])
def test_the_command_refuses_them_in_one_line(option, foreign, tmp_path, capsys):
    rows = [json.dumps({"text": f"the river {i}", "reference": f"the sea {i}"}) for i in range(4)]
    (tmp_path / "made.jsonl").write_text("\n".join(rows))
    others = {"--judge": "none", "--features": "none"} | {option: str(foreign)}
    command = [
        "evaluate",
        "--samples",
        str(tmp_path / "made.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, *(x for pair in others.items() for x in pair)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the ")
    assert line.endswith(
        "it brings code of its own, which is never run here: name a model that transformers knows"
    )
