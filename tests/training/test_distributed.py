"""Two processes do what one does: gradients, training, resuming on another number of processes (gloo, CPU)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ddlm.checkpoint import load_model
from ddlm.training import distributed, sharded
from ddlm.training.state import TrainState
from ddlm.types import ConfigError
from training.runs import B, Counting, losses, run, shards_in, small_config

pytestmark = pytest.mark.slow  # several processes each
WORKER = Path(__file__).with_name("worker.py")


def launch(size: int, *arguments: object) -> None:
    """Run the worker in ``size`` processes as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(WORKER), *map(str, arguments)]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    try:
        for process in processes:
            output = process.communicate(timeout=240)[0].decode()
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("alone") / "gradients.pt"
    launch(1, "gradients", "ddp", out)
    return torch.load(out)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_have_the_loss_and_gradients_of_one(
    strategy: str, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    launch(2, "gradients", strategy, tmp_path / "two.pt")
    two = torch.load(tmp_path / "two.pt")
    assert two.keys() == alone.keys()
    for name, value in alone.items():
        assert float(value.abs().max()) > 0, f"{name} has no gradient: the comparison shows nothing"
        torch.testing.assert_close(
            two[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max())
        )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_moves_between_numbers_of_processes(strategy: str, tmp_path: Path) -> None:
    """4 steps on two processes, 4 on one, 4 on two again: the trace is that of one process."""
    whole = run(tmp_path / "whole", small_config(steps=12))
    launch(2, "train", strategy, tmp_path / "moved", 4)
    files = list((tmp_path / "moved/checkpoints/step-4/training").glob("*.safetensors"))
    assert len(files) == (
        2 if strategy == "fsdp" else 1
    )  # each process writes its part of the state
    check_state(tmp_path / "moved", run(tmp_path / "four", small_config(steps=4)).checkpoint)
    launch(1, "train", strategy, tmp_path / "moved", 8)
    launch(2, "train", strategy, tmp_path / "moved", 12)
    # each call has its own horizon, so the schedules agree in the warm-up only
    assert len(losses(tmp_path / "moved")) == 12
    assert losses(tmp_path / "moved")[:5] == pytest.approx(losses(tmp_path / "whole")[:5], rel=1e-5)
    moved = load_model(tmp_path / "moved" / "checkpoints" / "step-12").model
    assert {k: v.shape for k, v in moved.state_dict().items()} == {
        k: v.shape for k, v in load_model(whole.checkpoint).model.state_dict().items()
    }


def check_state(run_folder: Path, alone: Path) -> None:
    """One process takes up the state of two: the weights, moments and counts that one process has by itself."""
    found, expected = (TrainState.create(small_config(steps=4)) for _ in range(2))
    found.restore(run_folder / "checkpoints" / "step-4")
    expected.restore(alone)
    assert found.step == expected.step == 4
    ours, theirs = found.resume_tensors(), expected.resume_tensors()
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("exp_avg_sq.") for name in ours)
    for name, value in theirs.items():
        largest = float(value.abs().max())
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_processes_start_from_the_same_counts(strategy: str, tmp_path: Path) -> None:
    """What the first process counted is what every process, or its shard, trains and what is saved."""
    shards_in(tmp_path)
    launch(1, "spectral", "ddp", tmp_path / "alone")
    launch(2, "spectral", strategy, tmp_path / "two")
    alone, two = (
        load_model(tmp_path / name / "checkpoints" / "step-1").model.state_dict()
        for name in ("alone", "two")
    )
    for name in ("embedding", "head.weight", "transformer.blocks.0.attention.qkv.weight"):
        torch.testing.assert_close(two[name], alone[name], rtol=0, atol=1e-6)
    queries, keys, _ = two["transformer.blocks.0.attention.qkv.weight"].chunk(3)
    torch.testing.assert_close(queries, keys, rtol=0, atol=1e-6)
    assert float(two["embedding"].std()) > 0.3  # random ones start at 0.001


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_write_down_the_whole_batch_that_was_skipped(
    strategy: str, tmp_path: Path
) -> None:
    launch(2, "exploding", strategy, tmp_path / "run")
    batch = load_file(tmp_path / "run" / "skipped" / "step-1.safetensors")
    assert torch.equal(batch["tokens"], Counting().batch(1))
    assert batch["t"].shape == batch["cross_entropy"].shape == (B,)
    run(tmp_path / "alone", small_config(steps=2, log_every=1))
    two, alone = (norms(tmp_path / name) for name in ("run", "alone"))
    assert two[0] == pytest.approx(alone[0], rel=1e-5)


def norms(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["embedding_norm"] for line in lines if '"train"' in line]


def torchrun(place: Path, script: str) -> subprocess.CompletedProcess[str]:
    """A script in two processes."""
    file = place / "script.py"
    file.write_text(textwrap.dedent(script))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(file),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("of", ["folder", "shard"])
