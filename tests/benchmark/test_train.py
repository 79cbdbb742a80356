"""The benchmark counts what is computed and reports what its keys say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddlm.benchmark import train as benchmark
from ddlm.benchmark.peers import peer_step
from ddlm.benchmark.step import Trainee, own_step
from ddlm.training.distributed import open_world
from ddlm.training.draws import HEAD_MULTIPLE
from ddlm.training.flops import peer_flops
from training.runs import small_config


def wide_config():  # type: ignore[no-untyped-def]
    """Wide enough for the conditioning on t and the padding of the head to be small change."""
    config = small_config(ema=0.0, batch=64)
    config.time.warp = False
    config.model.width, config.model.feed_forward, config.model.time_width = 128, 512, 8
    config.model.length, config.model.vocab_size = 64, 512
    return config


def counted(step: Callable[[], object]) -> int:
    """Operations that torch sees; attention as plain products, because it does not count the CPU's fused kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("self_conditioning", [True, False])
def test_the_count_is_what_torch_counts(self_conditioning: bool) -> None:
    config = wide_config()
    config.model.self_conditioning = self_conditioning
    world = open_world(config)
    step = own_step(Trainee.create(config, world), config, world)
    assert step.flops == pytest.approx(counted(step.run), rel=0.04)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_count_of_a_peer_is_what_torch_counts(name: str) -> None:
    pytest.importorskip("transformers", reason="the peers need transformers")
    config = wide_config()
    step = peer_step(name, config, torch.device("cpu"), compiled=False)
    assert peer_flops(config, name) == pytest.approx(counted(step), rel=0.02)


@pytest.mark.parametrize("likelihood_head", [True, False])
def test_the_loss_that_is_timed_is_the_steps(likelihood_head: bool) -> None:
    """Its products have the width of the head's rows and every listed position, padding included."""
    config = wide_config()
    config.model.likelihood_head, config.train.micro_batch = likelihood_head, 16
    world = open_world(config)
    trainee = Trainee.create(config, world)
    step = own_step(trainee, config, world)
    listed = [len(part.batch.index) for part in step.parts()]
    assert len(listed) == 4
    assert sum(listed) > step.noised
    assert all(n % HEAD_MULTIPLE == 0 for n in listed)
    width = 128 + (16 if likelihood_head else 0)
    expected = (
        2 * 2 * sum(listed) * width * 512
    )  # torch does not see the third, which adds in place
    assert counted(benchmark._loss_only(trainee.state.model, step)) == expected


def test_without_a_compiler_it_measures_uncompiled_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    said: list[str] = []
    results = benchmark.benchmark_train(
        small_config(compile=True), rounds=1, peers=("bert compiled",), say=said.append
    )
    assert results["compiled"] is False
    assert results["peers"] == {}
    assert any("no C++ compiler" in line for line in said)
    assert any("compiled peers need" in line for line in said)


def test_the_record_has_every_key(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the peers need transformers")
    from ddlm.record import make_record, write_record

    config = wide_config()
    results = benchmark.benchmark_train(
        config, rounds=2, peers=("bert eager",), profile=tmp_path / "profile", say=lambda line: None
    )
    write_record(tmp_path / "r.json", make_record("benchmark-train", config, results))
    record = json.loads((tmp_path / "r.json").read_text())["results"]
    tokens = config.train.batch * config.model.length
    assert record["tokens_per_second"] == pytest.approx(tokens / record["seconds_per_step"])
    assert 0 < record["mfu"] < 1.5
    assert 0 < record["loss_share"] < 1
    for measured in (record, record["peers"]["bert eager"]):
        fastest, slowest = measured["spread"]
        assert 0 < fastest <= measured["seconds_per_step"] <= slowest
    assert record["compiled"] is False
    assert record["peak_memory_bytes"] > 2**20
    assert record["matmul_flops_per_second"] > 1e9
    peer = record["peers"]["bert eager"]
    assert record["speedup_over_fastest_peer"] == pytest.approx(
        record["model_flops_per_second"] / peer["model_flops_per_second"]
    )
    assert "mm" in (tmp_path / "profile" / "operators.txt").read_text()
    assert (tmp_path / "profile" / "trace.json").stat().st_size > 1000


def test_the_command_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ddlm.cli import main

    sizes = ["--train.batch", "4", "--train.compile", "false", "--model.layers", "1"]
    out = str(tmp_path / "r.json")
    line = ["benchmark", "train", "--config", "tiny", *sizes, "--no-peers", "--rounds", "1"]
    assert main([*line, "--out", out]) == 0
    assert "tokens/s" in capsys.readouterr().out
    record = json.loads(Path(out).read_text())
    assert record["kind"] == "benchmark-train"
    assert record["peers"] == {}
    assert record["speedup_over_fastest_peer"] is None
