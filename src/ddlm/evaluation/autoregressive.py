"""Autoregressive baselines: built at a diffusion model's sizes, loaded, measured, sampled precisely enough to compare.

Beside them is what their training by transformers has to make sure of: tokenizer, device, compiler.

Axes: B sequences, T positions, V the vocabulary. The categorical draw is made in float64 by the inverse of the
cumulative distribution: low-precision Gumbel noise lowers the effective temperature and flatters likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ddlm.data.loader import validation_batches
from ddlm.data.shards import TokenShards
from ddlm.evaluation.extras import NOT_LOADED, missing_extra, quiet, why_not_loaded
from ddlm.evaluation.hub import local_folder
from ddlm.files import INDEX, SHARD_BYTES, WEIGHTS, read_tensors, tensor_room, weight_files
from ddlm.types import ConfigError

Architecture = Literal["gpt-neox", "gpt2"]
Dtype = Literal["float32", "bfloat16"]


def untrained(
    architecture: Architecture, sizes: Mapping[str, Any], context: int, **options: Any
) -> Any:
    """An autoregressive transformers model of a diffusion model's sizes, without dropout.

    Args:
        architecture: ``gpt-neox`` or ``gpt2``.
        sizes: ``vocab_size``, ``layers``, ``heads``, ``width`` and ``feed_forward``, as in ``model``.
        context: Positions.
        **options: Further fields of transformers' configuration.

    Raises:
        ConfigError: for another architecture.
    """
    transformers = missing_extra("transformers", "eval")
    shared = {
        "vocab_size": sizes["vocab_size"],
        "max_position_embeddings": context,
        # transformers' names of these hold for both kinds, its own configurations translate them
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
    }
    if architecture == "gpt-neox":
        config = transformers.GPTNeoXConfig(
            intermediate_size=sizes["feed_forward"], tie_word_embeddings=False, **shared, **options
        )
        return transformers.GPTNeoXForCausalLM(config)
    if architecture == "gpt2":
        config = transformers.GPT2Config(
            n_inner=sizes["feed_forward"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **shared,
            **options,
        )
        return transformers.GPT2LMHeadModel(config)
    raise ConfigError(f"architecture {architecture} is unknown: gpt-neox or gpt2")


def save_tokenizer(shards: TokenShards, out: Path) -> None:
    """Save the tokenizer for transformers, and make sure before training that it reads it as the same one."""
    transformers = missing_extra("transformers", "eval")
    ours = shards.tokenizer
    ours.save(out)
    text = ours.decode(shards.read("train", 0, min(200, shards.tokens("train"))).tolist())
    try:
        with quiet():
            theirs = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=False)
        same = theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    except Exception:  # whatever it stumbles over, the tokenizer is not usable there
        same = False
    if not same:
        raise ConfigError(
            f"transformers does not read the tokenizer of {shards.folder} as the same one (a SentencePiece unigram"
            " model?): prepare the data with a byte-level BPE, WordPiece or SentencePiece BPE tokenizer"
        )


def keep_to_one_device(arguments: Any) -> None:
    """Train on one GPU where several are visible: the Trainer would multiply the batch by their number.

    ``n_gpu`` has no setter; the Trainer itself writes the attribute behind it where it wants no DataParallel.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


def save_baseline(model: Any, out: Path, dtype: Dtype = "float32") -> None:
    """Save a causal language model for transformers, in shards as an export's where it is larger.

    Args:
        model: The model; its own weights take the type that is written.
        out: Folder.
        dtype: Of the weights.
    """
    # Of an earlier call: save_pretrained leaves an old index, and an old single file, which would be read first.
    for name in (WEIGHTS, INDEX):
        (out / name).unlink(missing_ok=True)
    room = tensor_room(model.state_dict(), SHARD_BYTES)
    with quiet():
        model.to(getattr(torch, dtype)).save_pretrained(out, max_shard_size=room)


