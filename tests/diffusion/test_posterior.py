"""The chunked summary of p(x_0 | x_t, t) against the closed form, plain formulas and plain autograd."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddlm.diffusion.posterior import kl_divergence, summarize, weighted_cross_entropy
from ddlm.diffusion.process import NoiseProcess
from ddlm.types import Posterior, ReadOut
from oracle import (
    IndependentOracle,
    MarkovPairOracle,
    Oracle,
    random_embeddings,
    random_prior,
    read_posterior,
)

V, D = 23, 16
TABLE = random_embeddings(V, D, seed=1)
INDEPENDENT = IndependentOracle(TABLE, random_prior(V, seed=2))
MARKOV = MarkovPairOracle(TABLE, random_prior(V, seed=3), random_prior(V, V, seed=4, spread=2.0))
FIELDS = ("x0_hat", "entropy", "cross_entropy", "log_normalizer")


def noised(t: Tensor, seed: int = 0, length: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, x_t and a mask with kept positions in it."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(t)
    tokens = torch.randint(V, (rows, length), generator=generator)
    noise = torch.randn(rows, length, D, generator=generator, dtype=torch.float64)
    is_noised = torch.rand(rows, length, generator=generator) < 0.7
    process = NoiseProcess(0.1, 100.0)
    return tokens, process.add_noise(TABLE[tokens], t, noise, is_noised), is_noised


@pytest.mark.parametrize("oracle", [INDEPENDENT, MARKOV], ids=["independent", "markov"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_summary_of_the_oracles_logits_is_the_closed_form(oracle: Oracle, chunk: int) -> None:
    t = torch.linspace(0.5, 30.0, 40, dtype=torch.float64)
    tokens, xt, is_noised = noised(t)
    log_p = oracle.log_posterior(xt, t, is_noised)
    # a linear head that gives these logits up to a constant: W = identity, and a bias to be taken back
    bias = torch.linspace(-3, 3, V, dtype=torch.float64)
    finite = log_p.clamp_min(-1e4)  # exp(-1e4) is 0 in float64
    got = summarize(finite - bias, torch.eye(V).double(), bias, TABLE, tokens, chunk)
    p = log_p.exp()
    torch.testing.assert_close(got.x0_hat, p @ TABLE, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.entropy, torch.special.entr(p).sum(-1), rtol=0, atol=1e-10)
    expected = -finite.gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(got.cross_entropy, expected, rtol=0, atol=1e-10)
    assert torch.equal(got.tokens, log_p.argmax(-1))


def test_the_bayes_posterior_of_independent_tokens_is_a_linear_head() -> None:
    """log p(w | x_t) = log prior(w) + x_t . e_w / t^2 + const, since every e_w has the same norm."""
    t = torch.linspace(0.5, 30.0, 40, dtype=torch.float64)
    tokens, xt, _ = noised(t)
    is_noised = torch.ones_like(tokens, dtype=torch.bool)
    got = summarize(xt / t[:, None, None] ** 2, TABLE, INDEPENDENT.prior.log(), TABLE, tokens, 11)
    exact = INDEPENDENT(xt, t, is_noised)
    torch.testing.assert_close(got.x0_hat, exact.x0_hat, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.entropy, exact.entropy, rtol=0, atol=1e-10)
    assert torch.equal(got.tokens, exact.tokens)


def test_a_kept_token_informs_its_neighbour() -> None:
    """The oracle itself: given the first token exactly, the second is likelihood times its transition row."""
    t = torch.tensor([20.0], dtype=torch.float64)
    xt = torch.stack([TABLE[5], 20 * torch.ones(D).double()])[None]
    log_p = MARKOV.log_posterior(xt, t, torch.tensor([[False, True]]))
    squared = (xt[0, 1] - TABLE).square().sum(-1)
    row = MARKOV.joint_prior[5] / MARKOV.joint_prior[5].sum()
    expected = (row.log() - squared / 800).softmax(-1)
    torch.testing.assert_close(log_p[0, 1].exp(), expected, rtol=0, atol=1e-12)
    assert log_p[0, 0].argmax() == 5
    assert log_p[0, 0, 5] == 0


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    targets: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
) -> Posterior:
    """The whole (N, V) at once, in torch's own functions."""
    logits = F.linear(hidden, weight, bias)
    if temperature is not None:
        logits = logits / temperature[:, None]
    if top_k is not None:
        rank = logits.argsort(dim=-1, descending=True).argsort(dim=-1)
        logits = logits.masked_fill(rank >= torch.where(top_k > 0, top_k, V)[:, None], -torch.inf)
    p = logits.softmax(-1)
    return Posterior(
        x0_hat=p @ table,
        tokens=logits.argmax(-1),
        entropy=-(p * p.clamp_min(1e-300).log()).sum(-1),
        cross_entropy=F.cross_entropy(logits, targets, reduction="none"),
        log_normalizer=logits.logsumexp(-1),
    )


