"""Model folders: whole or not at all, verified, refused with one clear line."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ddlm.checkpoint import load_model, save_model
from ddlm.config import Config, ModelConfig
from ddlm.diffusion.process import NoiseProcess
from ddlm.diffusion.time_warp import TimeWarp
from ddlm.files import (
    INDEX,
    CheckpointError,
    read_manifest,
    read_tensors,
    verify_files,
    write_folder,
    write_tensors,
)
from ddlm.network.denoiser import DDLM
from ddlm.types import ConfigError

DAMAGE = ["truncated", "gone", "surplus", "index gone", "whole"]


def make(seed: int = 0, **sizes: int) -> tuple[DDLM, Config]:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 200, "length": 8, "layers": 1, "heads": 2, "width": 16, "feed_forward": 32,
        "embedding_width": 8, "time_width": 8,
    }  # fmt: skip
    config = Config(model=ModelConfig(**(settings | sizes)))
    return DDLM(config.model, NoiseProcess(1.0, 10.0)), config


def saved(folder: Path, **options: object) -> tuple[Path, DDLM, Config]:
    model, config = make()
    return save_model(folder, model, config, tokenizer_from=None, **options), model, config  # type: ignore[arg-type]


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("shard_bytes", [None, 20000], ids=["one file", "shards"])
def test_a_saved_model_comes_back(tmp_path: Path, shard_bytes: int | None) -> None:
    model, config = make()
    warp = TimeWarp(1.0, 10.0)
    with torch.no_grad():
        warp.log_heights.add_(torch.randn(100))
    save_model(
        tmp_path / "m", model, config, tokenizer_from=None, time_warp=warp, step=7,
        provenance={"data": "abc"}, shard_bytes=shard_bytes,
    )  # fmt: skip
    if shard_bytes is not None:
        files = list((tmp_path / "m").glob("model-*.safetensors"))
        assert len(files) > 2
        assert all(p.stat().st_size <= shard_bytes for p in files)
        assert not (tmp_path / "m" / "model.safetensors").exists()
    loaded = load_model(tmp_path / "m")
    assert loaded.config == config
    assert (loaded.step, loaded.provenance) == (7, {"data": "abc"})
    assert not loaded.model.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert loaded.time_warp is not None
    assert torch.equal(loaded.time_warp.log_heights, warp.log_heights)


def test_shards_are_cut_as_the_hub_cuts_them(tmp_path: Path) -> None:
    folder, model, _ = saved(tmp_path / "m", shard_bytes=20000)
    index = json.loads((folder / INDEX).read_text())
    state = model.state_dict()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    held = {name: file for file in files for name in read_tensors(folder / file)}
    assert held == index["weight_map"]
    assert set(held) == set(state)
    assert set(read_manifest(folder)["files"]) == {"config.yaml", INDEX, *files}


def test_a_tensor_larger_than_a_shard_has_a_file_of_its_own(tmp_path: Path) -> None:
    folder, model, _ = saved(tmp_path / "m", shard_bytes=9000)
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"]["head.weight"]
    assert [k for k, v in index["weight_map"].items() if v == file] == ["head.weight"]
    assert torch.equal(load_model(folder).model.head.weight, model.head.weight)


def test_tensors_of_one_memory_are_cut_all_the_same(tmp_path: Path) -> None:
    model, config = make()
    flat = torch.cat([t.flatten() for t in model.state_dict().values()])
    parts = flat.split([t.numel() for t in model.state_dict().values()])
    state = {k: p.view_as(t) for (k, t), p in zip(model.state_dict().items(), parts, strict=True)}
    folder = save_model(tmp_path / "m", state, config, tokenizer_from=None, shard_bytes=20000)
    assert max(p.stat().st_size for p in folder.glob("*.safetensors")) <= 20000
    assert load_model(folder).model.head.weight.equal(model.head.weight)


@pytest.mark.parametrize(
    "damage, verify", [("bit", True), *itertools.product(DAMAGE, [True, False])]
)
def test_damage_of_shards_is_found(tmp_path: Path, damage: str, verify: bool) -> None:
    folder, _, _ = saved(tmp_path / "m", shard_bytes=20000)
    path = sorted(folder.glob("model-*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "index gone":
        path = folder / INDEX
        path.unlink()
    elif damage == "surplus":  # of an export that had more
        path = path.with_name("model-00001-of-00009.safetensors")
        path.write_bytes(data)
    elif damage == "whole":
        path.with_name("model.safetensors").write_bytes(data)
    elif damage == "truncated":
        path.write_bytes(data[:-5])
    else:
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        load_model(folder, verify=verify)
    known = {"surplus": "does not belong", "whole": "does not belong", "bit": "is damaged"}
    known |= {"truncated": "is damaged", "gone": "is missing", "index gone": "is missing"}
    assert known[damage] in one_line(error)
    assert str(path if damage != "whole" else folder / "model") in one_line(error)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": "../x"}}']
)
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    folder, _, _ = saved(tmp_path / "m", shard_bytes=20000)
    (folder / INDEX).write_text(content)
    with pytest.raises(ConfigError, match=r"damaged|x is missing"):
        load_model(folder, verify=False)


@pytest.mark.parametrize("sizes", [(20000, None), (None, 20000), (20000, 12000)])
def test_nothing_of_an_older_export_is_left(tmp_path: Path, sizes: tuple[int, int]) -> None:
    for size in sizes:
        folder, _, _ = saved(tmp_path / "m", shard_bytes=size)
        assert set(read_manifest(folder)["files"]) | {"manifest.json"} == {
            p.name for p in folder.iterdir()
        }
        load_model(folder)


def test_half_precision_is_read_back_as_float32(tmp_path: Path) -> None:
    folder, model, _ = saved(tmp_path / "m", dtype="bfloat16")
    weight = load_model(folder).model.head.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, model.head.weight.bfloat16().float())


def test_an_older_folder_is_replaced(tmp_path: Path) -> None:
    saved(tmp_path / "m", step=1)
    saved(tmp_path / "m", step=2)
    assert load_model(tmp_path / "m").step == 2
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("damage", ["bit", "truncated", "gone"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.yaml"])
def test_damage_is_found(tmp_path: Path, damage: str, file: str) -> None:
    folder, _, _ = saved(tmp_path / "m")
    path = folder / file
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-5])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert str(path) in one_line(error)


def test_a_damaged_manifest_is_found(tmp_path: Path) -> None:
    folder, _, _ = saved(tmp_path / "m")
    (folder / "manifest.json").write_text('{"format": 1')
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        load_model(folder)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    folder, _, _ = saved(tmp_path / "m")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match=r"format 99.*update ddlm"):
        load_model(folder)


def test_weights_of_another_configuration_are_named(tmp_path: Path) -> None:
    model, _ = make()
    _, config = make(layers=2, width=32)
    with pytest.raises(ConfigError, match=r"model.layers 1 -> 2; model.width 16 -> 32.*its own"):
        save_model(tmp_path / "m", model, config, tokenizer_from=None)
    save_model(tmp_path / "m", model.state_dict(), config, tokenizer_from=None)
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "m")
    text = one_line(error)
    assert "head.weight" in text or "transformer" in text
    assert "and" in text
    assert "more" in text


def test_a_process_that_no_file_could_tell_is_refused(tmp_path: Path) -> None:
    model, config = make()
    model.process = NoiseProcess(1.0, 10.0, sigma_data=0.5)
    with pytest.raises(ConfigError, match=r"process.sigma_data 0.5 -> 1.0"):
        save_model(tmp_path / "m", model, config, tokenizer_from=None)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "state.ckpt"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"x": Bomb()}, tmp_path / name)
    for target in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match="pickle"):
            load_model(target)
    assert not (tmp_path / "exploded").exists()


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="not a model folder"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load_model(tmp_path)


def test_a_hub_id_without_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(CheckpointError) as error:
        load_model("nobody/ddlm-missing")
    assert "could not be read from the hub" in one_line(error)


def test_only_files_of_the_folder_are_hashed(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "training").mkdir()
        (folder / "training" / "state.json").write_text("{}")
        (folder / "a.txt").write_text("a")

    write_folder(tmp_path / "f", fill)
    (tmp_path / "f" / "training" / "state.json").write_text("[]")
    verify_files(tmp_path / "f")
    with pytest.raises(CheckpointError, match=r"state\.json"):
        verify_files(tmp_path / "f", training=True)


def test_a_write_that_fails_leaves_the_older_folder(tmp_path: Path) -> None:
    saved(tmp_path / "m", step=1)

    def fill(folder: Path) -> None:
        (folder / "x").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "m", fill)
    assert load_model(tmp_path / "m").step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_disk_that_takes_no_more_leaves_the_older_folder(tmp_path: Path) -> None:
    """The kernel itself refuses the write: files may not grow past the limit."""
    saved(tmp_path / "m", step=1)
    weights = (tmp_path / "m" / "model.safetensors").stat().st_size
    script = f"""
        import resource, signal, sys
        sys.path[:0] = {[str(Path(__file__).parent)]!r}
        from test_checkpoint import saved
        from pathlib import Path
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({weights // 2}, {weights // 2}))
        try:
            saved(Path({str(tmp_path / "m")!r}), step=2)
        except OSError as error:
            print("refused", error.errno)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("refused")
    assert load_model(tmp_path / "m").step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != weights // 2


def test_a_kill_between_any_two_writes_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    """The process dies at the k-th sync or rename, for every k: the run always has a whole checkpoint."""
    script = f"""
        import os, sys
        sys.path[:0] = {[str(Path(__file__).parent)]!r}
        from pathlib import Path
        from test_checkpoint import make, save_model
        run = Path({str(tmp_path)!r})
        model, config = make()
        save_model(run / "checkpoints" / "step-1", model, config, tokenizer_from=None, step=1)
        deaths = 0
        while True:
            child = os.fork()
            if child == 0:
                left = [deaths]
                def deadly(real):
                    def call(*args, **kwargs):
                        if left[0] == 0:
                            os.kill(os.getpid(), 9)
                        left[0] -= 1
                        return real(*args, **kwargs)
                    return call
                os.fsync, os.rename, os.replace = map(deadly, (os.fsync, os.rename, os.replace))
                Path.rename, Path.replace = deadly(Path.rename), deadly(Path.replace)
                save_model(run / "checkpoints" / "step-2", model, config, tokenizer_from=None, step=2)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            from ddlm.checkpoint import latest_checkpoint, load_model
            found = load_model(latest_checkpoint(run))
            assert found.step in (1, 2), found.step
            if status == 0:
                assert found.step == 2
                break
            assert status == 9, status
            deaths += 1
            if found.step == 2:
                import shutil
                shutil.rmtree(run / "checkpoints" / "step-2")
        print(deaths)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 8  # so many syncs and renames there are


def test_a_link_to_another_disk_stays_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "large" / "real", tmp_path / "m"
    real.mkdir(parents=True)
    link.symlink_to(real)
    for step in (1, 2):  # into an empty folder, and over an older model
        saved(link, step=step)
        assert link.is_symlink()
        assert load_model(real).step == step
    assert {p.name for p in tmp_path.iterdir()} == {"large", "m"}
    assert [p.name for p in real.parent.iterdir()] == ["real"]


def test_a_time_warp_that_merely_lies_there_is_another_models(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    write_tensors(tmp_path / "m" / "time_warp.safetensors", TimeWarp(1.0, 10.0).state_dict())
    assert load_model(tmp_path / "m").time_warp is None


def test_others_may_read_weights_as_far_as_the_umask_says(tmp_path):
    """Safetensors itself writes for the owner alone: a server under another user could not read a model."""
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            write_tensors(tmp_path / f"{mask}.safetensors", {"a": torch.zeros(2)})
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{mask}.safetensors").stat().st_mode) == mode


def test_reading_a_model_leaves_the_callers_draws(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    torch.manual_seed(1)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    load_model(tmp_path / "model")
    assert torch.equal(torch.rand(3), drawn)
