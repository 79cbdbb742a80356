"""``ddlm finetune``: GLUE for a DDLM, the same network from scratch, and any model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ddlm.launch import read_launch
from ddlm.types import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from ddlm.downstream.glue import GlueData
    from ddlm.downstream.models import Source
    from ddlm.downstream.search import Grid, Progress, Study


def finetune(
    *,
    task: str,
    model: str,
    config: str | None = None,
    tokenizer: Path | None = None,
    data: Path | None = None,
    out: Path = Path("runs/glue"),
    name: str | None = None,
    batch: list[int] = [16, 32, 64, 128],  # noqa: B006 - read only; the default is shown in the help
    lr: list[float] = [3e-4, 1e-4, 3e-5, 1e-5],  # noqa: B006
    t: list[float] = [1, 5, 10],  # noqa: B006
    seeds: int = 5,
    epochs: int | None = None,
    length: int = 128,
    pooling: Literal["mean", "max", "first", "attention", "pair"] = "mean",
    segments: bool = True,
    layer_decay: float = 1.0,
    weight_decay: float = 0.01,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    prune: bool = True,
    limit: int | None = None,
    submit: Path | None = None,
    save: Path | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    threads: int = 0,
) -> None:
    """Fine-tune on GLUE: a grid search, then several seeds of the best setting, a record for every run.

    The same command goes on with a search that was interrupted. One value for each of --batch, --lr and --t skips
    the search. Results: OUT/table.md, OUT/<model>/<task>/summary.json. A folder holds one model, one data set and one
    choice of everything that the search does not vary: another --name or --out for anything else.

    Args:
        task: cola, sst2, mrpc, qqp, mnli, qnli, rte, stsb, wnli or all.
        model: DDLM folder, run folder or hub id; a fine-tuned DDLM that --save wrote (its head is drawn anew);
            `scratch`; `minilm`; or a folder or hub id for AutoModel.
        config: For --model scratch: a DDLM folder whose architecture is taken, or a configuration.
        tokenizer: For --model scratch with a configuration: folder or file of the tokenizer.
        data: Folder with <task>/<split>.jsonl.gz; left out: the data set nyu-mll/glue from the hub.
        out: Folder of the results.
        name: Name of the model in records and tables, and of its folder under --out.
        batch: Batch sizes of the search, in sequences.
        lr: Learning rates of the search.
        t: Times of the search, 1 to 10 in the paper's units (1 is the model's t_min, 10 its t_max);
            other models than DDLMs have no time.
        seeds: Runs of the best setting.
        epochs: Passes over the training data; left out: the paper's 10 (RTE 20).
        length: Longest input, in tokens (the paper: 64).
        pooling: DDLM only: how hidden states become one vector; pair sets the two texts' means, their difference and
            their product beside each other.
        segments: DDLM only: tell the texts of a pair apart by learned vectors.
        layer_decay: Factor of the learning rate from each layer to the one below it, above 0 and at most 1.
        weight_decay: AdamW's decay of the matrices, 0 or more.
        precision: Precision of the matrix products; auto: bf16 where the device has instructions for it.
        prune: Stop runs of the search that stay below the median of the finished ones.
        limit: Use only the first examples of the training data; the result is then no GLUE score.
        submit: Write the zip for GLUE's server from the best seed's test predictions; after runs without it, the best
            seed is made again.
        save: Save the fine-tuned models of the final seeds under this folder; seeds whose model lacks there are made
            again.
        device: Where to run; left out: CUDA where there is one.
        threads: CPU threads (0: torch's default).
    """
    from ddlm.device import find_device, resolve_precision
    from ddlm.downstream.finetune import Setting
    from ddlm.downstream.glue import find_tasks, read_task
    from ddlm.downstream.models import find_source
    from ddlm.downstream.report import best_predictions, read_summaries, table
    from ddlm.downstream.search import Grid, Study
    from ddlm.files import check_folder, write_text

    if (size := read_launch().size) > 1:
        raise ConfigError(
            f"{size} processes were started and each would fine-tune into {out}: start one, without torchrun"
        )
    tasks = find_tasks(task)
    _check(seeds, length, epochs, batch, lr, t, limit, threads)
    _check_decays(layer_decay, weight_decay)
    check_folder(out, "--out")
    if save is not None:
        check_folder(save, "--save")
    if threads:
        import torch

        torch.set_num_threads(threads)
    source = find_source(model, config=config, tokenizer=tokenizer, name=name)
    _check_results(out, source)
    loaded = {x.name: read_task(x, data, limit) for x in tasks}
    if submit is not None:
        _check_submittable(list(loaded.values()))
        _check_zip(submit)
    for one_task in {len(x.labels): x for x in tasks}.values():  # heads differ in nothing else
        source.check(one_task, length, pooling, segments)
    predictions = {}
    show, progress = _progress()
    with show:
        for one in loaded.values():
            base = Setting(
                batch=batch[0],
                lr=lr[0],
                time=t[0],
                seed=0,
                epochs=epochs or one.task.epochs,
                length=length,
                pooling=pooling,
                segments=segments,
                layer_decay=layer_decay,
                weight_decay=weight_decay,
                precision=resolve_precision(precision, find_device(device)),
            )
            study = Study(source, one, out / source.label / one.report_name, device, progress)
            grid = Grid(batch, lr, t, base)
            _run(study, grid, seeds, prune, submit is not None, save)
            predictions[one.task.name] = best_predictions(study.finals, one.task)
            write_text(out / "table.md", table(read_summaries(out)))
    print(table([s for s in read_summaries(out) if s["model"] == source.label]))
    print(f"all models: {out / 'table.md'}")
    if submit is not None:
        _submit(submit, predictions, loaded)


def _run(
    study: Study, grid: Grid, seeds: int, prune: bool, predict_test: bool, save: Path | None
) -> None:
    try:
        study.run(grid, seeds, prune=prune, predict_test=predict_test, save=save)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; finished runs are kept in {study.folder}, the same command goes on"
        ) from None


def _check(
    seeds: int,
    length: int,
    epochs: int | None,
    batch: list[int],
    lr: list[float],
    t: list[float],
    limit: int | None,
    threads: int,
) -> None:
    for option, value, least in (
        ("seeds", seeds, 1),
        ("length", length, 8),
        ("epochs", 1 if epochs is None else epochs, 1),
        ("batch", min(batch), 1),
        ("limit", 2 if limit is None else limit, 2),
        ("threads", threads, 0),
    ):
        if value < least:
            raise ConfigError(f"--{option} {value} was given, at least {least} is needed")
    if min(lr) <= 0:
        raise ConfigError(f"--lr {min(lr):g} was given, a positive number is needed")
    if not all(1 <= x <= 10 for x in t):
        raise ConfigError(f"--t {' '.join(f'{x:g}' for x in t)} was given, 1 to 10 is needed")


def _check_decays(layer_decay: float, weight_decay: float) -> None:
    if not 0 < layer_decay <= 1:
        raise ConfigError(
            f"--layer_decay {layer_decay:g} was given, a factor above 0 and at most 1 is needed (1: none)"
        )
    if weight_decay < 0:
        raise ConfigError(f"--weight_decay {weight_decay:g} was given, 0 or more is needed")


def _check_results(out: Path, source: Source) -> None:
    """Read what is under ``out`` before hours of training, not after them; one name is one model there."""
    from ddlm.downstream.report import read_summaries
    from ddlm.files import check_folder

    check_folder(out / source.label, "--out")
    for summary in read_summaries(out):
        mine = source.owns(summary.get("fingerprint", source.fingerprint))
        if summary["model"] == source.label and not mine:
            raise ConfigError(
                f"{out / source.label} holds results of another model ({summary['task']}): choose another --name or "
                "--out"
            )


def _check_submittable(loaded: list[GlueData]) -> None:
    for data in loaded:
        if not data.is_glue:
            raise ConfigError(
                f"--submit needs GLUE's own data, {data.task.name} is a subset ({data.differences[0]}): leave the "
                "task out or read it from the hub"
            )
        missing = [s for s in data.task.test_splits if s not in data.splits]
        if missing:
            raise ConfigError(f"--submit needs the splits {', '.join(missing)} of {data.task.name}")
        for name in data.task.test_splits:
            have, want = len(data.splits[name]), data.task.sizes[name]
            if have != want:
                raise ConfigError(
                    f"--submit needs GLUE's {want:,} examples of {data.task.name} {name}, {have:,} were found: leave "
                    "the task out or read it from the hub"
                )


def _check_zip(path: Path) -> None:
    from ddlm.files import check_folder

    if path.is_dir():
        raise ConfigError(f"--submit {path} is a folder, the zip is a file: name one in it")
    check_folder(path.parent, "--submit")


def _submit(
    path: Path, predictions: dict[str, dict[str, list[float]]], loaded: dict[str, GlueData]
) -> None:
    from ddlm.downstream.report import write_submission

    index = {
        f"{name}/{split}": data.splits[split].index
        for name, data in loaded.items()
        for split in data.task.test_splits
    }
    constant = write_submission(path, predictions, index)
    print(f"{path}: predictions of {', '.join(x.task.title for x in loaded.values())}")
    if constant:
        print(
            f"files with one constant answer, because the server wants every task: {', '.join(constant)}"
        )


def _progress() -> tuple[Bar, Progress]:
    """A bar for the run that is going on; finished epochs are printed above it."""
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    rows: dict[str, TaskID] = {}

    def tell(run: str, share: float, line: str) -> None:
        if run not in rows:
            for old in rows.values():
                bar.remove_task(old)
            rows.clear()
            rows[run] = bar.add_task(run, total=1.0)
        bar.update(rows[run], completed=share)
        if line:
            bar.console.print(f"{run}: {line}", highlight=False, markup=False, soft_wrap=True)

    return bar, tell
