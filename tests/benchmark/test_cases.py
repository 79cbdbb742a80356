"""The sampling benchmark's candidates do what their names say, and every case says what it cost."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ddlm.benchmark import cases, timing
from ddlm.benchmark.cases import Candidate, Timing, autoregressive, diffusion, measure_cases
from ddlm.benchmark.sample import benchmark_sample, crossover
from ddlm.benchmark.timing import peak_memory, reset_peak_memory, time_step_products
from ddlm.checkpoint import save_model
from ddlm.config import Config, ModelConfig, ProcessConfig
from ddlm.diffusion.process import NoiseProcess
from ddlm.network.denoiser import DDLM
from ddlm.network.inference import InferenceDenoiser
from ddlm.sampling import Engine, halting

CPU = torch.device("cpu")
MODEL = ModelConfig(
    vocab_size=128, length=16, layers=1, heads=2, width=32, feed_forward=64, embedding_width=16,
    time_width=16,
)  # fmt: skip
PROCESS = NoiseProcess(0.5, 5.0)


@pytest.fixture(scope="module")
def network() -> DDLM:
    torch.manual_seed(0)
    return DDLM(MODEL, PROCESS).eval()


@pytest.fixture(scope="module")
def denoiser(network: DDLM) -> InferenceDenoiser:
    return InferenceDenoiser(network, torch.float32, CPU)


def test_early_exit_makes_the_steps_that_the_sequences_need(denoiser: InferenceDenoiser) -> None:
    engine = Engine(denoiser, PROCESS, slots=3, length=8)
    requests = [
        cases.full_request(PROCESS, 8, 40, halting.Patience(3), seed=seed) for seed in range(3)
    ]
    steps = [result.steps for result in engine.run(requests)]
    assert min(steps) < 40  # else this says nothing
    found = diffusion(denoiser, PROCESS, 40, budget=60, patience=3).measure(8, 3)
    assert found is not None
    assert found.steps == pytest.approx(sum(steps) / 3)
    assert found.measured == max(steps)


def test_plain_steps_are_multiplied_out(denoiser: InferenceDenoiser) -> None:
    """Two hundred cost four times fifty: they need not be made."""
    found = diffusion(denoiser, PROCESS, 200, budget=60).measure(8, 2)
    assert found is not None
    assert (found.steps, found.measured) == (200, cases.TIMED_STEPS)
    found = diffusion(denoiser, PROCESS, 200, budget=0).measure(8, 2)
    assert found is not None
    assert (found.steps, found.measured) == (200, 3)


def test_early_exit_beyond_the_budget_is_left_out(
    denoiser: InferenceDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = diffusion(denoiser, PROCESS, 200, budget=0, patience=25)
    assert candidate.measure(8, 2) is None
    monkeypatch.setattr(cases, "filled", None)  # no engine is made any more
    assert candidate.measure(8, 2) is None
    assert candidate.measure(16, 4) is None
    with pytest.raises(TypeError):
        candidate.measure(4, 2)


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2"])
def test_the_peers_sample_from_the_whole_vocabulary(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers keeps the 50 most probable tokens if not told otherwise, which takes time DDLM does not spend."""
    process = pytest.importorskip("transformers.generation.logits_process")

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the most probable tokens were looked for")

    monkeypatch.setattr(process.TopKLogitsWarper, "__call__", refuse)
    candidate = autoregressive(name, MODEL, 4, torch.float32, CPU, budget=60)
    found = candidate.measure(4, 2)
    assert found is not None
    assert (found.steps, found.measured) == (4, 4)


def test_a_case_says_what_it_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"ddlm 50": 64, "gpt2": 160}

    def candidate(name: str, seconds: list[float], network: str, weights: int) -> Candidate:
        def measure(length: int, batch: int) -> Timing | None:
            # pages of its own: an allocator may have room left of earlier tests, which is resident already
            pages = mmap.mmap(-1, held[name] * 2**20)
            assert int(torch.frombuffer(pages, dtype=torch.uint8).fill_(1)[-1]) == 1
            return Timing(seconds.pop(0), 40.0, 45) if seconds else None

        return Candidate(measure, weights, network)

    bare = [0.5, 0.1, 0.2]
    monkeypatch.setattr(cases, "time_step_products", lambda *_: bare.pop(0))
    chosen = {
        "ddlm 50": candidate("ddlm 50", [6.0, 30.0, 8.0], "ddlm", 2**20),
        "gpt2": candidate("gpt2", [4.0], "gpt2", 3 * 2**20),
    }
    own, peer = measure_cases(
        chosen, MODEL, [16], [4], 3, CPU, torch.float32, say=lambda line: None
    )
    assert own["seconds_per_sequence"] == 2
    assert own["spread"] == [1.5, 7.5]
    assert own["tokens_per_second"] == 8
    assert (own["mean_steps"], own["measured_steps"]) == (40, 45)
    assert own["products_seconds_per_sequence"] == pytest.approx(0.2 * 40 / 4)
    assert peer["seconds_per_sequence"] == 1
    assert peer["products_seconds_per_sequence"] is None
    if reset_peak_memory(CPU):  # less the weights of the other, which lie there meanwhile
        more = peer["peak_memory_bytes"] - own["peak_memory_bytes"]
        assert more == pytest.approx((160 - 64 + 2) * 2**20, abs=8 * 2**20)


