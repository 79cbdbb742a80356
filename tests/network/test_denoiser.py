"""The network against an independent computation written from the equations, and what each input may influence."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ddlm.config import ModelConfig
from ddlm.diffusion.objective import NoisedBatch, denoising_loss
from ddlm.diffusion.process import NoiseProcess
from ddlm.network.denoiser import DDLM
from ddlm.types import ComparesPosteriors, Posterior, ReadOut
from oracle import IndependentOracle, random_prior

PROCESS = NoiseProcess(1.0, 10.0)
TINY = ModelConfig(
    vocab_size=50, length=12, layers=2, heads=4, width=32, feed_forward=64,
    embedding_width=8, time_width=16,
)  # fmt: skip


def tiny(config: ModelConfig = TINY, *, perturb: bool = True, seed: int = 0) -> DDLM:
    """A network whose every parameter matters: zero-initialised ones are drawn too."""
    torch.manual_seed(seed)
    model = DDLM(config, PROCESS)
    if perturb:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name != "embedding":
                    parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def inputs(model: DDLM, rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
    is_noised = torch.rand(rows, length, generator=generator) < 0.6
    is_noised[:, 0], is_noised[:, 1] = True, False  # both kinds in every row
    x0 = model.embed(tokens).detach()
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.tensor([1.0, 3.5, 10.0])[:rows]
    return {
        "tokens": tokens,
        "xt": PROCESS.add_noise(x0, t, noise, is_noised),
        "t": t,
        "is_noised": is_noised,
        "x0_hat": torch.randn(x0.shape, generator=generator),
        "noise": noise,
    }


def hidden_of(model: DDLM, given: dict[str, Tensor], **changes: Tensor | None) -> Tensor:
    given_ = {k: given[k] for k in ("xt", "t", "is_noised", "x0_hat")} | changes
    return model.hidden_states(**given_)


class Reference:
    """The equations again, in numpy's float64: rotary positions as complex numbers, attention by einsum."""

    def __init__(self, model: DDLM) -> None:
        self.p = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
        self.config = model.config

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        out = np.einsum("...i,oi->...o", x, self.p[f"{name}.weight"])
        return out + self.p.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: np.ndarray, time: np.ndarray) -> np.ndarray:
        """(1 + scale(t)) * (x - mean) / sqrt(var + 1e-5) + shift(t)."""
        film = self.linear(f"{name}.film", time)[:, None, :]
        scale, shift = film[..., : x.shape[-1]], film[..., x.shape[-1] :]
        centred = x - x.mean(-1, keepdims=True)
        return (1 + scale) * centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) + shift

    def time(self, t: np.ndarray) -> np.ndarray:
        def silu(x: np.ndarray) -> np.ndarray:
            return x / (1 + np.exp(-x))

        half = self.config.time_width // 2
        cycles = np.array([2.0 ** (-3 + 6 * i / (half - 1)) for i in range(half)])
        phase = 2 * np.pi * np.log(t)[:, None] * cycles
        features = np.concatenate([np.cos(phase), np.sin(phase)], -1)
        lifted = silu(self.linear("transformer.embed_time.lift", features))
        return silu(self.linear("transformer.embed_time.project", lifted))

    def rope(self, x: np.ndarray) -> np.ndarray:
        """x (B, T, A, K): pair (i, i + K/2) is a complex number, turned by position * 10000^(-2i/K)."""
        k = x.shape[-1]
        z = x[..., : k // 2] + 1j * x[..., k // 2 :]
        angle = np.arange(x.shape[1])[:, None] * 10_000.0 ** (-2 * np.arange(k // 2) / k)
        z = z * np.exp(1j * angle)[None, :, None, :]
        return np.concatenate([z.real, z.imag], -1)

    def attention(self, name: str, x: np.ndarray) -> np.ndarray:
        heads, width = self.config.heads, self.config.width
        qkv = self.linear(f"{name}.qkv", x)
        shape = (*x.shape[:2], heads, width // heads)
        q, k, v = (part.reshape(shape) for part in np.split(qkv, 3, axis=-1))
        score = np.einsum("biah,bjah->baij", self.rope(q), self.rope(k)) / math.sqrt(shape[-1])
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        return self.linear(f"{name}.out", np.einsum("baij,bjah->biah", weight, v).reshape(x.shape))

    def feed_forward(self, name: str, x: np.ndarray) -> np.ndarray:
        up = self.linear(f"{name}.up", x)
        erf = np.vectorize(math.erf)
        return self.linear(f"{name}.down", up * 0.5 * (1 + erf(up / math.sqrt(2))))

    def neighbours(self, name: str, x: np.ndarray) -> np.ndarray:
        """x_i + sum_d w_d x_{i+d}, by an explicit loop over offsets and positions."""
        weight = self.p.get(f"{name}.weight")
        if weight is None:
            return x
        reach, out = len(weight) // 2, x.copy()
        for i in range(x.shape[1]):
            for j in range(max(0, i - reach), min(x.shape[1], i + reach + 1)):
                out[:, i] += weight[j - i + reach] * x[:, j]
        return out

    def posterior(
        self, xt: np.ndarray, t: np.ndarray, is_noised: np.ndarray, x0_hat: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """p (B, T, V) and its expected embedding (B, T, D)."""
        mask = is_noised[..., None].astype(np.float64)
        scaled = xt / np.sqrt(1 + t**2)[:, None, None]
        x = np.concatenate([scaled * mask, xt * (1 - mask), x0_hat * mask, mask], -1)
        time = self.time(t)
        x = self.linear("transformer.input", x)
        for layer in range(self.config.layers):
            name = f"transformer.blocks.{layer}"
            y = self.norm(f"{name}.attention_norm", x, time)
            y = self.neighbours(f"{name}.attention_neighbours", y)
            x = x + self.attention(f"{name}.attention", y)
            y = self.norm(f"{name}.feed_forward_norm", x, time)
            y = self.neighbours(f"{name}.feed_forward_neighbours", y)
            x = x + self.feed_forward(f"{name}.feed_forward", y)
        logits = self.linear("head", self.norm("transformer.output_norm", x, time))
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        table = self.p["embedding"]
        table = table / np.linalg.norm(table, axis=-1, keepdims=True)
        return p, p @ (math.sqrt(self.config.embedding_width) * table)


def test_base_has_the_papers_147_million_parameters() -> None:
    with torch.device("meta"):
        model = DDLM(ModelConfig(), PROCESS)
    counts = model.parameter_counts()
    assert round(counts["total"] / 1e6, 1) == 147.0
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["embedding"] == 32_000 * 256
    assert counts["head"] == 32_000 * 1024 + 32_000  # untied, with a bias


def test_a_network_without_memory_gives_shapes() -> None:
    with torch.device("meta"):
        empty = DDLM(TINY, PROCESS)
    given = {k: inputs(tiny())[k].to("meta") for k in ("xt", "t", "is_noised", "x0_hat")}
    assert empty(**given).x0_hat.shape == given["xt"].shape


@pytest.mark.parametrize("neighbours", [0, 2])
def test_network_agrees_with_the_independent_computation(neighbours: int) -> None:
    model = tiny(replace(TINY, neighbours=neighbours))
    given = inputs(model)
    got = model(given["xt"], given["t"], given["is_noised"], given["x0_hat"])
    arrays = [given[k].double().numpy() for k in ("xt", "t")]
    p, x0_hat = Reference(model).posterior(
        *arrays, given["is_noised"].numpy(), given["x0_hat"].double().numpy()
    )
    np.testing.assert_allclose(got.x0_hat.detach().numpy(), x0_hat, rtol=0, atol=1e-5)
    entropy = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(got.entropy.detach().numpy(), entropy, rtol=0, atol=1e-5)
    assert np.array_equal(got.tokens.numpy(), p.argmax(-1))
    assert (
        entropy.std() > 1e-2
    )  # the perturbed network does say different things at different places


def test_attention_sees_both_directions_and_relative_positions_only() -> None:
    model = tiny()
    given = inputs(model)
    base = hidden_of(model, given)
    for changed in (0, 11):
        xt = given["xt"].clone()
        xt[:, changed] += 1.0
        moved = (hidden_of(model, given, xt=xt) - base).abs().amax(-1)
        assert (moved > 1e-6).all()  # every position hears of it, before and after


@pytest.mark.parametrize("neighbours", [0, 2])
def test_padding_influences_nothing(neighbours: int) -> None:
    model = tiny(replace(TINY, neighbours=neighbours))
    given = inputs(model)
    short = {k: v[:, :8] if v.dim() > 1 else v for k, v in given.items()}
    valid = torch.arange(12).expand(3, 12) < 8
    for filler in (0.0, 1e3):
        xt = torch.where(valid[..., None], given["xt"], filler)
        is_noised = torch.where(valid, given["is_noised"], filler > 0)
        padded = hidden_of(model, given, xt=xt, is_noised=is_noised, valid=valid)
        torch.testing.assert_close(padded[:, :8], hidden_of(model, short), rtol=0, atol=2e-6)
    with_padding_seen = hidden_of(model, given)
    assert (with_padding_seen[:, :8] - hidden_of(model, short)).abs().max() > 1e-3


def test_rows_do_not_meet_and_each_has_its_own_time() -> None:
    model = tiny()
    given = inputs(model)
    together = hidden_of(model, given)
    for row in range(3):
        alone = hidden_of(model, {k: v[row : row + 1] for k, v in given.items()})
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=2e-6)


def test_clean_embeddings_enter_by_their_own_slot_unscaled() -> None:
    model = tiny()
    given = inputs(model)
    seen: list[Tensor] = []
    hook = model.transformer.input.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    hidden_of(model, given)
    hook.remove()
    d, noised = TINY.embedding_width, given["is_noised"]
    slots = seen[0].split([d, d, d, 1], dim=-1)
    scale = (1 / (1 + given["t"] ** 2).sqrt())[:, None, None]
    torch.testing.assert_close(slots[0][noised], (given["xt"] * scale)[noised])
    assert not slots[0][~noised].any()
    assert torch.equal(slots[1][~noised], given["xt"][~noised])
    assert not slots[1][noised].any()
    assert torch.equal(slots[2][noised], given["x0_hat"][noised])
    assert not slots[2][~noised].any()
    assert torch.equal(slots[3].squeeze(-1), noised.float())


def test_time_conditions_the_network_through_the_norms_only() -> None:
    """FiLM is zero at first: with a rescaled x_t nothing else tells the time; perturbed, the time is heard."""
    for perturb in (False, True):
        model = tiny(perturb=perturb)
        given = inputs(model)
        later = 2 * given["t"]
        ratio = (PROCESS.input_scale(given["t"]) / PROCESS.input_scale(later))[:, None, None]
        same_input = torch.where(given["is_noised"][..., None], given["xt"] * ratio, given["xt"])
        change = hidden_of(model, given, xt=same_input, t=later) - hidden_of(model, given)
        assert (change.abs().max() > 1e-2) if perturb else (change.abs().max() < 1e-4)


def test_a_new_network_has_its_documented_initial_state() -> None:
    model = DDLM(replace(TINY, width=256, feed_forward=512, vocab_size=500), PROCESS)
    residual = 0.02 / math.sqrt(2 * TINY.layers)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "film" in name:
            assert not parameter.any(), name
            continue
        std = 0.001 if name == "embedding" else 0.02
        if name.endswith(("attention.out.weight", "feed_forward.down.weight")):
            std = residual
        assert abs(parameter.std().item() / std - 1) < 5 / math.sqrt(parameter.numel()), name


def test_self_conditioning_can_be_switched_off() -> None:
    off, on = tiny(replace(TINY, self_conditioning=False)), tiny()
    given = inputs(off)
    assert torch.equal(hidden_of(off, given), hidden_of(off, given, x0_hat=None))
    assert not torch.allclose(hidden_of(on, given), hidden_of(on, given, x0_hat=None), atol=1e-3)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (off, on)]
    assert shapes[0] == shapes[1]  # a flag, not another architecture


def test_an_estimate_at_kept_positions_is_ignored() -> None:
    model = tiny()
    given = inputs(model)
    other = torch.where(given["is_noised"][..., None], given["x0_hat"], 99.0)
    assert torch.equal(hidden_of(model, given), hidden_of(model, given, x0_hat=other))


def test_embeddings_have_norm_sqrt_d_whatever_the_table_does() -> None:
    model = tiny()
    for factor in (1.0, 1e-3, 1e4):
        with torch.no_grad():
            model.embedding.mul_(factor)
        norms = model.embeddings().norm(dim=-1)
        torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(8)))
    tokens = torch.arange(50)[None]
    torch.testing.assert_close(model.embed(tokens)[0], model.embeddings())
    norms = DDLM(replace(TINY, embedding_width=256), PROCESS).embeddings().norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 16.0))


