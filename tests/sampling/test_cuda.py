"""The engine on a CUDA device: what it writes, whatever the batch, by graphs or step by step, without waiting.

All but the last two, which are about graphs, also hold with ``DEVICE`` a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddlm.benchmark.sample import benchmark_sample
from ddlm.config import Config, ModelConfig, ProcessConfig
from ddlm.lm import load
from ddlm.network.inference import InferenceDenoiser
from ddlm.sampling import Request, Result, halting, make_request, sample, solvers
from ddlm.sampling.engine import Engine
from ddlm.sampling.graphs import Graphs
from ddlm.types import Posterior
from sampling.models import LENGTH, PROCESS, VOCAB, network, one_of_everything, write_model

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
ADVANCED: list[Any] = []  # the step of every engine that has written


def frozen(
    dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> InferenceDenoiser:
    return InferenceDenoiser(network(2), dtype, device or DEVICE)


def request(seed: int, length: int = LENGTH, steps: int = 8, **options: Any) -> Request:
    noised = torch.ones(length, dtype=torch.bool)
    noised[: seed % 4] = False
    tokens = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
    return make_request(tokens, noised, PROCESS, steps=steps, seed=seed, **options)


def mixture() -> list[Request]:
    more = [
        request(10, refine=3, temperature=0.9),
        request(11, length=20),
        request(12, refine=4, solver="sde", halt=halting.Fixed(5)),
    ]
    return [*one_of_everything(request), *more]


def written(
    asked: list[Request] | None = None, denoiser: InferenceDenoiser | None = None, **options: Any
) -> list[Result]:
    """By an engine of three slots that holds their number fixed, unless told otherwise."""
    options = {"exact": True} | options
    engine = Engine(denoiser or frozen(), PROCESS, slots=3, length=LENGTH, **options)
    results = list(engine.run(mixture() if asked is None else asked))
    ADVANCED.append(engine._advance)
    return results


def same(a: Result, b: Result) -> None:
    assert (a.steps, a.reason) == (b.steps, b.reason)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.entropy, b.entropy)


@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("solver", solvers.NAMES)
def test_a_gpu_writes_what_the_cpu_writes(solver: str, refine: int) -> None:
    tokens = torch.arange(6 * LENGTH).view(6, LENGTH) % VOCAB
    noised = torch.ones_like(tokens, dtype=torch.bool)
    noised[:, :4] = False
    own, plain = (
        sample(frozen(device=d), tokens, noised, PROCESS, steps=10, solver=solver, refine=refine)
        for d in (DEVICE, torch.device("cpu"))
    )
    torch.testing.assert_close(own.x, plain.x, atol=2e-3, rtol=2e-3)
    assert own.steps.tolist() == plain.steps.tolist() == [10 + refine] * 6
    assert torch.equal(own.tokens[:, :4], tokens[:, :4])
    # a near tie, or a draw at the border between two tokens, may fall the other way
    assert float((own.tokens == plain.tokens).float().mean()) > 0.95


@pytest.mark.parametrize("graphs", [False, True])
def test_a_sequence_has_the_same_bits_in_any_company(graphs: bool) -> None:
    for asked, result in zip(mixture(), written(graphs=graphs), strict=True):
        same(result, written([asked], graphs=graphs)[0])


def test_looking_seldom_changes_no_result() -> None:
    often, seldom = (written(look_every=n) for n in (1, 7))
    for a, b in zip(often, seldom, strict=True):
        same(a, b)
    assert (often[8].reason, often[8].steps) == ("fixed", 5)
    assert all(r.x.isfinite().all() for r in written(exact=False))


@pytest.mark.parametrize("solver", ["euler", "sde"])
@pytest.mark.parametrize("graphs", [False, True])
def test_the_host_does_not_wait_between_looks(graphs: bool, solver: str) -> None:
    engine = Engine(frozen(), PROCESS, slots=3, length=LENGTH, look_every=1000, graphs=graphs)
    for seed in range(3):
        engine.submit(request(seed, steps=30, solver=solver))
    for _ in range(5):
        engine.step()
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            engine.step()
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    while engine.busy:
        engine.step()


def test_bfloat16_runs() -> None:
    for result in written(denoiser=frozen(torch.bfloat16)):
        assert result.x.isfinite().all()
        assert result.entropy.isfinite().all()
        assert 0 <= int(result.tokens.min()) <= int(result.tokens.max()) < VOCAB


def test_a_model_writes(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    own, plain = (load(folder, device=d, precision="fp32") for d in (str(DEVICE), "cpu"))
    template = "the river {20} the sea {5}"
    asked: list[dict[str, Any]] = [
        {},
        {"refine": 2, "solver": "sde"},
        {"guidance": 2.0, "trace": True},
    ]
    for options in asked:
        a, b = (lm.generate(template, 3, steps=6, **options) for lm in (own, plain))
        assert [x.steps for x in a] == [x.steps for x in b]
        pairs = [p for x, y in zip(a, b, strict=True) for p in zip(x.tokens, y.tokens, strict=True)]
        assert sum(i == j for i, j in pairs) > 0.9 * len(pairs)
    assert load(folder, device=str(DEVICE)).generate(template, steps=3, slots=2)[0].text


def test_a_small_benchmark_runs() -> None:
    sizes = ModelConfig(
        vocab_size=64, length=16, layers=1, heads=2, width=32, feed_forward=64,
        embedding_width=16, time_width=16,
    )  # fmt: skip
    found = benchmark_sample(
        config=Config(model=sizes, process=ProcessConfig(0.5, 5.0)), rounds=1, peers=False,
        lengths=(8,), batches=(1, 2), queue=6, slots=4, exit_steps=20, say=lambda line: None,
    )  # fmt: skip
    assert len(found["cases"]) == 4
    assert all(c["seconds_per_sequence"] > 0 for c in found["cases"])
    assert found["early_exit"]["plain"]["mean_steps"] == 20


def noisy() -> list[Request]:
    return [request(i, steps=12, solver="sde", refine=3) for i in range(5)]


@pytest.mark.parametrize(
    "compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "compiled"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_write_what_single_launches_write(dtype: torch.dtype, compile: bool) -> None:
    plain = written(noisy(), frozen(dtype), compile=compile, graphs=False)
    graphed = written(noisy(), frozen(dtype), compile=compile)
    graphs = ADVANCED[-1]
    assert isinstance(graphs, Graphs)
    assert graphs.failed is None
    assert len(graphs._recorded) >= 2, "nothing was recorded"
    for a, b in zip(plain, graphed, strict=True):
        same(a, b)


def test_what_cannot_be_recorded_is_done_step_by_step() -> None:
    """Last in this file: a capture that fails must leave nothing behind."""

    class Reading(InferenceDenoiser):
        def __call__(self, xt: torch.Tensor, *args: Any, **options: Any) -> Posterior:
            assert float(xt.sum()) < float("inf")  # the host waits, which no capture allows
            return super().__call__(xt, *args, **options)

    with pytest.warns(RuntimeWarning, match="no CUDA graph"):
        found = written(noisy(), Reading(network(2), torch.float32, DEVICE))
    assert ADVANCED[-1].failed
    torch.cuda.empty_cache()  # refuses while it believes that a capture is under way
    for a, b in zip(found, written(noisy(), graphs=False), strict=True):
        same(a, b)
