from __future__ import annotations

import numpy as np
import pytest
import torch

from ddlm.data.loader import Batches, permute, validation_batches
from ddlm.data.prepare import prepare
from ddlm.data.shards import TokenShards
from ddlm.data.tokenizer import Tokenizer
from ddlm.types import ConfigError

from .conftest import make_texts, write_jsonl

LENGTH = 16


@pytest.fixture(scope="module")
def data(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    folder = tmp_path_factory.mktemp("loader")
    corpus = write_jsonl(folder / "a.jsonl", make_texts(150))
    prepare(corpus, folder / "out", tokenizer=tokenizer, val_fraction=0.2, shard_tokens=1000)
    shards = TokenShards(folder / "out")
    assert len(shards.index["splits"]["train"]["shards"]) > 2  # windows cross shards
    return shards


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100, 1000, 4097])
def test_permute_is_a_permutation_that_depends_on_its_key(size: int) -> None:
    images = [permute(np.arange(size), size, np.array([k], np.uint64)) for k in range(4)]
    for image in images:
        assert sorted(image.tolist()) == list(range(size))
    if size >= 100:
        assert len({tuple(i.tolist()) for i in images}) == 4
        # Neighbours are torn apart: far fewer than 1% stay neighbours... at chance level 2/size.
        assert np.mean(np.abs(np.diff(images[0])) == 1) < 0.1
    # Any selection gives the same images as the whole.
    some = np.arange(0, size, 3)
    assert (permute(some, size, np.array([1], np.uint64)) == images[1][some]).all()


def test_permute_is_close_to_uniform() -> None:
    counts = np.zeros((50, 50))
    draws = 2000
    for key in range(draws):
        image = permute(np.arange(50), 50, np.array([key * 7919 + 1], np.uint64))
        counts[np.arange(50), image] += 1
    expected = draws / 50
    chi2 = ((counts - expected) ** 2 / expected).sum()
    degrees = 49 * 49
    assert abs(chi2 - degrees) < 5 * np.sqrt(2 * degrees)


def test_every_window_once_an_epoch_and_boundaries_move(data: TokenShards) -> None:
    batches = Batches(data, length=LENGTH, batch_size=1, seed=3)
    offsets = []
    for epoch in range(3):
        first = epoch * batches.windows
        starts = batches.starts(np.arange(first, first + batches.windows))
        offsets.append(int(starts.min() % LENGTH))
        positions = (starts[:, None] + np.arange(LENGTH)) % data.tokens("train")
        assert len(np.unique(positions)) == positions.size == batches.tokens_per_epoch
    assert len(set(offsets)) > 1
    assert batches.tokens_per_epoch > data.tokens("train") - LENGTH
    assert batches.epoch(batches.windows) == 1.0


def test_batches_hold_the_text_at_their_starts(data: TokenShards) -> None:
    batches = Batches(data, length=LENGTH, batch_size=4, seed=1)
    stream = data.read("train", 0, data.tokens("train"))
    ring = np.concatenate([stream, stream[:LENGTH]])
    for step in (0, 7, batches.windows):
        batch = batches.batch(step)
        assert batch.dtype == torch.int64
        assert batch.shape == (4, LENGTH)
        starts = batches.starts(np.arange(step * 4, step * 4 + 4))
        for row, start in zip(batch.numpy(), starts, strict=True):
            assert (row == ring[start : start + LENGTH]).all()


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_global_batch_is_the_same_for_every_world_size(data: TokenShards, world_size: int) -> None:
    whole = Batches(data, length=LENGTH, batch_size=12, seed=5)
    ranks = [
        Batches(data, length=LENGTH, batch_size=12, seed=5, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for step in (0, 1, 40):  # step 40 lies beyond the first epoch
        assert torch.equal(torch.cat([b.batch(step) for b in ranks]), whole.batch(step))


def test_a_batch_depends_on_seed_and_step_only(data: TokenShards) -> None:
    one = Batches(data, length=LENGTH, batch_size=8, seed=1)
    for _ in zip(range(5), one, strict=False):
        pass
    fresh = Batches(data.folder, length=LENGTH, batch_size=8, seed=1)
    assert torch.equal(one.batch(9), fresh.batch(9))
    assert not torch.equal(one.batch(9), one.batch(10))
    assert not torch.equal(
        one.batch(9), Batches(data, length=LENGTH, batch_size=8, seed=2).batch(9)
    )


def test_validation_batches_are_fixed_and_whole(data: TokenShards) -> None:
    windows = data.tokens("val") // LENGTH
    found = torch.cat(list(validation_batches(data, length=LENGTH, batch_size=4)))
    assert len(found) == windows - windows % 4
    stream = data.read("val", 0, len(found) * LENGTH).reshape(-1, LENGTH)
    assert (found.numpy() == stream).all()
    some = torch.cat(list(validation_batches(data, length=LENGTH, batch_size=4, limit=8)))
    assert some.shape == (8, LENGTH)
    halves = [
        torch.cat(list(validation_batches(data, length=LENGTH, batch_size=4, rank=r, world_size=2)))
        for r in range(2)
    ]
    joined = torch.stack([h.view(-1, 2, LENGTH) for h in halves], 1).reshape(-1, LENGTH)
    assert torch.equal(joined, found)
    one = list(validation_batches(data, length=LENGTH, batch_size=10_000))
    assert [len(b) for b in one] == [windows]


def test_bad_sizes(data: TokenShards) -> None:
    with pytest.raises(ConfigError, match="fewer than one sequence of 1000000"):
        Batches(data, length=1_000_000, batch_size=1)
    with pytest.raises(ConfigError, match="multiple of 3"):
        Batches(data, length=LENGTH, batch_size=4, world_size=3)
    with pytest.raises(ConfigError, match="hold out more"):
        next(validation_batches(data, length=100_000, batch_size=1))
    with pytest.raises(ConfigError, match="rank 2"):
        Batches(data, length=LENGTH, batch_size=4, rank=2, world_size=2)


def test_numbers_of_numpy_are_numbers(data: TokenShards) -> None:
    plain = Batches(data, length=LENGTH, batch_size=4, seed=3)
    other = Batches(data, length=np.int64(LENGTH), batch_size=np.int32(4), seed=np.uint8(3))  # type: ignore[arg-type]
    assert torch.equal(other.batch(np.int64(5)), plain.batch(5))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"length is 8\.5, it must be a whole number"):
        Batches(data, length=8.5, batch_size=4)  # type: ignore[arg-type]
