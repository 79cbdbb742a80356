"""Export: both libraries load the folder, and transformers does so without ddlm."""

from __future__ import annotations

import ast
import base64
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from ddlm.checkpoint import load_model, save_model
from ddlm.cli import main
from ddlm.data.tokenizer import Tokenizer
from ddlm.integrations import remote_code
from ddlm.integrations.export import export_model, push_model
from ddlm.types import ConfigError
from downstream.tiny import sentences, write_tiny_model
from integrations.outside import push, read_without_ddlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny-0.1")


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    return export_model(folder, folder.parent / "exported-0.1")


# ---- the code that travels


def test_the_code_is_cut_out_of_the_package() -> None:
    files = remote_code.remote_code()
    assert set(files) == {"modeling_ddlm.py"} | {
        f"ddlm_{m}.py"
        for m in (
            "config",
            "denoiser",
            "head",
            "elementwise",
            "layers",
            "posterior",
            "process",
            "transformer",
            "types",
        )
    }
    imported = set(re.findall(r"^from \.(\w+) import", files["modeling_ddlm.py"], re.MULTILINE))
    assert {f"{m}.py" for m in imported} | {"modeling_ddlm.py"} == set(files), (
        "transformers 4 copies nothing else"
    )
    sources = Path(remote_code.__file__).parents[1]
    layers = (sources / "network" / "layers.py").read_text(encoding="utf-8")
    attention = layers[
        layers.index("class SelfAttention") : layers.index("class FeedForward")
    ].rstrip()
    assert attention in files["ddlm_layers.py"]
    assert "class TrainConfig" not in files["ddlm_config.py"], "what nobody needs stays behind"


def test_the_code_needs_torch_and_transformers_only() -> None:
    for name, text in remote_code.remote_code().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                roots = {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                roots = {str(node.module).split(".")[0]}
            else:
                continue
            assert roots <= {"torch", "transformers"} | set(sys.stdlib_module_names), (name, roots)


@pytest.mark.parametrize(
    "source, message",
    [
        ("import ddlm.types\n", "write 'from ddlm"),
        ("from . import x\n", "relative imports"),
        ("for i in range(3):\n    pass\n", "a top-level For cannot be exported"),
    ],
)
def test_what_cannot_be_cut_is_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remote_code._Module.parse("ddlm.made_up", source)


def test_a_hidden_import_of_the_package_is_refused() -> None:
    source = "def f():\n    from ddlm.types import ConfigError\n    raise ConfigError('x')\n"
    module = remote_code._Module.parse("ddlm.made_up", source)
    module.need_all()
    with pytest.raises(ValueError, match="inside a function"):
        module.render()


def test_only_what_is_reached_is_kept() -> None:
    source = "import json\nimport os as system\n\nA = 1\n# why B\nB = A + 1\nC = json.dumps(3)\n"
    module = remote_code._Module.parse("ddlm.made_up", source)
    module.need({"B"})
    text = module.render()
    assert "A = 1" in text
    assert "# why B\nB = A + 1" in text
    assert "json" not in text
    assert "os" not in text.split("annotations")[1]
    with pytest.raises(ValueError, match="does not define Z"):
        module.need({"Z"})


# ---- the folder


def test_ddlm_loads_the_export(folder: Path, exported: Path) -> None:
    before, after = load_model(folder), load_model(exported)
    assert after.step == 7
    assert after.provenance == {"data": "made-up sentences"}
    for name, value in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], value)
    text = sentences(1)[0]
    assert Tokenizer.load(exported).encode(text) == Tokenizer.load(folder).encode(text)
    assert Tokenizer.load(exported).hash == Tokenizer.load(folder).hash