def loss_of(model: DDLM, given: dict[str, Tensor], **options: int) -> Tensor:
    batch = NoisedBatch.make(
        given["tokens"], given["is_noised"], given["t"], given["noise"], **options
    )
    return denoising_loss(model, PROCESS, batch).loss


@pytest.mark.parametrize("where", ["noised", "clean"])
def test_gradients_reach_the_embeddings_through_both_inputs(where: str) -> None:
    """Rows of the table used only at noised, or only at kept, positions: both get a gradient."""
    model = tiny()
    given = inputs(model)
    of_interest = given["is_noised"] if where == "noised" else ~given["is_noised"]
    given["tokens"] = torch.where(of_interest, given["tokens"] % 25, 25 + given["tokens"] % 25)
    loss_of(model, given).backward()
    assert model.embedding.grad is not None
    used = given["tokens"][of_interest].unique()
    assert (model.embedding.grad[used].norm(dim=-1) > 1e-6).all()


def test_loss_is_the_mean_cross_entropy_at_noised_positions_and_padding_changes_nothing() -> None:
    model = tiny()
    given = inputs(model)
    hidden = hidden_of(model, given, x0_hat=None)
    logits = model.head(hidden)
    expected = torch.nn.functional.cross_entropy(
        logits[given["is_noised"]], given["tokens"][given["is_noised"]]
    )
    for options in ({}, {"multiple": 64}):
        loss = loss_of(model, given, **options)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    total = int(given["is_noised"].sum())
    torch.testing.assert_close(loss_of(model, given, total_noised=2 * total), expected / 2)
    swapped = given | {"tokens": torch.where(given["is_noised"], given["tokens"], 0)}
    batch = NoisedBatch.make(swapped["tokens"], given["is_noised"], given["t"], given["noise"])
    per_sequence = denoising_loss(model, PROCESS, batch).per_sequence
    assert per_sequence.shape == (3,)
    assert not per_sequence.requires_grad
    more, all_three = (denoising_loss(model, PROCESS, batch, self_condition=n) for n in (9, 3))
    assert torch.equal(more.loss, all_three.loss)


