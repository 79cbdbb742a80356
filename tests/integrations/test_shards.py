"""Exports and baselines in shards: every reader takes them as it takes one file."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ddlm
from ddlm.checkpoint import load_model
from ddlm.config import load_config
from ddlm.downstream.glue import TASKS
from ddlm.downstream.models import find_source
from ddlm.evaluation import autoregressive
from ddlm.evaluation.hub import fingerprint
from ddlm.evaluation.judges import Judge
from ddlm.evaluation.mauve import Featurizer
from ddlm.files import INDEX, CheckpointError, read_tensors, verify_files, weight_files
from ddlm.integrations import export
from ddlm.reproduce.subjects import count_parameters
from ddlm.study import identity
from ddlm.types import ConfigError
from downstream.tiny import sentences, write_tiny_model
from evaluation.small import save_gpt2
from integrations.outside import push, read_without_ddlm

LIMIT = 40 * 2**10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", LIMIT)
    monkeypatch.setattr(autoregressive, "SHARD_BYTES", LIMIT)


def weights(folder: Path) -> list[str]:
    """Names of what transformers could take for weights."""
    return sorted(p.name for p in folder.glob("model*.safetensors*"))


def test_an_export_is_cut_and_read(folder: Path, tmp_path: Path) -> None:
    exported = export.export_model(folder, tmp_path / "out")
    files = weight_files(exported)
    assert len(files) >= 3
    assert weights(exported) == [*(f.name for f in files), INDEX]
    assert all(f.stat().st_size <= LIMIT for f in files)
    verify_files(exported)
    before, lm = load_model(folder), ddlm.load(exported, device="cpu")
    for name, value in before.model.state_dict().items():
        assert torch.equal(lm.model.state_dict()[name], value), name
    assert lm.generate("the {4}", steps=2, seed=0)
    assert count_parameters(exported) == count_parameters(folder)
    assert load_config(exported) == before.config
    source = find_source(str(exported))
    assert source.classifier(TASKS["rte"], 5.0, "mean", True) is not None


def test_exports_again_leave_nothing_of_the_former(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = load_model(folder).model.state_dict()
    out = export.export_model(folder, tmp_path / "out")
    cut = weights(out)
    half = export.export_model(out, tmp_path / "half", dtype="bfloat16")
    assert 1 < len(weights(half)) < len(cut)
    again = load_model(half).model.state_dict()
    assert all(torch.equal(again[k], v.bfloat16().float()) for k, v in state.items())
    export.export_model(out, half)
    assert weights(half) == cut
    monkeypatch.setattr(export, "SHARD_BYTES", 2**20)
    for place in (half, out):
        export.export_model(folder, place)
        assert weights(place) == ["model.safetensors"]
        verify_files(place)
    export.export_model(half, out, dtype="float16")
    monkeypatch.setattr(export, "SHARD_BYTES", LIMIT)
    export.export_model(folder, out)
    assert weights(out) == cut


def test_every_shard_counts_in_fingerprints(folder: Path, tmp_path: Path) -> None:
    exported = export.export_model(folder, tmp_path / "out")
    known, name = fingerprint(exported, tmp_path / "a"), identity(exported)
    for file in weight_files(exported):
        tensors = file.read_bytes()
        file.write_bytes(tensors[:-1] + bytes([tensors[-1] ^ 1]))
        assert fingerprint(exported, tmp_path / "b") != known
        with pytest.raises(CheckpointError, match=rf"{file.name} is damaged \(its sha256"):
            load_model(exported)
        file.write_bytes(tensors)
    manifest = exported / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][weight_files(exported)[-1].name] = "0" * 64
    manifest.write_text(json.dumps(content))
    assert identity(exported) != name


@pytest.mark.slow
def test_transformers_loads_shards_without_ddlm(folder: Path, tmp_path: Path) -> None:
    exported = export.export_model(folder, tmp_path / "out")
    (text,) = sentences(1)
    seen = read_without_ddlm(exported, [text, text], tmp_path)
    network = load_model(folder).model
    x0 = network.embed(torch.tensor(seen["ids"]))
    nothing = torch.zeros(x0.shape[:2], dtype=torch.bool)
    expected = network.hidden_states(x0, torch.tensor([1.0, 1.0]), nothing)
    torch.testing.assert_close(torch.tensor(seen["hidden"]), expected, rtol=1e-4, atol=1e-5)


def test_a_push_removes_the_model_of_an_earlier_one(folder: Path, tmp_path: Path) -> None:
    """Transformers would read the old single file, and no error would say so."""
    old = {"model.safetensors", "model-00001-of-00099.safetensors"}
    old |= {"time_warp.safetensors", "spiece.model"}
    stored = [*sorted(old), "notes.md", "README.md", "tokenizer.json"]
    _, requests = push(folder, tmp_path, stored=stored, shard_bytes=LIMIT)
    commit = next(body for path, _, body in requests if "/commit/" in path)
    entries = [json.loads(line) for line in commit.splitlines()]
    sent = {e["value"]["path"]: e["value"] for e in entries if e["key"] == "file"}
    index = json.loads(base64.b64decode(sent[INDEX]["content"]))
    assert set(index["weight_map"].values()) == {n for n in sent if n.startswith("model-")}
    gone = {e["value"]["path"] for e in entries if e["key"] == "deletedFile"}
    assert gone == old


def test_a_tuned_model_in_shards_is_tuned_further(folder: Path, tmp_path: Path) -> None:
    source = find_source(str(folder))
    model: Any = source.classifier(TASKS["rte"], 5.0, "mean", True)
    source.save(model, tmp_path / "whole")
    source.save(model, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    (tmp_path / "cut" / "manifest.json").unlink()
    model.save_pretrained(tmp_path / "cut", max_shard_size=LIMIT)
    whole, cut = (find_source(str(tmp_path / n)) for n in ("whole", "cut"))
    assert whole.state is not None
    assert cut.state is not None
    assert all(torch.equal(cut.state[k], v) for k, v in whole.state.items())
    next((tmp_path / "cut").glob("model-00001*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-.* is missing"):
        find_source(str(tmp_path / "cut"))


# ---- autoregressive baselines and judges


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    """A model that was saved whole, then in shards over it, as `ddlm baseline` saves it."""
    import transformers

    folder: Path = save_gpt2(tmp_path / "gpt2", positions=512)
    assert weights(folder) == ["model.safetensors"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    autoregressive.save_baseline(model, folder)
    return folder


def test_a_baseline_in_shards_is_read_by_all(judge: Path, tmp_path: Path) -> None:
    whole = save_gpt2(tmp_path / "whole", positions=512)
    files = weight_files(judge)
    assert len(files) >= 3
    assert weights(judge) == [*(f.name for f in files), INDEX]
    for file in files:
        assert file.stat().st_size <= LIMIT or len(read_tensors(file)) == 1, file
    text = ["a river walked into the house"]
    scores = [Judge(str(f), cache=tmp_path / "c").score(text)[0] for f in (whole, judge)]
    assert scores[0] == scores[1]
    features = [Featurizer(str(f), cache=tmp_path / "c")(text) for f in (whole, judge)]
    assert (features[0] == features[1]).all()
    states = [autoregressive.load_baseline(f).state_dict() for f in (whole, judge)]
    assert all(torch.equal(states[1][k], v) for k, v in states[0].items())
    assert count_parameters(judge) == count_parameters(whole)
    marks = [find_source(str(f), name="same").fingerprint for f in (judge, whole)]
    assert marks[0] != marks[1]
    assert find_source(str(judge)).classifier(TASKS["rte"], None, "mean", False) is not None


def test_a_baseline_that_fits_is_one_file_again(
    judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoregressive, "SHARD_BYTES", 2**20)
    autoregressive.save_baseline(autoregressive.load_baseline(judge), judge)
    assert weights(judge) == ["model.safetensors"]


@pytest.mark.parametrize("damage", ["gone", "truncated"])
def test_a_judges_damaged_shard_is_one_line(judge: Path, tmp_path: Path, damage: str) -> None:
    shard = weight_files(judge)[1]
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="cannot load the judge") as error:
        Judge(str(judge), cache=tmp_path / "c").score(["a river"])
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="cannot load"):
        autoregressive.load_baseline(judge)
    with pytest.raises(ConfigError, match=rf"{shard.name} is (missing|damaged)"):
        count_parameters(judge)
