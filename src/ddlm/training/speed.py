"""What makes a step fast: compiled parts with static shapes."""

from __future__ import annotations

import time

import torch

from ddlm.compiler import drop_unfinished_libraries
from ddlm.config import Config
from ddlm.device import product_dtype
from ddlm.network.denoiser import DDLM

_PRODUCTS = 4  # between two looks at the clock


def compile_denoiser(model: DDLM) -> None:
    """Compile the transformer in place.

    On a GPU as a whole: launches are fused across blocks, and a step asks the host for three calls instead of three
    for every block. On a CPU, where compiling takes a minute and saves the most inside the blocks, and where parameters
    are sharded block by block, one block at a time: all share one piece of code, which is compiled three times in fact
    (forwards and backwards for all rows, forwards for the self-conditioned ones), whatever the depth.
    """
    drop_unfinished_libraries()
    torch._dynamo.config.cache_size_limit = 64
    first = next(model.parameters())
    if first.device.type == "cuda" and not hasattr(first, "full_tensor"):
        model.transformer.compile(dynamic=False)
        return
    for block in model.transformer.blocks:
        block.compile(dynamic=False)


def matrix_rate(config: Config, device: torch.device) -> float:
    """FLOP/s of one process for a product of the feed-forward's shape, the best of three: what MFU is measured against.

    At most 4096 rows, so that it takes a moment only; ``ddlm benchmark train`` measures every shape of a step.
    """
    model, train = config.model, config.train
    rows = min(4096, (train.micro_batch or train.batch) * model.length)
    dtype = product_dtype(train.precision, device)
    a = torch.ones(rows, model.width, device=device, dtype=dtype)
    b = torch.ones(model.width, model.feed_forward, device=device, dtype=dtype)
    product = a @ b  # fresh memory is slow at its first touch
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(_PRODUCTS):
            torch.mm(a, b, out=product)
        product[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return _PRODUCTS * 2 * rows * model.width * model.feed_forward / min(seconds)