def test_bf16_stays_close_and_leaves_expectations_in_float32() -> None:
    """8 bits of mantissa through 2 layers: posteriors within 0.02 in total variation, entropies within 0.02 nats."""
    model = tiny()
    given = inputs(model)
    args = (given["xt"], given["t"], given["is_noised"], given["x0_hat"])
    exact = model(*args, readout=ReadOut(keep_hidden=True))
    model.compute_dtype = torch.bfloat16
    low = model(*args, readout=ReadOut(keep_hidden=True))
    assert low.x0_hat.dtype == low.entropy.dtype == torch.float32
    total_variation = 0.5 * (_probabilities(model, low) - _probabilities(model, exact)).abs().sum(
        -1
    )
    assert 0 < total_variation.max() < 0.05
    assert (low.entropy - exact.entropy).abs().max() < 0.05
    moved = model(given["xt"] + 0.5, *args[1:], readout=ReadOut(keep_hidden=True))
    assert (model.divergence(moved, low) > 0).any()  # comparing works in bf16, too
    assert (loss_of(model, given) - loss_of(tiny(), given)).abs() < 0.02


def _probabilities(model: DDLM, posterior: Posterior) -> Tensor:
    assert posterior.hidden is not None
    return model.head(posterior.hidden.float()).softmax(-1)