def test_the_peak_begins_anew() -> None:
    if not reset_peak_memory(CPU):
        pytest.skip("this system does not let the peak begin anew")
    before = peak_memory(CPU)
    block = torch.ones(200 * 2**20, dtype=torch.uint8)
    assert peak_memory(CPU) > before + 180 * 2**20
    del block
    assert peak_memory(CPU) > before + 180 * 2**20
    reset_peak_memory(CPU)
    assert peak_memory(CPU) < before + 100 * 2**20


def test_memory_that_the_process_keeps_is_nobodys_peak() -> None:
    """As the command line runs: what one candidate has freed is not counted as the next one's."""
    code = """
import torch
from ddlm.allocator import keep_freed_blocks
from ddlm.benchmark.timing import peak_memory, reset_peak_memory

cpu, kept = torch.device("cpu"), keep_freed_blocks()
before = peak_memory(cpu)
blocks = [torch.ones(20 * 2**20, dtype=torch.uint8) for _ in range(10)]
del blocks
print(kept and reset_peak_memory(cpu), (peak_memory(cpu) - before) // 2**20)
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean
    )
    kept, more = done.stdout.split()
    if kept == "False":
        pytest.skip("this system keeps no freed memory, or does not let the peak begin anew")
    assert int(more) < 50


def test_the_products_of_many_tokens_are_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits of 64 sequences of 1024 tokens would be gigabytes."""
    seen: list[int] = []

    def products(given: list[Any], *_: Any) -> float:
        seen.extend(p.m for p in given)
        return 1.0

    monkeypatch.setattr(timing, "time_products", products)
    monkeypatch.setattr(timing, "time_attention", lambda *_: 1.0)
    found = time_step_products(MODEL, 64, 1024, CPU, torch.float32)
    assert set(seen) == {4096}
    assert found == 3 * 64 / 4
    assert time_step_products(MODEL, 2, 8, CPU, torch.float32) == 3


def test_a_case_that_was_left_out_is_at_no_length_faster() -> None:
    found = [
        {"candidate": name, "length": n, "batch": 1, "seconds_per_sequence": seconds}
        for name, n, seconds in (
            ("ddlm 50", 16, 1.0), ("ddlm 50", 32, None), ("gpt2", 16, 2.0), ("gpt2", 32, 4.0),
        )
    ]  # fmt: skip
    assert crossover(found) == {"ddlm 50": {"gpt2": [16]}}


@pytest.mark.slow
def test_a_trained_model_takes_part_with_and_without_early_exit(
    network: DDLM, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="the peers need the extra `eval`")
    config = Config(model=MODEL, process=ProcessConfig(0.5, 5.0))
    model = save_model(tmp_path / "model", network, config, tokenizer_from=None, step=1)
    said: list[str] = []
    results = benchmark_sample(
        str(model), rounds=1, lengths=(4, 8), batches=(2,), queue=4, slots=2, exit_steps=4,
        precision="fp32", out=tmp_path / "record.json", say=said.append,
    )  # fmt: skip
    allowed = {
        "ddlm 50": 50, "ddlm 50 patience 6": 50, "ddlm 200": 200, "ddlm 200 patience 25": 200
    }  # fmt: skip
    found = {(c["candidate"], c["length"]): c for c in results["cases"]}
    assert list(dict.fromkeys(name for name, _ in found)) == [*allowed, "gpt_neox", "gpt2"]
    for (name, length), case in found.items():
        if name not in allowed:
            assert case["mean_steps"] == length
        elif "patience" in name:
            assert 6 < case["mean_steps"] <= allowed[name]
        else:
            assert case["mean_steps"] == allowed[name]
        assert (case["products_seconds_per_sequence"] or 0) < case["seconds_per_sequence"]
        assert (case["products_seconds_per_sequence"] is None) == (name not in allowed)
    assert set(results["peak_memory_bytes"]) == {"ddlm", *allowed, "gpt_neox", "gpt2"}
    assert "ddlm 200 patience 25" in said[-1]
    assert " steps made)" in said[-1]
    kept = json.loads((tmp_path / "record.json").read_text())["results"]
    assert kept["cases"] == results["cases"]
