"""Embeddings from counts: a start from the corpus instead of from random numbers.

V vocabulary, D embedding width, W hidden width, N tokens counted, C contexts (2 * window * V).

Diffusion reads a token off its noise by its direction, so directions that group tokens by use tell the network at high
noise what kind of token stands there, long before its own gradients would. Counting the neighbours of every token takes
seconds; the directions are a truncated singular value decomposition of the positive pointwise mutual information with
contexts that know their offset, with the exponents that did best in Levy, Goldberg & Dagan (2015): 0.75 smooths the
contexts, the singular values enter by their root.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddlm.checkpoint import global_draws
from ddlm.data.shards import TokenShards
from ddlm.training.distributed import World
from ddlm.training.draws import derive_seed, generator_for
from ddlm.training.sharded import put
from ddlm.training.state import TrainState
from ddlm.types import ConfigError

WINDOW = 2
MOST_TOKENS = 50_000_000
"""Counts of so many tokens are good enough, and sorting them takes seconds."""
_CONTEXT_POWER = 0.75
_NORM = 0.5  # of a coordinate of an embedding; Adam's steps then turn the rows slowly
_HEAD = 0.02  # of a coordinate of the head's rows, as DDLM draws them


@torch.no_grad()
def start_from_corpus(state: TrainState, shards: TokenShards, seed: int, world: World) -> None:
    """Put spectral embeddings into a new state and its average, and the head's rows into the same directions.

    W_out = E Q with a random Q of orthonormal rows, as long as random rows would be: tokens of one use get one gradient
    from the first step on, where random rows have to be turned one by one. The head's bias stays at zero: started at
    the tokens' log-frequencies it saves 40 updates and then holds the context back (docs/log.md, 2026-11-25).

    Args:
        state: A new run's.
        shards: Its data; the first :data:`MOST_TOKENS` training tokens are counted.
        seed: Of the decomposition and of rows that nothing is known about.
        world: The first process counts, all start from what it found.

    Raises:
        ConfigError: if there are fewer tokens or hidden units than coordinates.
    """
    sizes = state.model.config
    V, D, W = sizes.vocab_size, sizes.embedding_width, sizes.width
    if min(V, W) < D:
        raise ConfigError(
            f"train.embeddings: spectral needs model.embedding_width ({D}) to be at most model.vocab_size ({V}) "
            f"and model.width ({W})"
        )
    rows = torch.empty(V, D)
    if world.is_main:
        ids = shards.read("train", 0, min(shards.tokens("train"), MOST_TOKENS))
        rows = spectral_embeddings(ids, V, D, seed=seed)
    rows = world.from_main(rows)
    turn = torch.linalg.qr(torch.randn(W, D, generator=generator_for(seed, "head"))).Q.T  # (D, W)
    starts = {
        "embedding": rows * (_NORM * math.sqrt(D)),
        "head.weight": rows @ turn * (_HEAD * math.sqrt(W)),
    }
    for i, (name, parameter) in enumerate(state.model.named_parameters()):
        if name in starts:
            put(parameter, starts[name])
            if state.ema is not None:
                put(state.ema.shadow[i], starts[name])


def spectral_embeddings(
    ids: npt.NDArray[np.int64], vocab_size: int, width: int, *, window: int = WINDOW, seed: int = 0
) -> Tensor:
    """Unit vectors that are near each other where tokens have the same neighbours at the same offsets.

    Args:
        ids: Running text ``(N,)``.
        vocab_size: V; tokens that do not occur get random directions.
        width: D, at most V.
        window: Offsets to each side.
        seed: Of the randomised decomposition (Halko et al. 2011) and the random rows.

    Returns:
        ``(V, D)`` float32.
    """
    values, index = _mutual_information(ids, vocab_size, window)
    shape = (vocab_size, 2 * window * vocab_size)
    # not the seed itself: noise of a text with the same seed would be these very rows
    with global_draws(derive_seed(seed, "embeddings")), warnings.catch_warnings():
        # Compressed rows are ten times faster here than coordinates; torch calls them beta at every first use.
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
        random = torch.randn(vocab_size, width)
        matrix = torch.sparse_coo_tensor(
            torch.from_numpy(index), torch.from_numpy(values), shape, check_invariants=True
        ).to_sparse_csr()
        left, singular, _ = torch.svd_lowrank(matrix, q=min(2 * width, vocab_size), niter=3)
    rows = left[:, :width] * singular[:width].sqrt()  # (V, D)
    rows = rows - rows.mean(0)
    known = torch.from_numpy(np.bincount(ids, minlength=vocab_size) > 0)
    rows = torch.where(known[:, None], rows, random)
    return torch.nn.functional.normalize(rows, dim=-1)


def _mutual_information(
    ids: npt.NDArray[np.int64], vocab_size: int, window: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Positive pointwise mutual information of tokens and contexts: values, and indices ``(2, values)``."""
    tokens, contexts, counts = [], [], []
    for offset in range(1, window + 1):
        pairs, count = np.unique(ids[:-offset] * vocab_size + ids[offset:], return_counts=True)
        first, second = np.divmod(pairs, vocab_size)
        # What follows at this offset and what precedes at it are contexts of their own.
        after = 2 * (offset - 1) * vocab_size
        tokens += [first, second]
        contexts += [second + after, first + after + vocab_size]
        counts += [count, count]
    token, context = np.concatenate(tokens), np.concatenate(contexts)
    joint = np.concatenate(counts).astype(np.float64)
    of_token = np.bincount(token, joint, vocab_size)
    of_context = np.bincount(context, joint, 2 * window * vocab_size) ** _CONTEXT_POWER
    of_context /= of_context.sum()
    information = np.log(joint / (of_token[token] * of_context[context]))
    positive = information > 0
    return information[positive].astype(np.float32), np.stack([token, context])[:, positive]