def test_fsdp_survives_a_checkpoint_that_cannot_be_written(of: str, tmp_path: Path) -> None:
    """All processes agree that a checkpoint is missing: the next one needs tensors from all of them."""
    script = f"""
        import sys
        sys.path[:0] = {[str(Path(__file__).parents[1])]!r}
        import os
        from pathlib import Path
        from torch.distributed.checkpoint import HuggingFaceStorageWriter
        from ddlm.training import saving
        from training.runs import Counting, run, small_config
        rank, calls = int(os.environ["RANK"]), [0]
        def full_twice(real):
            def write(*args, **options):
                calls[0] += 1
                if calls[0] <= 2:  # after the evaluation, and when it is due
                    raise OSError(28, "No space left on device")
                return real(*args, **options)
            return write
        if {of!r} == "folder":
            saving.save_model = full_twice(saving.save_model)
        elif rank == 1:
            HuggingFaceStorageWriter.write_data = full_twice(HuggingFaceStorageWriter.write_data)
        config = small_config(steps=4, eval_every=2, checkpoint_every=2, strategy="fsdp")
        source = Counting(16, rank, 2)
        print(run(Path({str(tmp_path / "run")!r}), config, source=source, held_out=Counting()).step)
    """
    done = torchrun(tmp_path, script)
    assert done.returncode == 0, done.stderr[-3000:]
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left - {"best.json"} == {
        "step-4"
    }  # that of step 2 is missing, and nothing half-written is left
    assert load_model(tmp_path / "run").step == 4


def test_fsdp_wants_a_folder_that_all_processes_see(tmp_path: Path) -> None:
    """As on two machines without a common file system: a checkpoint without some of its shards is none."""
    script = f"""
        import os, sys
        sys.path[:0] = {[str(Path(__file__).parents[1])]!r}
        from pathlib import Path
        from training.runs import Counting, run, small_config
        rank = int(os.environ["RANK"])
        place = Path({str(tmp_path)!r}) / f"machine-{{rank}}"
        run(place, small_config(steps=1, strategy="fsdp"), source=Counting(16, rank, 2))
    """
    done = torchrun(tmp_path, script)
    assert done.returncode != 0
    assert "--out must be a folder that all machines see" in done.stderr
    assert not any((tmp_path / "machine-0" / "checkpoints").glob("step-*"))


def test_processes_that_see_other_checkpoints_do_not_go_on(tmp_path: Path) -> None:
    """As on two machines without a common file system: with DDP the first process alone has written any."""
    script = f"""
        import os, sys
        sys.path[:0] = {[str(Path(__file__).parents[1])]!r}
        from pathlib import Path
        from training.runs import Counting, run, small_config
        rank = int(os.environ["RANK"])
        place = Path({str(tmp_path)!r}) / f"machine-{{rank}}"
        for steps in (1, 2):
            run(place, small_config(steps=steps), source=Counting(16, rank, 2))
    """
    done = torchrun(tmp_path, script)
    assert done.returncode != 0
    assert "the processes do not see the same checkpoints of" in done.stderr
    found = (tmp_path / "machine-0" / "checkpoints").glob("step-*")
    assert [x.name for x in found] == ["step-1"]


def test_all_processes_save_the_best_evaluation_or_none(tmp_path: Path) -> None:
    """What each has measured differs in the last digits where GPUs do: here the first alone would see a new best."""
    script = f"""
        import os, sys
        sys.path[:0] = {[str(Path(__file__).parents[1])]!r}
        from pathlib import Path
        from training.runs import Counting, run, small_config
        from ddlm.training import loop
        rank = int(os.environ["RANK"])
        values = iter([2.0, 2.0 - 0.1 * (rank == 0), 1.5])
        loop.validation_loss = lambda *a, **k: {{"cross_entropy": next(values)}}
        config = small_config(steps=3, eval_every=1, strategy="fsdp")
        done = run(Path({str(tmp_path / "run")!r}), config, source=Counting(16, rank, 2), held_out=Counting(8))
        assert done.validation["cross_entropy"] == 1.5
    """
    done = torchrun(tmp_path, script)
    assert done.returncode == 0, done.stderr
    best = load_model(tmp_path / "run").step
    assert best == 3


def test_a_torch_that_cannot_write_shards_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Of28:
        def __init__(self, path: str, save_sharded: bool = False) -> None: ...

    for module in (SimpleNamespace(), SimpleNamespace(HuggingFaceStorageWriter=Of28)):
        monkeypatch.setattr(sharded, "_distributed_checkpoint", lambda module=module: module)
        with pytest.raises(ConfigError, match=r"update it to 2\.9 or later"):
            sharded.check_can_shard()


def test_a_batch_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", 3), ("RANK", 0), ("MASTER_ADDR", "::1"), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match=r"train\.batch=16 cannot be shared evenly by 3"):
        distributed.open_world(small_config())


def test_a_micro_batch_that_does_not_divide_the_share() -> None:
    with pytest.raises(ConfigError, match=r"train\.micro_batch=5 does not divide"):
        distributed.open_world(small_config(micro_batch=5))


def test_fsdp_wants_a_self_conditioned_sequence_in_every_pass() -> None:
    """Two processes of which one has none would gather the blocks a different number of times."""
    one = {"strategy": "fsdp", "micro_batch": 1, "self_condition": 0.5}
    with pytest.raises(ConfigError, match=r"must be at least 2$"):
        distributed.check_share(small_config(**one), 2)
    distributed.check_share(small_config(**one | {"micro_batch": 2}), 2)
    distributed.check_share(small_config(**one | {"self_condition": 0.0}), 2)
    distributed.check_share(small_config(**one | {"strategy": "ddp"}), 2)
    distributed.check_share(small_config(**one), 1)


def test_cuda_asked_for_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device was found"):
        distributed.open_world(small_config(device="cuda"))


def test_bf16_that_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "has_bf16", lambda device: False)
    with pytest.raises(ConfigError, match=r"bf16 is not supported.*precision=auto"):
        distributed.check_precision("bf16", torch.device("cuda:0"))
    distributed.check_precision("auto", torch.device("cuda:0"))
    distributed.check_precision("bf16", torch.device("cpu"))  # emulated: slow, not wrong
