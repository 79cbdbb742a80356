"""The sampling benchmark runs, counts what it says and finds the crossover."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddlm.benchmark.sample import benchmark_sample, crossover, early_exit
from ddlm.config import Config, ModelConfig, ProcessConfig
from ddlm.diffusion.process import NoiseProcess
from ddlm.network.denoiser import DDLM
from ddlm.network.inference import InferenceDenoiser


@pytest.mark.slow
def test_a_small_benchmark_writes_its_record(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the peers need the extra `eval`")
    config = Config(
        model=ModelConfig(
            vocab_size=64, length=16, layers=1, heads=2, width=32, feed_forward=64,
            embedding_width=16, time_width=16,
        ),
        process=ProcessConfig(0.5, 5.0),
    )  # fmt: skip
    out = tmp_path / "record.json"
    results = benchmark_sample(
        config=config, rounds=2, lengths=(4, 8), batches=(1, 2), queue=6, slots=3, out=out,
        precision="fp32", budget=0.2, say=lambda line: None,
    )  # fmt: skip
    assert {c["candidate"] for c in results["cases"]} == {"ddlm 50", "ddlm 200", "gpt_neox", "gpt2"}
    assert len(results["cases"]) == 4 * 2 * 2
    for case in results["cases"]:
        assert case["seconds_per_sequence"] is None or case["seconds_per_sequence"] > 0
    exits = results["early_exit"]
    assert exits["plain"]["mean_steps"] == 200
    assert len(exits["plain"]["all_seconds"]) == exits["rounds"] == 2
    assert 60 <= exits["spread"]["mean_steps"] < 200
    assert exits["spread"]["steps_saved"] == 1 - exits["spread"]["mean_steps"] / 200
    assert json.loads(out.read_text())["kind"] == "benchmark-sample"


@pytest.mark.parametrize("steps", [1, 3])
def test_few_steps_still_have_an_exit(steps: int) -> None:
    """30% of three steps is less than one, and nothing halts before its first."""
    model = ModelConfig(
        vocab_size=64, length=16, layers=1, heads=2, width=32, feed_forward=64,
        embedding_width=16, time_width=16,
    )  # fmt: skip
    process = NoiseProcess(0.5, 5.0)
    torch.manual_seed(0)
    denoiser = InferenceDenoiser(DDLM(model, process).eval(), torch.float32, torch.device("cpu"))
    found = early_exit(
        denoiser, process, model, False, queue=20, slots=4, say=lambda line: None, steps=steps
    )
    assert found["plain"]["mean_steps"] == steps
    assert 1 <= found["spread"]["mean_steps"] <= steps


def test_the_crossover_lists_the_lengths_that_are_faster() -> None:
    def case(
        candidate: str, length: int, seconds: float | None, batch: int = 1
    ) -> dict[str, object]:
        return {
            "candidate": candidate,
            "length": length,
            "batch": batch,
            "seconds_per_sequence": seconds,
        }

    cases = [
        case("ddlm 50", 16, 1.0), case("ddlm 50", 64, 1.2), case("gpt2", 16, 0.5), case("gpt2", 64, 2.0),
        case("ddlm 50", 128, 1.5), case("gpt2", 128, None), case("gpt2", 16, 9.0, batch=8),
    ]  # fmt: skip
    assert crossover(cases) == {"ddlm 50": {"gpt2": [64]}}
