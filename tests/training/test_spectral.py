"""Embeddings that start from counts: against a dense computation by the definition, and in a run."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddlm.checkpoint import checkpoints, load_model
from ddlm.config import Config
from ddlm.data.shards import TokenShards
from ddlm.network.denoiser import DDLM
from ddlm.training.loop import train
from ddlm.training.spectral import spectral_embeddings
from ddlm.types import ConfigError
from training.runs import Counting, run, shards_in, small_config, tensors_of


def dense(ids: list[int], vocab_size: int, width: int, window: int) -> np.ndarray:
    """Smoothed positive PMI, its singular value decomposition, centred and normalised: loops and float64."""
    joint: Counter[tuple[int, tuple[int, int]]] = Counter()
    for i, token in enumerate(ids):
        for offset in [*range(-window, 0), *range(1, window + 1)]:
            if 0 <= i + offset < len(ids):
                joint[token, (offset, ids[i + offset])] += 1
    of_token: Counter[int] = Counter()
    of_context: Counter[tuple[int, int]] = Counter()
    for (token, context), count in joint.items():
        of_token[token] += count
        of_context[context] += count
    smooth = {c: n**0.75 for c, n in of_context.items()}
    total = sum(smooth.values())
    columns = {c: j for j, c in enumerate(of_context)}
    matrix = np.zeros((vocab_size, len(columns)))
    for (token, context), count in joint.items():
        information = math.log(count / of_token[token] / (smooth[context] / total))
        matrix[token, columns[context]] = max(information, 0.0)
    left, singular, _ = np.linalg.svd(matrix, full_matrices=False)
    rows = left[:, :width] * np.sqrt(singular[:width])
    rows -= rows.mean(0)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_it_is_the_decomposition_of_the_mutual_information() -> None:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(24, 0.3), size=24)  # a Markov chain of 24 tokens
    ids = [0]
    for _ in range(4000):
        ids.append(int(rng.choice(24, p=weights[ids[-1]])))
    # Twice the width is the whole rank here, so the randomised decomposition is exact.
    ours = spectral_embeddings(np.array(ids), 24, 12).double().numpy()
    theirs = dense(ids, 24, 12, window=2)
    # Singular vectors have a sign of their own; the angles between tokens do not depend on it.
    assert np.abs(ours @ ours.T - theirs @ theirs.T).max() < 1e-3


def test_tokens_of_one_class_are_neighbours() -> None:
    rng = np.random.default_rng(1)
    order = (
        np.arange(20_000) % 4
    )  # the class of each position; which of its 10 tokens stands there is chance
    ids = order * 10 + rng.integers(0, 10, len(order))
    rows = spectral_embeddings(ids, 40, 4)
    cosine = rows @ rows.T
    same = (torch.arange(40)[:, None] // 10) == (torch.arange(40) // 10)
    assert cosine[same].min() > 0.8
    assert cosine[~same].max() < 0.3


def test_unknown_tokens_get_directions_of_their_own() -> None:
    ids = np.random.default_rng(2).integers(0, 30, 5000)
    rows = spectral_embeddings(ids, 40, 8, seed=3)
    assert torch.allclose(rows.norm(dim=1), torch.ones(40))
    unknown = rows[30:] @ rows[30:].T
    assert unknown.fill_diagonal_(0).max() < 0.99
    assert torch.equal(rows, spectral_embeddings(ids, 40, 8, seed=3))
    assert not torch.equal(rows[30:], spectral_embeddings(ids, 40, 8, seed=4)[30:])


def config_for(folder: Path, **settings: Any) -> tuple[Config, TokenShards]:
    """A run on shards with spectral embeddings."""
    config = small_config(embeddings="spectral", **settings)
    shards = shards_in(folder)
    config.data.path = str(folder / "data")
    config.model.vocab_size = shards.vocab_size
    return config, shards


def test_a_run_starts_from_its_corpus(tmp_path: Path) -> None:
    config, shards = config_for(tmp_path, steps=2, lr=1e-9)
    result = train(config, tmp_path / "run", quiet=True)
    model = load_model(result.checkpoint).model
    assert isinstance(model, DDLM)
    ids = shards.read("train", 0, shards.tokens("train"))
    expected = spectral_embeddings(
        ids, config.model.vocab_size, config.model.embedding_width, seed=config.train.seed
    )
    found = torch.nn.functional.normalize(model.embedding.detach(), dim=-1)
    assert (found - expected).abs().max() < 1e-5  # the average started there too
    assert float(model.head.bias.detach().abs().max()) < 1e-6
    # The head's rows lie as the embeddings do, and are as long as rows drawn from Normal(0, 0.02)
    head = model.head.weight.detach() / (0.02 * math.sqrt(config.model.width))
    assert (head @ head.T - expected @ expected.T).abs().max() < 1e-5


def test_a_resumed_run_is_not_started_again(tmp_path: Path) -> None:
    config, _ = config_for(tmp_path, steps=3)
    whole = train(config, tmp_path / "whole", quiet=True)

    def stop(_model: DDLM, step: int) -> None:
        if step == 2:
            raise RuntimeError("stopped")

    config.train.sample_every = config.train.checkpoint_every = 1
    with pytest.raises(RuntimeError, match="stopped"):
        train(config, tmp_path / "cut", quiet=True, sample=stop)
    assert checkpoints(tmp_path / "cut")
    config.train.sample_every, config.train.checkpoint_every = 0, 1000
    again = train(config, tmp_path / "cut", quiet=True)
    assert tensors_of(again.checkpoint) == tensors_of(whole.checkpoint)


def test_a_given_model_goes_before_counts(tmp_path: Path) -> None:
    config, _ = config_for(tmp_path, steps=1, lr=1e-9)
    config.train.embeddings = "random"
    source = train(config, tmp_path / "source", quiet=True).checkpoint
    config.train.embeddings = "spectral"
    made = train(config, tmp_path / "run", quiet=True, initial=source).checkpoint
    before, after = (load_model(f).model.state_dict()["embedding"] for f in (source, made))
    assert torch.allclose(before, after, atol=1e-6)


def test_attention_starts_by_looking_at_what_is_alike(tmp_path: Path) -> None:
    """W_q = W_k in every block, the values and everything else as without it, in the weights and in their average."""
    starts = {}
    for how in ("random", "matching"):
        config = small_config(attention=how, steps=1, lr=1e-9)
        starts[how] = load_model(
            run(tmp_path / how, config, source=Counting()).checkpoint
        ).model.state_dict()
    for name, before in starts["random"].items():
        after = starts["matching"][name]
        if name.endswith("qkv.weight"):
            width = before.shape[1]
            queries, keys, values = after.split(width)
            assert torch.allclose(queries, keys, atol=1e-6)
            assert torch.allclose(queries, 2 * before[:width], atol=1e-6)
            before, after = before[2 * width :], values
        assert torch.allclose(before, after, atol=1e-6), name


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path"):
        run(tmp_path / "run", small_config(embeddings="spectral"), source=Counting())
    config, _ = config_for(tmp_path, steps=1)
    config.model.embedding_width = config.model.vocab_size + 1
    with pytest.raises(ConfigError, match=r"embedding_width .* at most"):
        train(config, tmp_path / "wide", quiet=True)


def test_unknown_tokens_do_not_lie_along_the_noise_of_a_seed() -> None:
    ids = np.random.default_rng(2).integers(0, 30, 5000)
    rows = spectral_embeddings(ids, 60, 32, seed=3)
    # A text with the seed of the training draws its noise row by row, as many as it has positions
    noise = torch.randn(60, 32, generator=torch.Generator().manual_seed(3))
    assert torch.cosine_similarity(rows[30:], noise[30:]).max() < 0.8
