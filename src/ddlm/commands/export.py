"""``ddlm export`` and ``ddlm push``: a model for others."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def export(
    model: str,
    *,
    out: Path,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    card: Path | None = None,
    sample: list[str] | None = None,
) -> None:
    """Write a model as a folder that ddlm and transformers (trust_remote_code) load, with its card.

    Args:
        model: Model folder, run folder or hub id.
        out: Folder to write.
        dtype: Precision of the stored weights.
        card: Markdown file that becomes the model card; none: the model's own, or one of what is known about it.
        sample: Defaults of generation to store with it, such as solver=sde steps=100; the others stay.
    """
    from ddlm.files import SHARD_BYTES, check_folder, weight_files
    from ddlm.integrations.export import export_model

    # where it is renamed from; told before the model is read
    check_folder(out.resolve().parent, "--out")
    folder = export_model(model, out, dtype=dtype, card=card, sample=sample or ())
    size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    for file in weight_files(folder):
        if file.stat().st_size > SHARD_BYTES:  # it holds one tensor, and no index can cut a tensor
            over = f"{file.stat().st_size / 2**20:.1f} MiB, more than {SHARD_BYTES / 2**20:g}"
            half = " (--dtype bfloat16 halves it)" if dtype == "float32" else ""
            print(f"{file} has {over}: a single matrix is that large{half}")
    print(
        f"{folder}: {size / 2**20:.1f} MiB, loads with ddlm.load and with transformers' AutoModel"
    )


def push(model: str, *, to: str, private: bool = False, message: str = "Upload the model") -> None:
    """Export a model and upload it to the Hugging Face hub; the token comes from HF_TOKEN or `hf auth login`.

    Args:
        model: Model folder, run folder or hub id.
        to: owner/name on the hub; made when it is not there.
        private: Make a new repository private; one that is there and public is refused.
        message: Commit message on the hub.
    """
    from ddlm.integrations.export import push_model

    print(push_model(model, to, private=private, message=message))