def saved_dtype(folder: Path) -> str | None:
    """Type of a folder's weights, such as ``bfloat16``, or None where there are no weights.

    Raises:
        CheckpointError: for weights that are damaged.
    """
    for file in weight_files(folder):
        for tensor in read_tensors(file).values():
            return str(tensor.dtype).removeprefix("torch.")
    return None


def load_baseline(folder: str | Path) -> Any:
    """A causal language model in float32, whatever its weights are saved in, ready for sampling.

    Raises:
        ConfigError: if there is none, or its weights are damaged.
    """
    path, _ = local_folder(str(folder), what="baseline", flag="--model")
    transformers = missing_extra("transformers", "eval")
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
    except NOT_LOADED as error:
        raise ConfigError(f"cannot load {folder}: {why_not_loaded(error)}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.inference_mode()
def held_out_loss(
    model: Any, shards: TokenShards, *, context: int, batch: int, limit: int = 2000
) -> tuple[float, int]:
    """Mean loss in nats per token on the held-out split, and the number of tokens it is over.

    Args:
        model: A causal language model of transformers.
        shards: Prepared data.
        context: Tokens of a sequence.
        batch: Sequences at once.
        limit: Sequences of 64 tokens at most, or as many tokens in longer ones.
    """
    if shards.tokens("val") < context:
        return math.nan, 0
    model.eval()
    total, count = 0.0, 0
    for tokens in validation_batches(
        shards, length=context, batch_size=batch, limit=max(1, limit * 64 // context)
    ):
        ids = tokens.to(model.device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        total, count = total + float(nll), count + ids[:, 1:].numel()
    return total / count, count


@torch.inference_mode()
def sample_autoregressive(
    model: Any,
    tokens: Tensor,
    is_noised: Tensor,
    seeds: list[int],
    *,
    start: int,
    temperature: float = 1.0,
) -> Tensor:
    """Write the continuation of each row.

    Args:
        model: A causal language model of transformers.
        tokens: ``(B, T)``; what stands at noised positions does not matter.
        is_noised: ``(B, T)``, True where tokens are to be written: the same suffix in every row.
        seeds: One for each row: a row depends on its own seed alone.
        start: Token before the first one (beginning of text).
        temperature: Divides the logits.

    Returns:
        ``(B, T)`` int64.

    Raises:
        ConfigError: if something after the continuation is given, which an autoregressive model cannot use, or the
            temperature is not above 0.
    """
    if not 0 < temperature < float("inf"):
        raise ConfigError(
            f"temperature {temperature:g} was given, it must be above 0 (a small one, such as 0.01, is nearly greedy)"
        )
    if not bool((is_noised == is_noised[0]).all()):
        raise ConfigError("the rows of a batch must all continue from the same position")
    T = tokens.shape[1]
    given = int((~is_noised[0]).sum())
    if bool(is_noised[0, :given].any()):
        raise ConfigError("an autoregressive model continues a prefix; it cannot fill in a middle")
    device = model.device
    # One uniform number for each position, drawn from the row's own generator.
    u = torch.stack(
        [
            torch.rand(T, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
            for s in seeds
        ]
    ).to(device)
    out = tokens.to(device).clone()
    ids = torch.cat([torch.full_like(out[:, :1], start), out[:, :given]], dim=1)
    past: Any = None
    for position in range(given, T):
        step = model(input_ids=ids, past_key_values=past, use_cache=True)
        past = step.past_key_values
        p = torch.softmax(step.logits[:, -1].double() / temperature, dim=-1)  # (B, V)
        ids = draw(p, u[:, position])[:, None]
        out[:, position] = ids[:, 0]
    return out.cpu()


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF draws ``(B,)`` from probabilities ``p (B, V)`` with uniform numbers ``u (B,)``, in float64."""
    cdf = p.cumsum(-1)
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp_(
        max=p.shape[1] - 1
    )