def problem(n: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": 2 * torch.randn(n, 12, generator=generator, dtype=torch.float64),
        "weight": torch.randn(V, 12, generator=generator, dtype=torch.float64),
        "bias": torch.randn(V, generator=generator, dtype=torch.float64),
        "table": torch.randn(V, D, generator=generator, dtype=torch.float64),
        "targets": torch.randint(V, (n,), generator=generator),
        "temperature": 0.5 + torch.rand(n, generator=generator, dtype=torch.float64),
        "top_k": torch.randint(0, 6, (n,), generator=generator),
    }


@pytest.mark.parametrize("chunk", [1, 4, 17, 100])
@pytest.mark.parametrize("restrict", [(), ("temperature",), ("top_k",), ("temperature", "top_k")])
@pytest.mark.parametrize("with_bias", [True, False])
def test_summary_and_its_gradients_are_those_of_plain_autograd(
    chunk: int, restrict: tuple[str, ...], with_bias: bool
) -> None:
    given_ = problem(17)
    if "top_k" in restrict:  # a dropped target has infinite cross-entropy: aim at the best token
        given_["targets"] = F.linear(given_["hidden"], given_["weight"], given_["bias"]).argmax(-1)
    if not with_bias:
        given_["bias"] = torch.zeros(V).double()
        if "top_k" in restrict:
            given_["targets"] = F.linear(given_["hidden"], given_["weight"]).argmax(-1)
    limits = {name: given_[name] for name in restrict}
    leaves = [given_[name].requires_grad_() for name in ("hidden", "weight", "bias", "table")]
    hidden, weight, bias, table = leaves
    head_bias = bias if with_bias else None
    got = summarize(hidden, weight, head_bias, table, given_["targets"], chunk, **limits)
    want = plain(hidden, weight, head_bias, table, given_["targets"], **limits)
    assert torch.equal(got.tokens, want.tokens)

    generator = torch.Generator().manual_seed(9)
    objective = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    for name in FIELDS:
        a, b = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        mix = torch.randn(b.shape, generator=generator, dtype=torch.float64)
        objective = [objective[0] + (a * mix).sum(), objective[1] + (b * mix).sum()]
    used = leaves if with_bias else [hidden, weight, table]
    for a, b in zip(*(torch.autograd.grad(x, used) for x in objective), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_each_field_alone_has_the_right_gradient() -> None:
    given_ = problem(6)
    leaves = [given_[name].requires_grad_() for name in ("hidden", "weight", "bias", "table")]

    def field(name: str, *args: Tensor) -> Tensor:
        return getattr(summarize(*args, given_["targets"], 4), name)

    for name in FIELDS:
        assert torch.autograd.gradcheck(lambda *a, name=name: field(name, *a), leaves)


def test_top_k_keeps_the_most_probable_and_zero_keeps_all() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]] * 4, dtype=torch.float64)
    got = summarize(
        logits, torch.eye(4).double(), None, torch.eye(4).double(), top_k=torch.tensor([1, 2, 0, 9])
    )
    full = logits[0].softmax(-1)
    two = torch.tensor([3.0, -torch.inf, 2.0, -torch.inf]).double().softmax(-1)
    want = torch.stack([torch.tensor([1.0, 0, 0, 0]).double(), two, full, full])
    torch.testing.assert_close(got.x0_hat, want, rtol=0, atol=1e-12)
    assert got.entropy[0] == 0


def test_a_target_outside_top_k_costs_infinitely_much() -> None:
    logits = torch.tensor([[3.0, 1.0]])
    one = torch.tensor([1])
    got = summarize(logits, torch.eye(2), None, torch.eye(2), targets=one, top_k=one)
    assert got.cross_entropy is not None
    assert torch.isinf(got.cross_entropy).all()