def test_a_card_can_be_given(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# Mine\n", encoding="utf-8")
    exported = export_model(folder, tmp_path / "out", card=tmp_path / "card.md")
    assert (exported / "README.md").read_text(encoding="utf-8") == "# Mine\n"
    load_model(exported)  # the manifest knows the card
    (tmp_path / "latin.md").write_bytes(b"# M\xfcller\n")
    for name, message in (("nowhere.md", "no file"), ("latin.md", "not UTF-8")):
        with pytest.raises(ConfigError, match=message):
            export_model(folder, tmp_path / "other", card=tmp_path / name)
    assert not (tmp_path / "other").exists()


def test_defaults_of_generation_can_be_stored(folder: Path, tmp_path: Path) -> None:
    before = load_model(folder).config
    exported = export_model(folder, tmp_path / "out", sample=["solver=sde", "steps=7"])
    config = load_model(exported).config
    assert (config.sample.solver, config.sample.steps) == ("sde", 7)
    assert config.sample.noise_scale == before.sample.noise_scale
    assert config.train == before.train
    for wrong, message in (
        ("solvr=sde", "'solvr' is not a setting of the sampler, which has steps, solver"),
        ("model.width=3", "'model.width' is not a setting of the sampler"),
        ("steps=0", "between 1 and"),
        ("steps", "no value"),
        ("grid=warp", "without time.warp"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_model(folder, tmp_path / "other", sample=[wrong])
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_transformers_loads_the_export_without_ddlm(
    folder: Path, exported: Path, tmp_path: Path
) -> None:
    texts = sentences(2, seed=3)
    texts[1] = texts[1][:12]
    seen = read_without_ddlm(exported, texts, tmp_path)
    assert seen["labels"] == 3
    network = load_model(folder).model
    for ids, mask, hidden, text in zip(
        seen["ids"], seen["mask"], seen["hidden"], texts, strict=True
    ):
        length = sum(mask)
        assert ids[:length] == Tokenizer.load(folder).encode(text)
        x0 = network.embed(torch.tensor([ids[:length]]))
        nothing = torch.zeros(1, length, dtype=torch.bool)
        expected = network.hidden_states(x0, torch.tensor([1.0]), nothing)[0]
        torch.testing.assert_close(torch.tensor(hidden)[:length], expected, rtol=1e-4, atol=1e-5)


def test_the_card_states_what_is_known(exported: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "language:" not in card  # nothing says of what language the text was
    assert "| updates | 7 |" in card
    assert "made-up sentences" in card
    total = sum(p.numel() for p in load_model(exported).model.parameters())
    assert f"| parameters | {total:,} |" in card


def test_half_precision_halves_the_file(folder: Path, exported: Path, tmp_path: Path) -> None:
    half = export_model(folder, tmp_path / "half", dtype="bfloat16")
    sizes = [(f / "model.safetensors").stat().st_size for f in (half, exported)]
    assert sizes[0] < 0.6 * sizes[1]
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_strangers_folder_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is not an exported model"):
        export_model(folder, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="is the model itself"):
        export_model(folder, folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["export", "no-such-model", "--out", str(tmp_path / "file" / "model")]) == 2
    assert "is no folder: name another" in capsys.readouterr().err


def test_only_an_older_export_is_replaced(folder: Path, tmp_path: Path) -> None:
    """A model, a checkpoint with the state of its optimizer, and what somebody put beside an export all stay."""
    model = write_tiny_model(tmp_path / "model")

    def train(part: Path) -> None:
        (part / "training").mkdir()
        (part / "training" / "optimizer.safetensors").write_bytes(b"weeks of work")

    loaded = load_model(folder)
    checkpoint = save_model(
        tmp_path / "step-7", loaded.model, loaded.config, tokenizer_from=folder, extra=train
    )
    noted = export_model(folder, tmp_path / "noted")
    (noted / "notes.txt").write_text("mine")
    trained = export_model(folder, tmp_path / "trained")
    (trained / "training").mkdir()
    torn = export_model(folder, tmp_path / "torn")
    (torn / "manifest.json").write_text("{")
    tuned = export_model(folder, tmp_path / "tuned")
    listed = json.loads((tuned / "manifest.json").read_text()) | {"kind": "finetuned"}
    (tuned / "manifest.json").write_text(json.dumps(listed))
    for out, message in (
        (tuned, "is not an exported model: it holds a fine-tuned one"),
        (model, "is not an exported model:"),
        (checkpoint, "is not an exported model:"),
        (noted, "is not an exported model alone: it holds notes.txt"),
        (trained, "is not an exported model alone: it holds training/"),
        (torn, "is not an exported model:"),
        (torn / "README.md", "is not an exported model:"),
    ):
        before = contents(tmp_path)
        with pytest.raises(ConfigError, match=message):
            export_model(folder, out)
        assert contents(tmp_path) == before
    older = export_model(folder, tmp_path / "older", dtype="bfloat16")
    export_model(folder, older)
    assert json.loads((older / "config.json").read_text())["dtype"] == "float32"


# ---- the hub, played by a small server


def test_push_uploads_the_export_with_the_environments_token(folder: Path, tmp_path: Path) -> None:
    shown, requests = push(folder, tmp_path)
    assert "/me/tiny/commit/0" in shown
    ours = [r for r in requests if r[0].startswith(("/api/repos", "/api/models"))]
    assert {authorization for _, authorization, _ in ours} == {"Bearer hf_secret"}
    commit = next(body for path, _, body in requests if "/commit/" in path)
    entries = [json.loads(line) for line in commit.splitlines()]
    sent = {e["value"]["path"]: e["value"] for e in entries if e["key"] == "file"}
    assert {
        "config.json",
        "model.safetensors",
        "manifest.json",
        "README.md",
        "modeling_ddlm.py",
    } <= set(sent)
    assert not [name for name in sent if name.endswith((".bin", ".pt", ".pkl"))]
    config = json.loads(base64.b64decode(sent["config.json"]["content"]))
    assert config["model_type"] == "ddlm"
    assert "hf_secret" not in commit.decode()


def test_push_without_token_or_name_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="is not a hub id like owner/name"):
        push_model(folder, "no/such/name")
    with pytest.raises(ConfigError, match="'tiny' is not a hub id like owner/name: the owner"):
        push_model(folder, "tiny")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no hub token was found: set HF_TOKEN"):
        push_model(folder, "me/tiny")


def test_a_hub_that_cannot_be_reached_is_one_line(folder: Path, tmp_path: Path) -> None:
    shown, _ = push(folder, tmp_path, address="http://127.0.0.1:9")  # nobody listens there
    assert shown.startswith("the hub did not take me/tiny: ")
    assert shown.count("\n") == 1


def test_what_should_be_private_is_not_uploaded_to_a_public_repository(
    folder: Path, tmp_path: Path
) -> None:
    shown, requests = push(folder, tmp_path, private=True)
    assert "it is there already and public" in shown
    assert not [path for path, _, _ in requests if "/commit/" in path]
