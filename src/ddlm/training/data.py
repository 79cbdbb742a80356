"""The data of a run: training and held-out batches, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddlm.config import Config
from ddlm.data.shards import TokenShards
from ddlm.training.distributed import World
from ddlm.training.validation import BatchSource
from ddlm.types import ConfigError

HELD_OUT_BATCH = 64

VERIFIED_BYTES = 4 << 30
"""Shards up to this size are compared with their hashes whenever a training starts (seconds); larger ones by size."""


@dataclass(frozen=True)
class RunData:
    """Batches of a run.

    Attributes:
        train: This process's training batches.
        held_out: Held-out batches, the same in every process, or None.
        tokenizer_folder: Folder whose tokenizer files go into checkpoints, or None.
        provenance: Facts about the data for the manifest.
        shards: The data set itself, or None when batches were given.
    """

    train: BatchSource
    held_out: BatchSource | None
    tokenizer_folder: Path | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    shards: TokenShards | None = None

    def check_tokenizer(self, checkpoint: Path) -> None:
        """Refuse to go on with shards of another tokenizer than a checkpoint or model was trained with.

        Raises:
            ConfigError: when they differ.
        """
        from ddlm.checkpoint import TOKENIZER_FILES
        from ddlm.data.tokenizer import Tokenizer
        from ddlm.files import read_manifest

        mine = self.provenance.get("tokenizer")
        if not mine:
            return
        theirs = (read_manifest(checkpoint).get("provenance") or {}).get("tokenizer")
        if not theirs and any((checkpoint / name).is_file() for name in TOKENIZER_FILES):
            theirs = Tokenizer.load(checkpoint).hash  # a model whose origin was not recorded
        if theirs and theirs != mine:
            raise ConfigError(
                f"the shards in {self.tokenizer_folder} were made with another tokenizer ({mine[:12]}) than "
                f"{checkpoint} was trained with ({theirs[:12]}): prepare the data with --tokenizer {checkpoint}"
            )


def open_data(
    config: Config, world: World, source: BatchSource | None, held_out: BatchSource | None
) -> RunData:
    """Open the shards at ``data.path``, or take the batches that were given.

    Raises:
        ConfigError: for missing, damaged or too small data, or a tokenizer with more entries than the model.
    """
    if source is not None:
        if config.train.embeddings == "spectral":
            raise ConfigError(
                "train.embeddings: spectral counts the tokens of shards: name them with data.path"
            )
        return RunData(source, held_out)
    if not config.data.path:
        raise ConfigError("no data was named: give --data.path FOLDER, as written by ddlm prepare")
    from ddlm.data.loader import Batches

    shards = TokenShards(config.data.path)
    if world.is_main and shards.nbytes <= VERIFIED_BYTES:
        shards.verify()
    if shards.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer of {config.data.path} has {shards.vocab_size} entries, the model only "
            f"{config.model.vocab_size}: set model.vocab_size={shards.vocab_size} or prepare with a smaller one"
        )
    train = Batches(
        shards,
        length=config.model.length,
        batch_size=config.train.batch,
        seed=config.train.seed,
        rank=world.rank,
        world_size=world.size,
    )
    rows = min(HELD_OUT_BATCH, shards.tokens("val") // config.model.length)
    if held_out is None and rows:
        held_out = Batches(shards, split="val", length=config.model.length, batch_size=rows)
    provenance = {
        "data": shards.hash,
        "tokenizer": shards.tokenizer_hash,
        "tokens": shards.tokens("train"),
    }
    return RunData(train, held_out, shards.folder, provenance, shards)