@settings(max_examples=50, deadline=None)
@given(
    scale=st.floats(1e-3, 1e4),
    n=st.integers(1, 9),
    chunk=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_entropy_and_expectation_stay_in_bounds_whatever_the_logits(
    scale: float, n: int, chunk: int, seed: int
) -> None:
    given_ = problem(n, seed)
    got = summarize(
        given_["hidden"].float() * scale, given_["weight"].float(), None, TABLE.float(), chunk=chunk
    )
    assert torch.isfinite(got.x0_hat).all()
    assert (got.entropy >= 0).all()
    assert (got.entropy <= torch.tensor(V).log() + 1e-5).all()
    assert (got.x0_hat.norm(dim=-1) <= D**0.5 * (1 + 1e-5)).all()  # inside the sphere of embeddings


def test_leading_axes_and_chunk_size_change_nothing_and_nothing_is_fine_too() -> None:
    given_ = problem(24)
    args = (given_["weight"], given_["bias"], given_["table"])
    flat = summarize(given_["hidden"], *args, chunk=24, keep_hidden=True)
    cube = summarize(given_["hidden"].view(2, 3, 4, 12), *args, chunk=5)
    torch.testing.assert_close(cube.x0_hat.reshape(24, D), flat.x0_hat, rtol=0, atol=1e-12)
    assert cube.entropy.shape == (2, 3, 4)
    assert flat.hidden is given_["hidden"]
    assert summarize(given_["hidden"][:0], *args).x0_hat.shape == (0, D)


@pytest.mark.parametrize("bad", [{"chunk": 0}, {"hidden": torch.zeros(2, 5)}])
def test_wrong_arguments_are_named(bad: dict[str, object]) -> None:
    given_ = problem(2)
    arguments = {
        "hidden": given_["hidden"],
        "head_weight": given_["weight"],
        "head_bias": None,
        "embeddings": given_["table"],
    } | bad
    with pytest.raises(ValueError, match=r"chunk|do not agree"):
        summarize(**arguments)  # type: ignore[arg-type]


def test_low_precision_logits_still_give_float32_expectations_under_autocast() -> None:
    """bf16 stays inside the network: the expectation of a sure token is its float32 embedding, digit for digit."""
    table = TABLE.float()
    hidden = 100 * torch.eye(V).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = summarize(hidden, torch.eye(V), None, table)
    assert got.x0_hat.dtype == got.entropy.dtype == torch.float32
    torch.testing.assert_close(got.x0_hat, table, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
@pytest.mark.parametrize("with_bias", [True, False])
def test_weighted_cross_entropy_is_torchs_own(chunk: int, with_bias: bool) -> None:
    given_ = problem(16)
    leaves = [given_[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    head_bias = bias if with_bias else None
    weights = torch.rand(16, generator=torch.Generator().manual_seed(1)).double() / 16
    weights[11:] = 0.0  # padding
    loss, per_position = weighted_cross_entropy(
        hidden, weight, head_bias, given_["targets"], weights, chunk
    )
    want = F.cross_entropy(F.linear(hidden, weight, head_bias), given_["targets"], reduction="none")
    torch.testing.assert_close(per_position, want.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(loss, (want * weights).sum(), rtol=0, atol=1e-10)
    assert not per_position.requires_grad
    used = leaves if with_bias else leaves[:2]
    got_grads = torch.autograd.grad(3 * loss, used)
    for a, b in zip(got_grads, torch.autograd.grad(3 * (want * weights).sum(), used), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert not got_grads[0][11:].any()  # padding teaches nothing

    with torch.no_grad():
        evaluated, _ = weighted_cross_entropy(
            hidden, weight, head_bias, given_["targets"], weights, chunk
        )
    assert torch.equal(evaluated, loss.detach())


def test_bf16_cross_entropy_has_a_float32_loss_close_to_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 64, generator=generator)
    weight = 0.3 * torch.randn(1000, 64, generator=generator)
    targets = torch.randint(1000, (512,), generator=generator)
    weights = torch.full((512,), 1 / 512)
    exact, _ = weighted_cross_entropy(hidden, weight, None, targets, weights)
    low, per_position = weighted_cross_entropy(hidden.bfloat16(), weight, None, targets, weights)
    assert low.dtype == per_position.dtype == torch.float32
    assert abs(low - exact) < 2e-3


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_kl_divergence_is_that_of_the_two_posteriors(chunk: int) -> None:
    given_ = problem(10)
    head = (given_["weight"], given_["bias"])
    new, old = (
        summarize(h, *head, given_["table"], keep_hidden=True)
        for h in (given_["hidden"], given_["hidden"].flip(0))
    )
    p, q = (F.linear(x.hidden, *head).log_softmax(-1) for x in (new, old))
    want = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(
        kl_divergence(new, old, *head, chunk=chunk), want, rtol=0, atol=1e-10
    )
    assert not kl_divergence(new, new, *head).any()
    with pytest.raises(ValueError, match="keep_hidden"):
        kl_divergence(new, summarize(given_["hidden"], *head, given_["table"]), *head)


def test_the_plain_read_out_of_the_oracle_agrees_on_temperature_and_top_k() -> None:
    """The oracle's own options are used by the sampling tests: they must mean the same as the package's."""
    t = torch.linspace(2.0, 9.0, 12, dtype=torch.float64)
    _, xt, is_noised = noised(t)
    is_noised[:] = True
    readout = ReadOut(
        temperature=torch.linspace(0.5, 2, 12).double(), top_k=torch.arange(12), keep_hidden=True
    )
    log_p = MARKOV.log_posterior(xt, t, is_noised)
    want = read_posterior(log_p, TABLE, readout)
    assert readout.temperature is not None
    assert readout.top_k is not None
    got = summarize(
        log_p,
        torch.eye(V).double(),
        None,
        TABLE,
        temperature=readout.temperature[:, None],
        top_k=readout.top_k[:, None],
    )
    torch.testing.assert_close(got.x0_hat, want.x0_hat, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=0, atol=1e-10)


CHUNKED = ("summarize", "weighted_cross_entropy")
MEMORY = textwrap.dedent(
    """
    import json, os, resource, sys
    import torch
    import torch.nn.functional as F
    from ddlm.diffusion.posterior import summarize, weighted_cross_entropy

    torch.set_num_threads(1)
    N, V, H, D = 8192, 32_000, 16, 16

    def run(case, h, weight, bias, table, y, w):
        if case == "summarize":
            p = summarize(h, weight, bias, table, y)
            return p.x0_hat.square().sum() + p.entropy.sum() + p.cross_entropy.sum()
        if case == "weighted_cross_entropy":
            return weighted_cross_entropy(h, weight, bias, y, w)[0]
        logits = F.linear(h, weight, bias)
        return (F.cross_entropy(logits, y, reduction="none") * w).sum()

    def peak():  # KiB on Linux, bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def measure(case, backward):
        make = torch.Generator().manual_seed(0)
        hidden = torch.randn(N, H, generator=make)
        weight, bias = torch.randn(V, H, generator=make), torch.zeros(V)
        table = torch.randn(V, D, generator=make)
        y, w = torch.randint(V, (N,), generator=make), torch.full((N,), 1 / N)
        for x in (hidden, weight, bias, table):
            x.requires_grad_(backward)
        for n in (8, N):  # first a few, for which libraries load what they need
            before = peak()
            out = run(case, hidden[:n], weight, bias, table, y[:n], w[:n])
            if backward:
                out.backward()
        return (peak() - before) / (N * V * 4)

    for name in sys.argv[1:]:
        child = os.fork()
        if child == 0:
            case, direction = name.split()
            print(json.dumps([name, measure(case, direction == "backward")]), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """
)
MEASURED = [f"{c} {d}" for c in CHUNKED for d in ("forward", "backward")] + ["plain forward"]


@pytest.fixture(scope="module")
def measured_share() -> dict[str, float]:
    """Growth of the resident set over the whole (N, V) float32 logits, each in a process of its own."""
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, *MEASURED], capture_output=True, text=True, check=True
    )
    return dict(json.loads(line) for line in out.stdout.splitlines())


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CHUNKED)
def test_peak_memory_is_under_a_tenth_of_the_logits(
    case: str, direction: str, measured_share: dict[str, float]
) -> None:
    assert measured_share[f"{case} {direction}"] < 0.1


def test_the_memory_measurement_can_fail(measured_share: dict[str, float]) -> None:
    assert measured_share["plain forward"] > 0.9
