"""Floating-point operations of a training step, counted by hand: matrix products only, a multiply-add is two.

Element-wise work, normalisation, softmax, the optimiser and padding count nothing, so a rate made with these numbers
is work that had to be done. A backward pass costs twice its forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from ddlm.config import Config, ModelConfig
from ddlm.training.draws import draw_step


@dataclass(frozen=True)
class Product:
    """``count`` products of an (m, k) with a (k, n) matrix."""

    m: int
    k: int
    n: int
    count: int = 1

    @property
    def flops(self) -> int:
        """Operations of all of them."""
        return 2 * self.m * self.k * self.n * self.count


def block_products(model: ModelConfig, tokens: int) -> list[Product]:
    """Linear maps of all blocks and of the input, forwards, for so many tokens."""
    width, inner, layers = model.width, model.feed_forward, model.layers
    return [
        Product(tokens, 3 * model.embedding_width + 1, width),
        Product(tokens, width, 3 * width, layers),
        Product(tokens, width, width, layers),
        Product(tokens, width, inner, layers),
        Product(tokens, inner, width, layers),
    ]


def attention_flops(width: int, layers: int, length: int, tokens: int) -> int:
    """Queries with keys and weights with values, forwards."""
    return 2 * 2 * length * width * layers * tokens


def backward(product: Product) -> list[Product]:
    """The two products of a linear map's backward pass: gradient of its input, gradient of its weight."""
    m, k, n, count = product.m, product.k, product.n, product.count
    return [Product(m, n, k, count), Product(k, m, n, count)]


def step_products(config: Config, noised: int, conditioned: int) -> list[Product]:
    """Every product of linear maps of one DDLM step.

    Args:
        config: Sizes and batch.
        noised: Noised positions of the batch.
        conditioned: Noised positions of its self-conditioned sequences.
    """
    model, batch = config.model, config.train.batch
    head_width = model.width + (model.embedding_width if model.likelihood_head else 0)
    forward = block_products(model, batch * model.length)
    forward.append(Product(noised, head_width, model.vocab_size))
    products = forward + [p for f in forward for p in backward(f)]
    if model.self_conditioning and conditioned:
        rows = int(batch * config.train.self_condition)
        products += block_products(model, rows * model.length)
        products.append(Product(conditioned, head_width, model.vocab_size))
        products.append(Product(conditioned, model.vocab_size, model.embedding_width))
    return products


def step_flops(config: Config, noised: int, conditioned: int) -> int:
    """Model operations of one DDLM step."""
    model, batch = config.model, config.train.batch
    rows = int(batch * config.train.self_condition) if model.self_conditioning else 0
    passes = 3 * batch + rows
    attention = attention_flops(model.width, model.layers, model.length, passes * model.length)
    return sum(p.flops for p in step_products(config, noised, conditioned)) + attention


def run_flops(config: Config, steps: int, draws: int = 64) -> float:
    """Model operations of a whole run: noised positions are the mean over masks that the run itself draws."""
    train, length = config.train, config.model.length
    total = 0
    for step in range(draws):
        noised = draw_step(train.seed, step, train.batch, length, config.mask).total_noised
        total += step_flops(config, noised, int(noised * train.self_condition))
    return total / draws * steps


def peer_flops(config: Config, name: str) -> int:
    """Model operations of one step of a transformers peer of the same size; it has logits at every position."""
    model, tokens = config.model, config.train.batch * config.model.length
    forward = sum(p.flops for p in block_products(model, tokens)[1:])  # its input is a look-up
    forward += attention_flops(model.width, model.layers, model.length, tokens)
    forward += Product(tokens, model.width, model.vocab_size).flops
    if name == "bert":
        forward += Product(tokens, model.width, model.width).flops  # transform before the head
    return 3 * forward
