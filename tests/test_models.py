"""The weights in the repository: whole, small enough, usable at once, and not behind the code they carry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ddlm
from ddlm.checkpoint import load_model
from ddlm.integrations.remote_code import remote_code

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
MIB = 2**20


def folders() -> list[Path]:
    return sorted(p for p in MODELS.iterdir() if p.is_dir())


def diffusion() -> list[Path]:
    return [p for p in folders() if (p / "manifest.json").is_file()]


def baselines() -> list[Path]:
    return [p for p in folders() if (p / "plan.json").is_file()]


def test_sizes_are_within_what_a_repository_bears() -> None:
    files = [p for p in MODELS.rglob("*") if p.is_file()]
    assert {p.name for p in folders()} >= {
        "ddlm-small",
        "ddlm-small-ar",
        "ddlm-tiny",
        "ddlm-tiny-ar",
    }
    assert max(p.stat().st_size for p in files) <= 16 * MIB
    assert sum(p.stat().st_size for p in files) < 120 * MIB
    tiny = sum(p.stat().st_size for p in (MODELS / "ddlm-tiny").iterdir())
    assert tiny <= 12e6


def test_nothing_is_pickled_or_opaque() -> None:
    kinds = {p.suffix for p in MODELS.rglob("*") if p.is_file()}
    assert kinds <= {".safetensors", ".json", ".yaml", ".py", ".md"}


@pytest.mark.parametrize("folder", folders(), ids=lambda p: p.name)
def test_each_has_a_card(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"# {folder.name}" in card
    assert "{{" not in card  # every mark of the text was filled
    assert "licen" in card.lower()


@pytest.mark.parametrize("folder", diffusion(), ids=lambda p: p.name)
def test_the_code_beside_the_weights_is_this_packages(folder: Path) -> None:
    """A changed network has to be exported again: `ddlm export` as the card's record says."""
    for name, text in remote_code().items():
        assert (folder / name).read_text(encoding="utf-8") == text, name


@pytest.mark.parametrize("folder", diffusion(), ids=lambda p: p.name)
def test_the_weights_load_verified_and_write(folder: Path) -> None:
    loaded = load_model(folder)  # compares every file with the manifest
    assert loaded.step is not None
    assert loaded.provenance["tokens"] > 0
    lm = ddlm.load(folder)
    texts = lm.generate("The river {16} the sea.", samples=2, steps=10, seed=0)
    assert len({t.text for t in texts}) == 2
    for text in texts:
        assert text.text.startswith("The river")
        assert text.text.endswith("the sea.")


@pytest.mark.parametrize("folder", diffusion(), ids=lambda p: p.name)
def test_the_weights_know_more_than_frequencies(folder: Path) -> None:
    """English in order is likelier to the network than the same tokens shuffled: at every position but its own."""
    lm = ddlm.load(folder, device="cpu")
    text = (
        "He looked at her for a moment, and then he turned to the window and said that it was time to "
        "go home, for the night was cold and the road was long."
    )
    tokens = torch.tensor(lm.tokenizer.encode(text))[: lm.length]
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))]
    assert _nll(lm, tokens) < _nll(lm, shuffled) - 1.0


@torch.no_grad()
def _nll(lm: ddlm.DiffusionLM, tokens: torch.Tensor) -> float:
    """Mean of -log p(token | all others, its own noise at t_max) in nats, one position noised at a time."""
    n = len(tokens)
    rows, is_noised = tokens.expand(n, n), torch.eye(n, dtype=torch.bool)
    t = torch.full((n,), lm.process.t_max)
    noise = torch.randn(
        n, n, lm.config.model.embedding_width, generator=torch.Generator().manual_seed(0)
    )
    model = lm.model.eval()
    xt = lm.process.add_noise(model.embed(rows), t, noise, is_noised)
    hidden = model.hidden_states(xt, t, is_noised)[is_noised]
    _, cross_entropy = model.cross_entropy(hidden, tokens, torch.full((n,), 1 / n))
    return float(cross_entropy.mean())


@pytest.mark.parametrize("folder", baselines(), ids=lambda p: p.name)
def test_a_baseline_is_a_judge_that_the_baseline_command_leaves(folder: Path) -> None:
    from ddlm.evaluation.judges import TRAINED_HASHES, Judge
    from ddlm.files import read_tensors
    from ddlm.types import DataError

    note = json.loads((folder / "trained_on.json").read_text(encoding="utf-8"))
    hashes = read_tensors(folder / TRAINED_HASHES)["hashes"]
    assert hashes.numel() == note["documents"]
    judge = Judge(str(folder))
    english, salad = (
        "It was the best of times in the old house.",
        "house old best the was of It in times the.",
    )
    scores = judge.score([english, salad])
    assert scores[0].nll / scores[0].tokens < scores[1].nll / scores[1].tokens
    with pytest.raises(DataError, match="training data of the judge"):
        judge.check_held_out([int(hashes[0]) % 2**64])
