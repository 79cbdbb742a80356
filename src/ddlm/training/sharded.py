"""The tensors a run goes on with: one file, or under FSDP2 one a process (torch.distributed.checkpoint, safetensors).

Shards carry where each of their parts lies in the whole tensor, so that any number of processes reads what another
number wrote, each its own part of it. No process holds a whole tensor, and nothing is pickled.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddlm.files import CheckpointError, read_tensors, write_tensors
from ddlm.types import ConfigError

_WHOLE = "state.safetensors"


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether some tensor lies in parts with several processes."""
    return any(hasattr(t, "full_tensor") for t in tensors.values())


def check_can_shard() -> None:
    """Make sure, before the first step, that this PyTorch writes shards as safetensors.

    Raises:
        ConfigError: when it is too old.
    """
    writer = getattr(_distributed_checkpoint(), "HuggingFaceStorageWriter", None)
    if (
        writer is None or "save_distributed" not in signature(writer).parameters
    ):  # 2.8 has the first alone
        raise ConfigError(
            f"PyTorch {torch.__version__} cannot write FSDP's checkpoints as safetensors: update it to 2.9 or later, "
            "or set train.strategy=ddp"
        )


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this process's parts into ``folder``, which all processes must see. Collective.

    Args:
        folder: A new folder, the same one in every process.
        tensors: Sharded and plain tensors by name, the same names in every process; of a plain one a single copy is
            written.

    Raises:
        OSError: in every process, when one of them could not write.
    """
    checkpoint = _distributed_checkpoint()
    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        checkpoint.save({k: v.detach() for k, v in tensors.items()}, storage_writer=writer)
    except checkpoint.CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values()]
        raise next((e for e in causes if isinstance(e, OSError)), causes[0]) from None


def write_whole(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors into one file of ``folder``."""
    write_tensors(folder / _WHOLE, tensors)


def move_shards(source: Path, folder: Path) -> None:
    """Move what :func:`write_shards` left into the folder of a checkpoint on the same file system."""
    for file in sorted(source.iterdir()):
        file.rename(folder / file.name)
    shutil.rmtree(source)


class SavedTensors:
    """What ``training/`` of a checkpoint holds, whichever way it was written.

    Attributes:
        sizes: Whole sizes by name.

    Raises:
        CheckpointError: when the files cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._whole: dict[str, Tensor] | None = None
        if (folder / _WHOLE).is_file() or not any(folder.glob("*.safetensors")):
            self._whole = read_tensors(folder / _WHOLE)
            self.sizes = {k: v.shape for k, v in self._whole.items()}
            return
        check_can_shard()
        try:
            found = self._reader().read_metadata().state_dict_metadata
        except Exception as error:
            raise CheckpointError(
                f"{folder} is damaged ({error}): use another checkpoint"
            ) from None
        self.sizes = {k: v.size for k, v in found.items()}

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Copy saved values into plain or sharded tensors of the same whole sizes; a process reads its parts alone."""
        if self._whole is not None:
            for name, target in targets.items():
                put(target, self._whole[name])
            return
        with warnings.catch_warnings():
            # Reading needs no agreement between processes; torch warns that they are not asked.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            _distributed_checkpoint().load(
                {k: v.detach() for k, v in targets.items()},
                storage_reader=self._reader(),
                no_dist=True,
            )

    def _reader(self) -> Any:
        return _distributed_checkpoint().HuggingFaceStorageReader(str(self._folder))


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes (collective), any other as it is; detached."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def kept(tensor: Tensor) -> Tensor:
    """A sharded tensor for a file: whole on the host of the first process, empty in the others. Any other as it is.

    Collective; no device holds more than one whole tensor at a time.
    """
    full = whole(tensor)
    if not hasattr(tensor, "full_tensor"):
        return full
    return full.cpu() if dist.get_rank() == 0 else full.new_empty(0)


def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a plain or sharded one."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
        value = distribute_tensor(value.to(target.device), mesh, placements)
    target.copy_(value)


def _distributed_checkpoint() -> Any:
    """Imported when it is needed: most runs have one process."""
    import torch.distributed.checkpoint as checkpoint

    return checkpoint