def test_read_out_options_are_per_sequence() -> None:
    model = tiny()
    assert isinstance(model, ComparesPosteriors)
    given = inputs(model)
    args = (given["xt"], given["t"], given["is_noised"])
    plain = model(*args)
    got = model(
        *args,
        readout=ReadOut(temperature=torch.tensor([1.0, 0.5, 2.0]), top_k=torch.tensor([0, 0, 1])),
    )
    torch.testing.assert_close(got.x0_hat[0], plain.x0_hat[0])
    assert (got.entropy[1] < plain.entropy[1]).all()
    assert not got.entropy[2].any()
    torch.testing.assert_close(got.x0_hat[2], model.embeddings()[got.tokens[2]])


def test_the_likelihood_head_is_bayes_rule() -> None:
    """With a head that says only log prior, the posterior is the closed form for independent tokens."""
    model = tiny(replace(TINY, likelihood_head=True))
    prior = random_prior(50)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(prior.log())
    given = inputs(model)
    args = (given["xt"], given["t"], given["is_noised"])
    got, exact = model(*args), IndependentOracle(model.embeddings().detach(), prior)(*args)
    noised = given["is_noised"]
    torch.testing.assert_close(got.x0_hat[noised].double(), exact.x0_hat[noised], rtol=0, atol=1e-4)
    torch.testing.assert_close(
        got.entropy[noised].double(), exact.entropy[noised], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("bad", [{"heads": 3}, {"time_width": 7}, {"width": 4, "heads": 4}])
def test_impossible_sizes_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"width|heads"):
        DDLM(replace(TINY, **bad), PROCESS)
